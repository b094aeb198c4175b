// pairwise all_to_all: rounds of disjoint pairs, each of which swaps its two blocks; every pair meets once.
//
// Cost: n - 1 rounds (n where n is odd: one rank rests in each); each rank moves (n-1)/n of the data in and
// out, the least possible, and speaks to one peer at a time. The choice for large blocks, since no rank is
// read by many at once. Blocks are shown as copies, so that `out` may be `in`.
//
// Thakur, Rabenseifner and Gropp, Optimization of collective communication operations in MPICH, IJHPCA 19(1),
// 2005; the rounds are those of the circle method for tournaments, so that partners are mutual for every n.
#include "schedule/algorithms/all.h"
#include "schedule/algorithms/common.h"

namespace pycomm::schedule {
namespace {

// Ranks p and q below the odd number `circle` meet in round (p + q) mod circle. If n is even, the last rank
// meets the rank that would meet itself; if n is odd, that rank rests.
int partner_of(int rank, int round, int n) {
  const int circle = n % 2 == 0 ? n - 1 : n;
  if (rank == circle) return round * (circle + 1) / 2 % circle;
  const int partner = (round + circle - rank) % circle;
  return partner == rank && circle < n ? circle : partner;
}

}  // namespace

Schedule pairwise(const World& world) {
  const int n = world.size;
  if (n == 1) return alone(world);
  Schedule schedule;
  const int rounds = n % 2 == 0 ? n - 1 : n;
  for (int rank = 0; rank < n; ++rank) {
    Builder b(schedule, rank);
    for (int round = 0; round < rounds; ++round) {
      const int partner = partner_of(rank, round, n);
      if (partner == rank) continue;
      b.copy(b.image({partner}), b.in({partner}));
      b.offer(partner, b.image({partner}));
      b.copy(b.out({partner}), Builder::image_of(partner, {rank}));
    }
    b.copy(b.out({rank}), b.in({rank}));
  }
  accept_all(schedule);
  return schedule;
}

}  // namespace pycomm::schedule
