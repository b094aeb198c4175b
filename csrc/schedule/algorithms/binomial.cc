// binomial broadcast and reduce: the tree in which the parent of the rank at place v, counted from the root,
// is at v with its lowest set bit cleared. A parent serves all its children at once, and sums them in one
// pass.
//
// Cost: ceil(log2 n) steps; the data crosses each link once, and the root serves log2(n) children. The choice
// for small messages over many ranks.
//
// Johnsson and Ho, Optimum broadcasting and personalized communication in hypercubes, IEEE TC 38(9), 1989.
#include "schedule/algorithms/all.h"
#include "schedule/algorithms/common.h"

namespace pycomm::schedule {

Schedule binomial(const World& world) {
  const int n = world.size;
  std::vector<int> parent(n, -1);
  for (int place = 1; place < n; ++place)
    parent[(place + world.root) % n] = ((place & (place - 1)) + world.root) % n;
  return along_tree(world, Tree(parent));
}

}  // namespace pycomm::schedule
