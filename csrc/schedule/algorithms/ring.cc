// ring all_reduce, reduce_scatter, all_gather: the data is cut into n pieces that travel around the ring of
// ranks, first collecting a term at every rank, then carrying the finished sum to every rank. Reduce-scatter
// is the first round, all-gather the second, all-reduce both.
//
// Cost: n - 1 steps a round; each rank moves (n-1)/n of the data per round, the least possible, and speaks to
// two neighbours only. The choice for large data on a fabric whose links are neighbours.
//
// Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, JPDC 69(2), 2009.
#include "schedule/algorithms/all.h"
#include "schedule/algorithms/common.h"

namespace pycomm::schedule {
namespace {

// The sum of piece `rank` ends in this rank's `out`. A piece starts at the rank after its owner.
template <typename Piece>
void reduce_round(Builder& b, int n, Piece piece) {
  const int rank = b.rank(), left = (rank + n - 1) % n, right = (rank + 1) % n;
  b.offer(right, b.in(piece(left)));
  for (int step = 1; step < n; ++step) {
    const Chunk chunk = piece((rank + n - 1 - step) % n);
    const Ref sum = step == 1 ? Builder::in_of(left, chunk) : Builder::scratch_of(left, chunk);
    if (step == n - 1) {
      b.combine({b.out(chunk)}, {sum, b.in(chunk)}, /*final=*/true);
    } else {
      b.combine({b.scratch(chunk)}, {sum, b.in(chunk)});
      b.offer(right, b.scratch(chunk));
    }
  }
}

// Every rank starts with its own piece in `source` and ends with all pieces in `out`.
template <typename Piece>
void gather_round(Builder& b, int n, Piece piece, Buffer source) {
  const int rank = b.rank(), left = (rank + n - 1) % n, right = (rank + 1) % n;
  b.offer(right, {rank, source, piece(rank)});
  if (source != Buffer::out) b.copy(b.out(piece(rank)), {rank, source, piece(rank)});
  for (int step = 1; step < n; ++step) {
    const Chunk chunk = piece((rank + n - step) % n);
    b.copy(b.out(chunk), {left, step == 1 ? source : Buffer::out, chunk});
    if (step < n - 1) b.offer(right, b.out(chunk));
  }
}

}  // namespace

Schedule ring(const World& world) {
  const int n = world.size;
  if (n == 1) return alone(world);
  Schedule schedule;
  const bool one_block = world.collective == Collective::all_reduce;
  const auto piece = [&](int owner) { return one_block ? Chunk{0, owner, owner + 1, n} : Chunk{owner}; };
  for (int rank = 0; rank < n; ++rank) {
    Builder b(schedule, rank);
    if (world.collective != Collective::all_gather) reduce_round(b, n, piece);
    if (world.collective != Collective::reduce_scatter)
      gather_round(b, n, piece, one_block ? Buffer::out : Buffer::in);
  }
  accept_all(schedule);
  return schedule;
}

}  // namespace pycomm::schedule
