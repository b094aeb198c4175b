// recursive_doubling all_reduce and all_gather: what a rank knows doubles at every step.
//
// all_reduce. At distance d the ranks form aligned blocks of d; every rank knows the sum of its block, and
// reads the sum of the sibling block from one of its members. Sums are taken in the order of ranks, which
// makes the balanced binary tree over ranks for every n; the last block may be cut short, and one without a
// sibling waits. Cost: ceil(log2 n) steps; each rank reads the whole data at each. The choice for small
// messages over many ranks.
//
// all_gather. At distance d a rank holds d blocks, its own and those of the ranks that follow, and reads as
// many from the rank at distance d. Any n, no rotation at the end, since every block is put where it belongs.
// Cost: ceil(log2 n) steps; each rank reads (n-1)/n of the data, the least possible.
//
// Thakur, Rabenseifner and Gropp, Optimization of collective communication operations in MPICH, IJHPCA 19(1),
// 2005; for all_gather, Bruck, Ho, Kipnis, Upfal and Weathersby, Efficient algorithms for all-to-all
// communications in multiport message-passing systems, IEEE TPDS 8(11), 1997.
#include <algorithm>
#include <bit>

#include "schedule/algorithms/all.h"
#include "schedule/algorithms/common.h"

namespace pycomm::schedule {
namespace {

// Every sum has scratch of its own, since slower ranks may still read the one before. `in` is shown as a
// copy, since a rank may finish `out`, which may be `in`, before all others have read it.
void all_reduce(Builder& b, int n) {
  const int rank = b.rank();
  // The sum of the block of ranks that starts at `base`, as `member` knows it after the steps below distance
  // d.
  const auto sum_of = [n](int member, int base, int d) {
    const int step = std::bit_width(static_cast<unsigned>(std::min(d, n - base) - 1));
    return step == 0 ? Builder::image_of(member) : Builder::scratch_of(member, {step - 1});
  };
  b.copy(b.image(), b.in());
  for (int d = 1; d < n; d *= 2) {
    const int base = rank & ~(2 * d - 1), middle = base + d;
    if (middle >= n) continue;
    const bool lower = rank < middle;
    const int mine = lower ? base : middle, sibling = lower ? middle : base;
    const int my_size = std::min(d, n - mine), sibling_size = std::min(d, n - sibling);
    for (int i = 0; i < sibling_size; ++i)
      if (i % my_size == rank - mine) b.offer(sibling + i, sum_of(rank, mine, d));
    const Ref own = sum_of(rank, mine, d);
    const Ref other = sum_of(sibling + (rank - mine) % sibling_size, sibling, d);
    const std::vector<Ref> srcs = lower ? std::vector{own, other} : std::vector{other, own};
    if (2 * d < n) {
      Ref sum = sum_of(rank, base, 2 * d);
      b.combine({sum}, srcs);
    } else {
      b.combine({b.out()}, srcs, /*final=*/true);
    }
  }
}

void all_gather(Builder& b, int n) {
  const int rank = b.rank();
  const auto block_of = [](int holder, int owner) {
    return Ref{holder, holder == owner ? Buffer::in : Buffer::out, {owner}};
  };
  for (int d = 1; d < n; d *= 2) {
    const int giver = (rank + d) % n, taker = (rank + n - d) % n, blocks = std::min(d, n - d);
    for (int i = 0; i < blocks; ++i) b.offer(taker, block_of(rank, (rank + i) % n));
    if (d == 1) b.copy(b.out({rank}), b.in({rank}));
    for (int i = 0; i < blocks; ++i) b.copy(b.out({(giver + i) % n}), block_of(giver, (giver + i) % n));
  }
}

}  // namespace

Schedule recursive_doubling(const World& world) {
  const int n = world.size;
  if (n == 1) return alone(world);
  Schedule schedule;
  for (int rank = 0; rank < n; ++rank) {
    Builder b(schedule, rank);
    if (world.collective == Collective::all_reduce)
      all_reduce(b, n);
    else
      all_gather(b, n);
  }
  accept_all(schedule);
  return schedule;
}

}  // namespace pycomm::schedule
