// tree all_reduce: two binary trees, each of which sums half of the data up to its root and spreads it down
// again. The inner ranks of one tree are leaves of the other, so that every rank's link is used in full.
//
// Cost: 2 log2(n) steps for the first trip; each rank moves at most 2 times the data in and out, and small
// trips follow each other through the trees: the sum of a trip comes down while later trips go up. The
// choice for many ranks, where a ring's 2(n-1) steps are too many.
//
// Sanders, Speck and Träff, Two-tree algorithms for full bandwidth broadcast, reduction and scan, Parallel
// Computing 35, 2009.
#include <algorithm>
#include <bit>

#include "schedule/algorithms/all.h"
#include "schedule/algorithms/common.h"

namespace pycomm::schedule {
namespace {

// Sets the parents in the in-order binary tree over places [lo, hi), whose leaves are the even places, and
// returns its root.
int hang(std::vector<int>& parent, int lo, int hi) {
  const int root = lo + static_cast<int>(std::bit_floor(static_cast<unsigned>(hi - lo))) - 1;
  if (lo < root) parent[hang(parent, lo, root)] = root;
  if (root + 1 < hi) parent[hang(parent, root + 1, hi)] = root;
  return root;
}

// That tree over all ranks: rank_at(place) says which rank is at a place.
template <typename RankAt>
Tree in_order_tree(int n, RankAt rank_at) {
  std::vector<int> place_parent(n, -1), parent(n, -1);
  hang(place_parent, 0, n);
  for (int place = 0; place < n; ++place)
    if (place_parent[place] >= 0) parent[rank_at(place)] = rank_at(place_parent[place]);
  return Tree(parent);
}

}  // namespace

Schedule tree(const World& world) {
  const int n = world.size;
  if (n == 1) return alone(world);
  // Ranks of one node have neighbouring places, so that few links of a tree leave the node. In the second
  // tree the places are mirrored if n is even, and shifted by one if it is odd: so the inner ranks of the
  // first tree are leaves of the second.
  const std::vector<int> order = Nodes(world).in_order();
  const Tree trees[2] = {
      in_order_tree(n, [&](int place) { return order[place]; }),
      in_order_tree(n, [&](int place) { return order[n % 2 == 0 ? n - 1 - place : (place + n - 1) % n]; }),
  };
  Schedule schedule;
  schedule.trip_bytes = 64 << 10;
  // A trip comes down so many iterations after it went up. Meanwhile later trips go up, so that ranks do not
  // wait for one to go all the way.
  const int down = std::min(2 * trees[0].depth, 3);
  schedule.stages = down + 1;
  for (int rank = 0; rank < n; ++rank) {
    Builder b(schedule, rank);
    for (int t = 0; t < 2; ++t) reduce_up(b, trees[t], {0, t, t + 1, 2});
    b.stage(down);
    for (int t = 0; t < 2; ++t) broadcast_down(b, trees[t], {0, t, t + 1, 2}, Buffer::out);
  }
  accept_all(schedule);
  return schedule;
}

}  // namespace pycomm::schedule
