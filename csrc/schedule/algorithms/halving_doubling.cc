// halving_doubling all_reduce: a reduce-scatter in which the part of the data that a rank answers for halves
// while the distance doubles, then the same steps backwards to spread the sums.
//
// A world that is no power of two is cut into aligned *cubes*, powers of two that shrink (13 = 8 + 4 + 1).
// Each cube sums its own ranks; then from the smallest on, a cube's sums are added to the next larger one's,
// so that the largest ends with all, spreads it among its ranks, and shows it to the ranks beyond. Sums are
// always taken in the order of ranks: the balanced binary tree for every n.
//
// Cost: 2 log2(n) steps where n is a power of two, and as many more as there are further cubes, plus one;
// each rank moves 2 (n-1)/n of the data, the least possible (beyond a power of two, the largest cube shows it
// once more). The choice for middle sizes over many ranks.
//
// Rabenseifner, Optimization of collective reduction operations, ICCS 2004; for the cubes, Rabenseifner and
// Träff, More efficient reduction algorithms for non-power-of-two number of processors, EuroPVM/MPI 2004.
#include <algorithm>
#include <bit>

#include "schedule/algorithms/all.h"
#include "schedule/algorithms/common.h"

namespace pycomm::schedule {
namespace {

struct Cube {
  int base, size;
  bool holds(int rank) const { return base <= rank && rank < base + size; }
};

std::vector<Cube> cut_into_cubes(int n) {
  std::vector<Cube> cubes;
  for (int base = 0; base < n; base += cubes.back().size)
    cubes.push_back({base, static_cast<int>(std::bit_floor(static_cast<unsigned>(n - base)))});
  return cubes;
}

// A part of the data, in units: there are as many as the largest cube has ranks.
struct Part {
  int first, last;
};

// What a rank answers for after the steps at distances below d. At each, a rank whose bit is set keeps the
// upper half.
Part part_of(int rank, int units, int d) {
  Part part{0, units};
  for (int bit = 1; bit < d; bit *= 2) {
    const int middle = (part.first + part.last) / 2;
    ((rank & bit) == 0 ? part.last : part.first) = middle;
  }
  return part;
}

void reduce_scatter(Builder& b, const std::vector<Cube>& cubes) {
  const int rank = b.rank(), units = cubes[0].size;
  size_t k = 0;
  while (!cubes[k].holds(rank)) ++k;
  const int size = cubes[k].size;
  const bool last = k + 1 == cubes.size();
  const auto chunk = [&](int owner, int d) {
    const Part part = part_of(owner, units, d);
    return Chunk{0, part.first, part.last, units};
  };
  // Within the cube.
  for (int d = 1; d < size; d *= 2) {
    const Buffer sums = d == 1 ? Buffer::in : Buffer::scratch;
    const int partner = rank ^ d, lower = std::min(rank, partner), upper = std::max(rank, partner);
    const Chunk part = chunk(rank, 2 * d);
    b.offer(partner, {rank, sums, chunk(partner, 2 * d)});
    const bool finished = last && 2 * d == units;
    b.combine({finished ? b.out(part) : b.scratch(part)}, {{lower, sums, part}, {upper, sums, part}},
              finished);
  }
  // From the next smaller cube, whose sums are in scratch, or in `in` where it is a single rank.
  const auto sums_of = [](int member, int cube_size, Chunk part) {
    return Ref{member, cube_size == 1 ? Buffer::in : Buffer::scratch, part};
  };
  if (!last) {
    const Cube smaller = cubes[k + 1];
    const Chunk part = chunk(rank, size);
    const Ref theirs = sums_of(smaller.base + rank % smaller.size, smaller.size, part);
    b.combine({k == 0 ? b.out(part) : b.scratch(part)}, {sums_of(rank, size, part), theirs},
              /*final=*/k == 0);
  }
  // To the next larger one, which has cut the data finer.
  if (k > 0) {
    const Cube larger = cubes[k - 1];
    for (int peer = larger.base + rank % size; larger.holds(peer); peer += size)
      b.offer(peer, sums_of(rank, size, chunk(peer, larger.size)));
  }
}

// Within the largest cube. A rank beyond it follows the rank `units` places before, which shows it every
// unit.
void all_gather(Builder& b, int n, int units) {
  const bool follows = b.rank() >= units;
  const int rank = b.rank() % units, follower = rank + units;
  const auto unit = [units](int i) { return Chunk{0, i, i + 1, units}; };
  const auto pass_on = [&](int giver, int i) {
    if (follows)
      b.copy(b.out(unit(i)), Builder::out_of(rank, unit(i)));
    else if (giver != rank)
      b.copy(b.out(unit(i)), Builder::out_of(giver, unit(i)));
    if (!follows && follower < n) b.offer(follower, b.out(unit(i)));
  };
  pass_on(rank, part_of(rank, units, units).first);
  for (int d = units / 2; d >= 1; d /= 2) {
    const int partner = rank ^ d;
    const Part mine = part_of(rank, units, 2 * d), theirs = part_of(partner, units, 2 * d);
    for (int i = mine.first; i < mine.last && !follows; ++i) b.offer(partner, b.out(unit(i)));
    for (int i = theirs.first; i < theirs.last; ++i) pass_on(partner, i);
  }
}

}  // namespace

Schedule halving_doubling(const World& world) {
  const int n = world.size;
  if (n == 1) return alone(world);
  const std::vector<Cube> cubes = cut_into_cubes(n);
  Schedule schedule;
  for (int rank = 0; rank < n; ++rank) {
    Builder b(schedule, rank);
    reduce_scatter(b, cubes);
    all_gather(b, n, cubes[0].size);
  }
  accept_all(schedule);
  return schedule;
}

}  // namespace pycomm::schedule
