// pipelined_tree broadcast and reduce: a binary tree through which small trips follow each other, so that all
// levels work at once.
//
// Cost: log2(n) steps for the first trip, then one step for each further one; each rank reads the data once
// (reduce: twice) and shows it to two others at most. The choice for large data.
//
// Sanders, Speck and Träff, Two-tree algorithms for full bandwidth broadcast, reduction and scan, Parallel
// Computing 35, 2009, section 2.
#include "schedule/algorithms/all.h"
#include "schedule/algorithms/common.h"

namespace pycomm::schedule {

Schedule pipelined_tree(const World& world) {
  const int n = world.size;
  std::vector<int> parent(n, -1);
  for (int place = 1; place < n; ++place)
    parent[(place + world.root) % n] = ((place - 1) / 2 + world.root) % n;
  return along_tree(world, Tree(parent), /*trip_bytes=*/64 << 10);
}

}  // namespace pycomm::schedule
