// The ranks of a group, as one of them sees them: which process each one is, and whose memory it maps.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "transport/node.h"

namespace pycomm::transport {

// Identifies a group: the same on all of its ranks, and different from every other group of the world.
using GroupKey = uint64_t;

struct Group {
  // `node_ranks[r]` is the node's rank of group rank r; `rank` is this one.
  Group(std::shared_ptr<Node> with, std::vector<int> ranks, int me)
      : node(std::move(with)), node_ranks(std::move(ranks)), nodes(node->nodes_of(node_ranks)), rank(me) {
    places.assign(node_ranks.size(), -1);
    for (int r = 0; r < size(); ++r) {
      if (!nodes.empty() && nodes[r] != nodes[rank]) continue;
      places[r] = static_cast<int>(local_ranks.size());
      local_ranks.push_back(r);
    }
  }

  int size() const { return static_cast<int>(node_ranks.size()); }
  int local_size() const { return static_cast<int>(local_ranks.size()); }
  bool mapped(int r) const { return places[r] >= 0; }
  // Whether the rank's process has ended.
  bool dead(int r) const { return node->dead(node_ranks[r]); }
  int64_t pid_of(int r) const { return node->pid_of(node_ranks[r]); }
  // Node::read of a rank of this node.
  int read(int r, void* to, uint64_t from, int64_t bytes) const {
    return node->read(node_ranks[r], to, from, bytes);
  }

  std::shared_ptr<Node> node;
  std::vector<int> node_ranks;
  std::vector<int> nodes;        // of each rank, numbered from 0; empty: all ranks are on one node
  std::vector<int> local_ranks;  // on this rank's node, ascending
  std::vector<int> places;       // of each rank, its index among these; -1: on another node
  int rank;
};

}  // namespace pycomm::transport
