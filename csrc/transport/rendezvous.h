// How the ranks of a node meet: once, over an abstract Unix socket that rank 0 listens on. Each leaves with
// the node's memory, a pidfd of every other rank and the file of its arena. Afterwards no socket is left.
#pragma once

#include <cstdint>
#include <vector>

#include "transport/fd.h"
#include "transport/node.h"

namespace pycomm::transport {

struct Seat {
  int64_t pid = 0;
  Fd pidfd, arena;
};

struct Meeting {
  Fd memory;
  std::vector<Seat> seats;  // by rank
};

// `memory` is what rank 0 brings; the others get it. Throws as Node::join says.
Meeting meet(const Node::Options& options, Fd memory);

}  // namespace pycomm::transport
