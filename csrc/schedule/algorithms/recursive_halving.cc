// recursive_halving reduce_scatter: the blocks that a rank still answers for halve at every step.
//
// In the step at distance d a rank hands the partial sums of d blocks (or as many as are left) to the rank at
// distance d, and goes on with its own block and those of the d - 1 ranks that follow. This is the all_gather
// of recursive_doubling run backwards, and works for any n as well.
//
// Cost: ceil(log2 n) steps; each rank reads (n-1)/n of the data, the least possible.
//
// Bernaschi, Iannello and Lauria, Efficient implementation of reduce-scatter in MPI, Journal of Systems
// Architecture 49(3), 2003.
#include <algorithm>
#include <bit>

#include "schedule/algorithms/all.h"
#include "schedule/algorithms/common.h"

namespace pycomm::schedule {

Schedule recursive_halving(const World& world) {
  const int n = world.size;
  if (n == 1) return alone(world);
  Schedule schedule;
  for (int rank = 0; rank < n; ++rank) {
    Builder b(schedule, rank);
    // By a block's distance from its holder: whether the holder's partial sum is in scratch, not just its
    // `in`.
    std::vector<bool> summed(n, false);
    const auto held = [&](int holder, int distance) {
      return Ref{holder, summed[distance] ? Buffer::scratch : Buffer::in, {(holder + distance) % n}};
    };
    for (int d = static_cast<int>(std::bit_ceil(static_cast<unsigned>(n))) / 2; d >= 1; d /= 2) {
      const int giver = (rank + n - d) % n, taker = (rank + d) % n, blocks = std::min(d, n - d);
      for (int i = 0; i < blocks; ++i) b.offer(taker, held(rank, d + i));
      for (int i = 0; i < blocks; ++i) {
        const std::vector<Ref> srcs = {held(rank, i), held(giver, d + i)};
        if (d == 1)
          b.combine({b.out({rank})}, srcs, /*final=*/true);
        else
          b.combine({b.scratch({(rank + i) % n})}, srcs);
      }
      std::fill_n(summed.begin(), blocks, true);
    }
  }
  accept_all(schedule);
  return schedule;
}

}  // namespace pycomm::schedule
