// direct, for every collective but all_reduce and barrier: every rank shows what others need of its `in`, and
// reads what it needs itself, all at once, in one pass.
//
// Cost: 1 step whatever n is; every byte crosses once. What a rank moves follows from the collective: (n-1)/n
// of the data for all_gather, reduce_scatter and all_to_all, all of it for broadcast, n-fold at the root for
// reduce. The choice on a node, whose shared memory carries n - 1 readers well. Sums are taken in one pass in
// the order of ranks: the balanced tree.
//
// Thakur, Rabenseifner and Gropp, Optimization of collective communication operations in MPICH, IJHPCA 19(1),
// 2005.
#include "schedule/algorithms/all.h"
#include "schedule/algorithms/common.h"

namespace pycomm::schedule {
namespace {

// A chunk of a rank's `out`, and the chunks of `in` that it is made of.
struct Need {
  Chunk dst;
  std::vector<Ref> srcs;
};

// The collective's definition. A rank's list begins with itself and goes on with the next rank, so that not
// all ranks read the same one at once.
std::vector<Need> needs_of(const World& world, int rank) {
  const int n = world.size;
  std::vector<Need> needs;
  const auto sum = [&](Chunk chunk) {
    needs.push_back({chunk, {}});
    for (int peer = 0; peer < n; ++peer) needs.back().srcs.push_back(Builder::in_of(peer, chunk));
  };
  switch (world.collective) {
    case Collective::reduce_scatter:
      sum({rank});
      break;
    case Collective::reduce:
      if (rank == world.root) sum({});
      break;
    case Collective::broadcast:
      needs.push_back({{}, {Builder::in_of(world.root)}});
      break;
    case Collective::scatter:
      needs.push_back({{rank}, {Builder::in_of(world.root, {rank})}});
      break;
    case Collective::gather:
      if (rank != world.root) break;
      [[fallthrough]];
    case Collective::all_gather:
      for (int step = 0; step < n; ++step) {
        const int peer = (rank + step) % n;
        needs.push_back({{peer}, {Builder::in_of(peer, {peer})}});
      }
      break;
    case Collective::all_to_all:
      // Blocks are shown as copies, so that `out` may be `in`.
      for (int step = 0; step < n; ++step) {
        const int peer = (rank + step) % n;
        needs.push_back({{peer}, {{peer, peer == rank ? Buffer::in : Buffer::image, {rank}}}});
      }
      break;
    case Collective::send_recv:
      if (rank == world.peer) needs.push_back({{}, {Builder::in_of(world.root)}});
      break;
    case Collective::all_reduce:
    case Collective::barrier:
      break;
  }
  return needs;
}

}  // namespace

Schedule direct(const World& world) {
  const int n = world.size;
  const bool sums = world.collective == Collective::reduce_scatter || world.collective == Collective::reduce;
  std::vector<std::vector<Need>> needs;
  for (int rank = 0; rank < n; ++rank) needs.push_back(needs_of(world, rank));
  Schedule schedule;
  for (int rank = 0; rank < n; ++rank) {
    Builder b(schedule, rank);
    for (int step = 1; step < n; ++step) {
      const int peer = (rank + step) % n;
      for (const Need& need : needs[peer]) {
        for (const Ref& src : need.srcs) {
          if (src.rank != rank) continue;
          if (src.buffer == Buffer::image) b.copy(src, b.in(src.chunk));
          b.offer(peer, src);
        }
      }
    }
    for (const Need& need : needs[rank]) b.combine({b.out(need.dst)}, need.srcs, /*final=*/sums);
  }
  accept_all(schedule);
  return schedule;
}

}  // namespace pycomm::schedule
