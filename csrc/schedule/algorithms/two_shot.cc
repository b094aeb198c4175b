// two_shot all_reduce and reduce: every rank owns one n-th of the data, sums it over all ranks in one pass,
// and writes the result to all of them (reduce: to the root).
//
// Cost: 2 synchronisations whatever n is; each rank moves (n-1)/n of the data in and out, the least possible.
// The n - 1 peers are read at once, which a node's shared memory carries well and a network less so. It is
// the direct reduce-scatter + all-gather of Rabenseifner (2004) with all exchanges made concurrent.
#include "schedule/algorithms/all.h"

namespace pycomm::schedule {

Schedule two_shot(const World& world) {
  Schedule schedule;
  const int n = world.size;
  const auto has_out = [&](int rank) {
    return world.collective == Collective::all_reduce || rank == world.root;
  };
  for (int rank = 0; rank < n; ++rank) {
    Builder b(schedule, rank);
    auto chunk = [n](int owner) { return Chunk{0, owner, owner + 1, n}; };
    for (int step = 1; step < n; ++step) {
      const int peer = (rank + step) % n;
      b.offer(peer, b.in(chunk(peer)));
      if (has_out(rank)) b.offer(peer, b.out(chunk(peer)));
    }
    std::vector<Ref> dsts, srcs;
    for (int peer = 0; peer < n; ++peer) {
      const int to = (rank + peer) % n;  // its own first
      if (has_out(to)) dsts.push_back(b.out_of(to, chunk(rank)));
      srcs.push_back(b.in_of(peer, chunk(rank)));
    }
    b.combine(dsts, srcs, /*final=*/true);
    for (int step = 1; step < n; ++step) {
      const int peer = (rank + step) % n;
      b.accept(peer, b.in(chunk(peer)));
      if (has_out(rank)) b.accept(peer, b.out(chunk(peer)));
    }
  }
  return schedule;
}

}  // namespace pycomm::schedule
