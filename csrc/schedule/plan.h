// A plan: a schedule lowered for one kind of call. It is what the verifier proves and what the executor
// runs.
//
// Each rank has a program of steps over operands, which are byte ranges:
//
//   combine   kernels/combine.h over operands
//   signal    store (call, value of this trip) into this rank's cell at `peer`, release: whoever waits for it
//             sees everything before it
//   wait      until `peer`'s cell here has reached (call, value of this trip), acquire
//   send      begin to send an operand of this rank's memory to `peer`; does not wait
//   recv      wait for the next message of a channel from `peer`, and receive it into an operand of this
//             rank's memory
//   complete  wait until the first (value of this trip) of this call's sends on a channel have been received,
//             so that their memory may be written again
//
// Ranks of one node signal each other; ranks of different nodes send. A *channel* (sender, receiver, index)
// delivers in the order of its sends. Nothing is buffered: data stays in the sender's memory until it is
// received. A rank may leave the call before that, but enters call c only when all that it has sent in call
// c - 2 has been received. The index encodes the sender's and the receiver's stage, so that both count trips
// alike.
//
// A cell has one writer and one reader and only grows: cell (reader, writer, index) belongs to a pair of
// ranks, and index is the stage of the steps that use it. The value for trip w is value + w * per_trip; a
// wait whose value is not positive passes at once (the first trips have nothing to wait for). Within a
// call, values of a cell start at 1.
//
// Memory. `in` and `out` are the caller's buffers. Another rank's are named only if that rank is on the same
// node and they are symmetric or told, or if `in` is reachable: then only as the one source of a combine that
// copies it, bit for bit, to the rank's own `out` and nowhere else. `window` is the rank's slice of shared
// memory: of its current bank, slot (w mod slots). The address of an operand at trip w is
//
//   in, out:  base[space][rank] + offset + w * stride          (in place: the two bases are equal)
//   window:   base[window][rank] + bank + (w mod slots) * slot_bytes + offset
//
// A cell has room for a little data beside its word, so that whoever waits for the word has the data in the
// same cache line. `outgoing`, a destination, is the data of the cells that this rank writes at `rank`;
// `incoming`, a source, that of the cells that `rank` writes here. Cells belong to the bank as well.
//
//   outgoing, incoming:  base[space][rank] + offset; cell i's data is [i * kCellBytes, + kPayloadBytes)
//
// A call with a codec (kernels/codec.h). Windows hold wire form and the caller's buffers do not: combines
// between the two encode and decode. Windows hold whole tiles; every operand starts at a tile's begin, and a
// wire operand of `count` elements takes the bytes of whole tiles, even if the last tile is short. All
// buffers are plain. With a codec on message links only, what a rank sends and receives is in wire form, in
// memory that no other rank touches; everything else is as without a codec.
//
// Calls on a group are numbered. Call c uses bank c mod 2, and no rank enters c before all ranks of its node
// have entered c - 1. After a plan with `full_exchange` (each rank has heard, directly or through others,
// from every other rank of its node) a rank knows that already; else the executor waits for the entries. What
// ranks tell each other before a call (Call::told) says that they have come to it, not that they have entered
// it. No rank of another node touches a rank's windows.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/codec.h"
#include "common/dtype.h"
#include "common/format.h"
#include "common/hash.h"
#include "schedule/schedule.h"

namespace pycomm::schedule {

inline constexpr int kCellBytes = 64, kPayloadBytes = 48;
inline constexpr int kSignalBits = 24;  // of a signal's value in a call

enum class Space : uint8_t { in, out, window, outgoing, incoming };
// What peers can do with a caller's buffer.
enum class Placement : uint8_t {
  plain,      // nothing
  symmetric,  // read and write it like their own: it lies at the same offset on every rank
  reachable,  // `in` only: copy it, bit for bit, through the operating system's kernel
  told,  // read and write it like their own, at the address that its rank tells them right before the call
};
// Whether peers use it like their own.
constexpr bool in_reach(Placement placement) {
  return placement == Placement::symmetric || placement == Placement::told;
}

struct Operand {
  Space space = Space::in;
  Format format = Format::raw;
  int32_t rank = 0;
  int64_t offset = 0;  // bytes
  int64_t stride = 0;  // in, out: bytes from one trip to the next
};

struct Step {
  enum class Kind : uint8_t { combine, signal, wait, send, recv, complete };
  Kind kind = Kind::combine;
  uint8_t stage = 0;
  uint8_t cell = 0;     // signal, wait: the index in the pair; send, recv, complete: that of the channel
  bool stream = false;  // combine: non-temporal stores
  Format dst_format = Format::raw;
  int32_t num_dsts = 0, num_srcs = 0;  // send: one source; recv: one destination
  int32_t operand = 0;                 // first of num_dsts then num_srcs entries of Program::operands
  int32_t peer = -1;                   // all but combine
  int64_t value = 0, per_trip = 0;     // signal, wait, complete
  int64_t count = 0;                   // combine, send, recv: elements
  int32_t transcode = -1;              // combine with wire operands: its entry of Program::transcodes
};

// What a combine with wire operands needs besides; kernels::transcode() runs it, in place of combine().
struct Transcode {
  bool divides = false;  // by Plan::divisor: the result is finished
  // The rest is for encodes. All encodes that a rank makes of one element differ in `turn`.
  uint8_t turn = 0;
  int64_t index = 0;    // kernels::Encoding::index at trip 0: see data_index() in layout.h
  int64_t element = 0;  // the element of the rank's `in` at trip 0, which says where its residual is
  int64_t stride = 0;   // what both grow by from one trip to the next
};

// Iterations i of [first, first + trips + stages - 1). In each, a step of stage s works on trip i - s, if
// that lies in [first, first + trips). The last loops of a program run the trips that are shorter (the tail).
struct Loop {
  int64_t first = 0, trips = 1;
  int32_t step = 0, num_steps = 0;  // range of Program::steps
  int32_t stages = 1;
};

struct Program {
  std::vector<Operand> operands;
  std::vector<Step> steps;
  std::vector<Loop> loops;
  std::vector<Transcode> transcodes;
};

// What is called. A plan depends on this, on its algorithm and on the geometry alone.
struct Call {
  World world;  // collective, size, root, peer
  DType dtype = DType::float32;
  Op op = Op::sum;
  // Elements. all_reduce, broadcast, reduce, send_recv: {count}. all_gather, reduce_scatter, gather,
  // scatter: one entry a block. all_to_all: n * n, row-major, from row to column. barrier: {0}.
  std::vector<int64_t> counts;
  Placement in = Placement::plain, out = Placement::plain;
  bool in_place = false;  // out is in (for all_gather, gather: in is out's own block; reduce_scatter,
                          // scatter: out is in's own block; all_to_all: out is in)
  double prescale = 1.0;  // premul_sum
  bool deterministic = false;
  // all_to_all with a count for each pair: a rank knows its own row and column alone, the rest may hold
  // anything.
  bool ragged = false;
  // Only for collectives that take one, and floats. A plan does not depend on its seed.
  Codec codec;
  // Whether anything is encoded: on one node there are no message links to encode on.
  bool coded() const {
    return codec.kind != CodecKind::none && (codec.links == Links::all || !world.nodes.empty());
  }
  bool coded_on(Links links) const { return coded() && codec.links == links; }
  // Whether ranks have told each other where buffers lie. They do so right before the call, all to all; so
  // a rank that begins knows that all have come to the call, and that their callers have left them the buffers.
  bool told() const { return in == Placement::told || out == Placement::told; }
  bool operator==(const Call&) const = default;
};

// Adds every field of the call: the cache's hash of a call and the fingerprint that ranks compare derive
// from it.
void add(Hasher& hasher, const Call& call);

// The element types that codecs take.
bool takes_codec(DType dtype);

// Where a plan may run.
struct Geometry {
  int64_t bank_bytes = 0;            // window bytes of one rank in one bank
  int64_t trip_bytes = 256 << 10;    // of one block, the most that goes through a window slot in a trip
  int64_t stream_bytes = INT64_MAX;  // outputs of at least this many bytes are stored past the cache
  int max_cells = 4;                 // cells a pair has
  int payload_bytes = 0;             // that a cell carries, kPayloadBytes at most
};

struct Plan {
  Call call;
  std::string algorithm;
  std::vector<Program> programs;  // one per rank
  int32_t cells = 1;              // indices used per pair
  int32_t channels = 0;           // the same for messages
  int32_t slots = 1;
  int64_t slot_bytes = 0, bank_bytes = 0;
  double prescale = 1.0, divisor = 1.0;  // of premul_sum and avg: factors_of(call)
  bool full_exchange = false;
  bool encodes_once = false;  // no rank encodes an element twice: one residual for each holds its error
  // Hash of all that ranks must agree on (not of in_place, nor of the counts when they differ by rank).
  uint64_t fingerprint = 0;
};

// What elements are multiplied by as they are read, and what finished sums are divided by. With a codec an
// average is not scaled beforehand, since codecs have a range of their own.
Average factors_of(const Call& call);

// In words, for people and tests: "rank 0 step 3: combine out[0:512] window@1[0:512] <- in[0:512]
// window@1[0:512]".
std::string describe(const Plan& plan, int rank, const Step& step);
// All steps of a rank, loop by loop, after a few lines that say how to read them.
std::string describe(const Plan& plan, int rank);

// Whether the combine encodes. (From one wire source to wire destinations it copies.)
bool encodes(const Program& program, const Step& step);
// Bytes of an operand of `count` elements; in wire form, those of whole tiles.
int64_t operand_bytes(const Call& call, Format format, int64_t count);

// Elements of the caller's buffers for this call on one rank.
int64_t in_elements(const Call& call, int rank);
int64_t out_elements(const Call& call, int rank);

}  // namespace pycomm::schedule
