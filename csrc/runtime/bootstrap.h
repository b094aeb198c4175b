// How a group comes to be, and what its ranks find out together before its first call.
#pragma once

#include <memory>
#include <vector>

#include "runtime/communicator.h"

namespace pycomm::runtime {

// This process's rank of a node's first group; blocks until all have come. Throws as Node::join does, and
// OutOfMemoryError.
std::shared_ptr<Communicator> join(const transport::Node::Options& options);
// The groups of `size` rank threads of one process. Throws ValueError.
std::vector<std::shared_ptr<Communicator>> join_threads(int size, double timeout_s,
                                                        const transport::Node::MadeUp& made_up = {});

}  // namespace pycomm::runtime
