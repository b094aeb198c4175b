// A schedule: what each rank does in a collective, with the meaning of message passing.
//
// Words. A *block* is a rank's share of a collective's data: all_reduce, reduce and broadcast have one block,
// the others one per rank. A *chunk* is a fraction of a block. Four named *buffers* hold chunks:
//
//   in       the caller's input. all_reduce, reduce, broadcast: block 0. all_gather, gather: rank r's `in` is
//            block r alone. reduce_scatter, scatter, all_to_all: all n blocks (all_to_all: block p goes to
//            rank p).
//   out      the caller's output. all_reduce, broadcast, reduce: block 0. all_gather, gather: n blocks.
//            reduce_scatter, scatter: block r alone. all_to_all: n blocks (block q came from rank q). In
//            place, `out` may be `in` itself: never write an `out` chunk while its `in` chunk is still
//            needed.
//   image    the library's own memory in the caller's dtype, as large as the whole data and readable by
//            peers: copies of `in`, or finished results. It may have further blocks, where all blocks are
//            equally long.
//   scratch  the same in the accumulator's type: partial results.
//
// Steps, in each rank's program order:
//
//   combine(dsts, srcs, final)  dst = srcs[0] op srcs[1] ... once over the data. One source: a copy. Any
//                               source and any destination may belong to another rank if that rank has
//                               offered it. `final` says that the result is finished (rounded; divided for
//                               avg) and goes to `out` or `image`. Without it, one source and a destination
//                               that is not scratch is a copy bit for bit, and anything else gives a partial
//                               result, in scratch.
//   offer(peer, ref)            from now until the accept the peer may read or write my `ref`; I may not
//                               write it (nor read it, if the peer writes).
//   accept(peer, ref)           waits until the peer has finished with my `ref`; its writes have landed.
//
// Each offer has one later accept with the same peer and ref, and is used by exactly one combine of that
// peer; the k-th offer of a ref to a peer meets that peer's k-th combine that names it. One combine may use
// several offers. An accept of a chunk that the peer only reads says no more than "before the collective
// ends": the accept may stand right after the offer or at the end, and costs nothing when the chunk lies in
// the library's memory.
//
// A schedule runs once per *trip*: lower() cuts the data into trips that fit the window, and chunks are
// fractions of each trip's data. `stage` pipelines trips: in iteration i a step of stage s works on trip i -
// s, so that a tree's downward phase of trip i - s runs beside the upward phase of trip i. A rank's steps are
// executed in program order within an iteration, whatever their stage.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "schedule/collective.h"

namespace pycomm::schedule {

enum class Buffer : uint8_t { in, out, image, scratch };
const char* name(Buffer buffer);

// Elements [len * first / of, len * last / of) of a block of len elements (rounded to cache lines by lower).
struct Chunk {
  int block = 0;
  int first = 0, last = 1, of = 1;
  bool operator==(const Chunk&) const = default;
};

struct Ref {
  int rank = 0;
  Buffer buffer = Buffer::in;
  Chunk chunk;
  bool operator==(const Ref&) const = default;
};

struct ScheduleStep {
  enum class Kind : uint8_t { combine, offer, accept };
  Kind kind;
  int stage = 0;
  bool final = false;           // combine
  int peer = -1;                // offer, accept
  std::vector<Ref> dsts, srcs;  // combine; offer and accept hold their one ref in srcs[0]
};

// What an algorithm writes a schedule for.
struct World {
  Collective collective = Collective::all_reduce;
  int size = 1;
  int root = 0;  // broadcast, reduce, gather, scatter; send_recv: the sender
  int peer = 0;  // send_recv: the receiver
  // The node of each rank: two ranks of one node have a mapped link, others a message link. Empty: one node.
  std::vector<int> nodes;
  bool mapped(int a, int b) const { return nodes.empty() || nodes[a] == nodes[b]; }
  const Traits& traits() const { return schedule::traits(collective); }
  // Whether the rank has this buffer.
  bool has(const Content& side, int rank) const {
    return side.on == Content::On::all || rank == (side.on == Content::On::root ? root : peer);
  }
  bool operator==(const World&) const = default;
};

struct Schedule {
  std::vector<std::vector<ScheduleStep>> ranks;  // one program per rank
  int stages = 1;                                // 1 + the largest stage used
  // How much data a trip should hold, in bytes of one block; pipelined algorithms want small trips. Windows
  // may force less. 0: as much as fits.
  int64_t trip_bytes = 0;
};

// Writes one rank's program. Algorithms use this and nothing else.
class Builder {
 public:
  Builder(Schedule& schedule, int rank);
  int rank() const { return rank_; }

  Ref in(Chunk chunk = {}) const { return {rank_, Buffer::in, chunk}; }
  Ref out(Chunk chunk = {}) const { return {rank_, Buffer::out, chunk}; }
  Ref image(Chunk chunk = {}) const { return {rank_, Buffer::image, chunk}; }
  Ref scratch(Chunk chunk = {}) const { return {rank_, Buffer::scratch, chunk}; }
  // The same buffers of another rank.
  static Ref in_of(int rank, Chunk chunk = {}) { return {rank, Buffer::in, chunk}; }
  static Ref out_of(int rank, Chunk chunk = {}) { return {rank, Buffer::out, chunk}; }
  static Ref image_of(int rank, Chunk chunk = {}) { return {rank, Buffer::image, chunk}; }
  static Ref scratch_of(int rank, Chunk chunk = {}) { return {rank, Buffer::scratch, chunk}; }

  void stage(int stage);  // of the steps that follow
  void combine(std::vector<Ref> dsts, std::vector<Ref> srcs, bool final = false);
  void copy(Ref dst, Ref src) { combine({dst}, {src}); }
  void offer(int peer, Ref ref);
  void accept(int peer, Ref ref);

 private:
  Schedule& schedule_;
  int rank_;
  int stage_ = 0;
};

}  // namespace pycomm::schedule
