// Gradient codecs: the formats of their elements, and the kernels that encode, decode and add them.
// common/codec.h defines the layout of the bytes on the wire.
//
//   codec               block  scale      element
//   fp16, bf16              -  -          2 bytes; NaN and Inf pass; overflow gives the largest finite
//   fp8_e4m3, fp8_e5m2    256  float32    1 byte: x / s, s = amax / 448 (57344)
//   mxfp8                  32  E8M0       1 byte of e4m3: OCP Microscaling Formats v1.0,
//                                         s = 2^(floor(log2 amax) - 8), or the least power of two with
//                                         amax / s <= 448 (`ceil_scale`)
//   int8, int4        128, 32  bfloat16   1 byte, 4 bits (two's complement): round(x / s), |q| <= 127 (7),
//                                         s = amax / 127 (7) rounded up, so that nothing clips
//   sign                  128  float32    1 bit (set: negative): the sign times the mean magnitude;
//                                         sign(0) = +
//
// * All arithmetic is float32, in arithmetic/codecs.h: same bits on every instruction set and on the GPU.
//   x / s is x * (1 / s), both operations rounded; amax / 448 and the like are one division.
// * Encoding saturates, and no finite value decodes to Inf: a scale is at most the largest one of its format
//   with which the largest code decodes to a finite value (448 s, 127 s, ...).
// * A block with a NaN or Inf decodes to NaN (canonical) in all its elements: its scale is NaN (E8M0: 255),
//   its elements' bits are zero. fp16 and bf16 pass NaN and Inf.
// * A block whose scale would be zero or denormal decodes to +0 in all its elements: all its bits are zero.
// * int4 with `hadamard`: y = H x / 32 is encoded in x's place and x = H y, H being the Hadamard matrix of
//   32 rows, entries +-1, in Sylvester's order.
// * A segment (one tensor of a bucket) starts at a multiple of kSegmentAlign, hence of every block. Elements
//   between the end of a segment and the start of the next count as zero, and sign's mean leaves them out; so
//   it is with elements after the end of the data.
// * Stochastic rounding takes q + 1 with probability x/s - q, resolved to 8 bits (bf16: 16) with half a bit
//   added, so that it is unbiased and keeps representable values: floor(x/s + (2 r + 1) / 2^9). A float is
//   rounded by its magnitude, in units of its last place; an integer with its sign. The sum is exact. The
//   bits r come from Philox (arithmetic/philox.h): key = seed, counter = step, turn, rank, element.
// * Error feedback: v = x + k e is encoded in x's place, and e' = (v - decode(encode(v))) / k is kept for
//   each element; a block that is not finite keeps e. Between segments e' is 0. k is residual_scale. e and e'
//   may be the same buffer; give both or neither.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "common/codec.h"
#include "common/dtype.h"
#include "common/format.h"
#include "kernels/isa.h"

namespace pycomm::kernels {

// One tensor of the data: elements [begin, end). Lists of segments are sorted; decoding ignores them.
struct Segment {
  int64_t begin, end;
  uint64_t id;  // below 2^24
};

// What an encode depends on besides the codec and the values.
struct Encoding {
  uint32_t step = 0;
  uint32_t turn = 0;  // distinguishes a rank's encodes of the same element
  uint32_t rank = 0;
  int64_t index = 0;                  // where the call's first element is in the data: a multiple of kTile
  std::span<const Segment> segments;  // empty: one tensor, id 0, as long as the data
  const float* residual = nullptr;    // e and e', from the first element on; null: no error feedback
  float* next_residual = nullptr;
  float residual_scale = 1;
};

// combine() with codecs. The sources are decoded or converted to float32 (raw ones are multiplied by
// `prescale`) and summed as the balanced tree over their order. The sum is then divided by `divisor` and
// rounded to dtype (Format::final), divided by `divisor` and encoded, once for all destinations
// (Format::wire), or stored as it is (Format::partial).
//
// Raw and final operands are float32, float16 or bfloat16; partial ones are float32. One wire source with
// wire destinations is a copy of wire_bytes(count). Every operand starts at a tile. A destination may alias a
// source only at the same address: final with raw, wire with wire.
struct TranscodeArgs {
  const Codec* codec;
  DType dtype;
  void* const* dsts;
  const void* const* srcs;
  const Format* src_formats;
  int num_dsts;
  int num_srcs;
  Format dst_format;
  bool stream = false;  // as in CombineArgs; destinations in wire form ignore it
  size_t count = 0;     // elements
  double prescale = 1.0;
  double divisor = 1.0;
  Encoding encoding;
  // If given, it is set to false when a value written as Format::final is NaN or Inf.
  bool* finite = nullptr;
};
void transcode(const TranscodeArgs& args, const Isa& isa = chosen_isa());

// x = x + residual_scale * residual, rounded once to dtype; next_residual keeps what rounding lost. For
// elements whose residual no encode adds. Returns whether all of x is finite afterwards.
bool add_residual(DType dtype, void* x, size_t count, const float* residual, float* next_residual,
                  float residual_scale, const Isa& isa = chosen_isa());

// ---- shared_int: integers that ranks add exactly, since they share each block's scale ----
//
// Blocks have 128 elements. First the largest magnitude `amax` of each block over all ranks is found. Then
// each element becomes q = floor(x / s + (2 r + 1) / 2^9), an integer of `width` bits (8, 16, 32), with s =
// amax / q_max, at least 2^-126, and |q| <= q_max, so that the sum of `world` of them never overflows. If
// float32 cannot represent q_max, the next smaller float32 takes its place.
inline constexpr int64_t kSharedBlock = 128;
int64_t shared_limit(int width, int world);  // q_max; throws ValueError below 7
// amax[b] is the largest magnitude of block b, or NaN if the block is not finite.
void shared_amax(DType dtype, const void* x, size_t count, float* amax, const Encoding& encoding,
                 const Isa& isa = chosen_isa());
// dtype -> integers. A block that is not finite, or whose amax is zero or denormal, becomes zeros.
void shared_encode(DType dtype, const void* x, size_t count, const float* amax, int width, int64_t limit,
                   uint64_t seed, const Encoding& encoding, void* q, const Isa& isa = chosen_isa());
// Sums of integers -> dtype: q * s, divided by `divisor`; NaN where amax is not finite.
void shared_decode(const void* q, size_t count, const float* amax, int width, int64_t limit, double divisor,
                   DType dtype, void* x, const Isa& isa = chosen_isa());

}  // namespace pycomm::kernels
