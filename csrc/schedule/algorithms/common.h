// The pieces that several algorithms are built from.
#pragma once

#include <vector>

#include "schedule/schedule.h"

namespace pycomm::schedule {

// A world of one: its `in` is the result.
Schedule alone(const World& world);

// Ends every program with an accept for each of its offers that has none yet. Use it for offers that peers
// only read: their accept says no more than "before the collective ends".
void accept_all(Schedule& schedule);

// The nodes of a world, in the order of their first ranks.
struct Nodes {
  explicit Nodes(const World& world);
  std::vector<std::vector<int>> members;  // by node, ascending
  std::vector<int> node, local;           // by rank: its node, and its place among the members
  int count() const { return static_cast<int>(members.size()); }
  // All ranks, node by node.
  std::vector<int> in_order() const;
};

// A rooted tree over the ranks.
struct Tree {
  explicit Tree(std::vector<int> parents);  // -1 at the root
  std::vector<int> parent;
  std::vector<std::vector<int>> children;  // ascending
  int depth = 0;                           // links between the root and the farthest rank
};

// One rank's part of a sum towards the root: leaves show `in`, inner ranks a partial sum in scratch, and the
// root finishes the sum in `out`.
void reduce_up(Builder& b, const Tree& tree, Chunk chunk);
// One rank's part of spreading the chunk from the root's `source` to the `out` of all other ranks.
void broadcast_down(Builder& b, const Tree& tree, Chunk chunk, Buffer source);
// A whole broadcast or reduce.
Schedule along_tree(const World& world, const Tree& tree, int64_t trip_bytes = 0);

}  // namespace pycomm::schedule
