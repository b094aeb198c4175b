// ring all_reduce, reduce_scatter, all_gather: the data is cut into n pieces that travel around the ring of
// ranks, first collecting a term at every rank, then carrying the finished sum to every rank.
// Reduce-scatter is the first round, all-gather the second, all-reduce both.
//
// Cost: n - 1 steps a round; each rank moves (n-1)/n of the data per round, the least possible, and speaks
// to two neighbours only, which are of its own node where there is one. The choice for large data on a
// fabric whose links are neighbours.
//
// Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, JPDC 69(2),
// 2009.
#include "schedule/algorithms/all.h"
#include "schedule/algorithms/common.h"

namespace pycomm::schedule {
namespace {

// The ring, and where a rank stands in it.
struct Place {
  const std::vector<int>& ring;
  int at;
  int size() const { return static_cast<int>(ring.size()); }
  // The rank so many places further round, or back.
  int ahead(int places) const { return ring[(at + places) % size()]; }
  int behind(int places) const { return ring[(at + size() - places) % size()]; }
};

// The sum of piece `rank` ends in this rank's `out`. A piece starts at the rank after its owner.
template <typename Piece>
void reduce_round(Builder& b, const Place& place, Piece piece) {
  const int n = place.size(), left = place.behind(1), right = place.ahead(1);
  b.offer(right, b.in(piece(left)));
  for (int step = 1; step < n; ++step) {
    const Chunk chunk = piece(place.behind((1 + step) % n));
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
void gather_round(Builder& b, const Place& place, Piece piece, Buffer source) {
  const int n = place.size(), rank = b.rank(), left = place.behind(1), right = place.ahead(1);
  b.offer(right, {rank, source, piece(rank)});
  if (source != Buffer::out) b.copy(b.out(piece(rank)), {rank, source, piece(rank)});
  for (int step = 1; step < n; ++step) {
    const Chunk chunk = piece(place.behind(step));
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
  const std::vector<int> ring = Nodes(world).in_order();
  schedule.ranks.resize(n);
  for (int at = 0; at < n; ++at) {
    Builder b(schedule, ring[at]);
    const Place place{ring, at};
    if (world.collective != Collective::all_gather) reduce_round(b, place, piece);
    if (world.collective != Collective::reduce_scatter)
      gather_round(b, place, piece, one_block ? Buffer::out : Buffer::in);
  }
  accept_all(schedule);
  return schedule;
}

}  // namespace pycomm::schedule
