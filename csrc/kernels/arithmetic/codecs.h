// The arithmetic of the codecs of codec.h, element by element and block by block. The caller finds a block's
// largest magnitude or mean.
//
// A codec with scales is a struct of
//   kBlock, kBits         elements that share a scale; bits of an element on the wire
//   Scale                 the scale as it lies on the wire
//   scale(amax)           from the bits of the block's largest magnitude: a NaN if they are a NaN's or Inf's,
//                         0 for a block of zeros
//   wide_scale(amax)      the same in 32 bits
//   value(scale)          the scale as a float32: a NaN, +0, or a normal number s
//   encode(x, s, random)  an element's bits, for s a number other than 0; else they are zero
//   round(t, random)      the same for t = x * inverse(s), for one element or a vector
//   decode(bits, s)       a NaN of any sign and payload if s is one: a store makes it canonical
#pragma once

#include <cstdint>

#include "kernels/arithmetic/codec_rounding.h"
#include "kernels/arithmetic/ops.h"
#include "kernels/arithmetic/small_float.h"

namespace pycomm::kernels::PYCOMM_ISA {

inline constexpr uint32_t kMinNormalBits = 0x00800000;

// The highest bit is set for zero and NaN, clear for a normal number above zero.
PYCOMM_INLINE uint32_t not_scale(float s) {
  return (as_bits(s) - kMinNormalBits) | (kFloatInf - 1 - as_bits(s));
}
PYCOMM_INLINE bool is_scale(float s) { return not_scale(s) >> 31 == 0; }

// The factor for the elements of a block, rounded: one division for a block, and the same bits on any
// hardware.
PYCOMM_INLINE float inverse(float s) { return 1.0f / s; }

// ---- without scales: NaN and Inf pass ----

// number() is encode() for values that are neither, for one element or a vector.

struct BFloat16Code {
  using Format = BFloat16;
  static constexpr int kBits = 16, kRandomBits = 16;

  template <bool kStochastic, class W>
  PYCOMM_INLINE static W number(W bits, W random) {
    const W magnitude = bits & 0x7fffffff;
    const W added = kStochastic ? random : (magnitude >> 16 & 1) + 0x7fff;
    return (bits >> 16 & 0x8000) | smaller<W>((magnitude + added) >> 16, fill<W>(0x7f7f));
  }
  template <bool kStochastic>
  PYCOMM_INLINE static uint16_t encode(float x, uint32_t random) {
    const uint32_t magnitude = magnitude_of(x), sign = as_bits(x) >> 16 & 0x8000;
    const uint32_t special = if_less(kFloatInf, magnitude, kFloatNan >> 16, sign | kFloatInf >> 16);
    return static_cast<uint16_t>(
        if_less(magnitude, kFloatInf, number<kStochastic>(as_bits(x), random), special));
  }
  PYCOMM_INLINE static float decode(uint16_t bits) { return BFloat16::decode(bits); }
};

struct Float16Code {
  using Format = Float16;
  static constexpr int kBits = 16, kRandomBits = 8;
  using Rounded = SaturatingFloat<Float16, 0x7bff>;

  template <bool kStochastic, class W>
  PYCOMM_INLINE static W number(W bits, W random) {
    return kStochastic ? Rounded::stochastic(bits, random) : Rounded::nearest(bits);
  }
  template <bool kStochastic>
  PYCOMM_INLINE static uint16_t encode(float x, uint32_t random) {
    const uint32_t magnitude = magnitude_of(x), sign = as_bits(x) >> 16 & 0x8000;
    const uint32_t special = if_less(kFloatInf, magnitude, 0x7e00, sign | 0x7c00);
    return static_cast<uint16_t>(
        if_less(magnitude, kFloatInf, number<kStochastic>(as_bits(x), random), special));
  }
  PYCOMM_INLINE static float decode(uint16_t bits) { return Float16::decode(bits); }
};

// ---- with scales ----

// The scale, limited to `largest`, or 0 if it is denormal; all as bits of a float32.
PYCOMM_INLINE uint32_t held(uint32_t scale, uint32_t largest) {
  return if_less(scale, kMinNormalBits, 0, if_less(scale, largest, scale, largest));
}

// Elements that are 8-bit floats.
template <class F, uint32_t kLargest>
struct FloatElement {
  static constexpr int kBits = 8;
  using Format = F;
  using Rounded = SaturatingFloat<F, kLargest>;

  template <bool kStochastic>
  PYCOMM_INLINE static uint32_t encode(float x, float s, uint32_t random) {
    return round<kStochastic>(x * inverse(s), random);
  }
  template <bool kStochastic, class W>
  PYCOMM_INLINE static W round(Float<W> t, W random) {
    const W bits = Lane<W>::to_bits(t);
    return kStochastic ? Rounded::stochastic(bits, random) : Rounded::nearest(bits);
  }
  PYCOMM_INLINE static float decode(uint32_t bits, float s) {
    return F::decode(static_cast<typename F::Raw>(bits)) * s;
  }
};

// A float32 scale: amax divided by the largest value of the element's format F. kHeld: the largest scale
// whose product with that value is finite.
template <class F, uint32_t kLargest, uint32_t kHeld>
struct ScaledFloat : FloatElement<F, kLargest> {
  static constexpr int kBlock = 256;
  using Scale = uint32_t;
  using typename FloatElement<F, kLargest>::Rounded;

  PYCOMM_INLINE static uint32_t wide_scale(uint32_t amax) {
    const uint32_t number = held(as_bits(as_float(amax) / as_float(Rounded::kMax)), kHeld);
    return if_less(amax, kFloatInf, number, kFloatNan);
  }
  PYCOMM_INLINE static Scale scale(uint32_t amax) { return static_cast<Scale>(wide_scale(amax)); }
  PYCOMM_INLINE static float value(uint32_t scale) { return as_float(scale); }
};
using Float8E4M3Code = ScaledFloat<Float8E4M3, 0x7e, 0x7b124924>;  // 448 * 0x1.249248p119 is finite
using Float8E5M2Code = ScaledFloat<Float8E5M2, 0x7b, 0x77924924>;

// OCP Microscaling Formats v1.0: float8_e4m3 with a power of two as the scale, whose biased exponent is on
// the wire; 255 is NaN. The exponent 0 would be a denormal scale, 2^-127; a block of zeros has it.
template <bool kCeil>
struct Mxfp8Code : FloatElement<Float8E4M3, 0x7e> {
  static constexpr int kBlock = 32;
  using Scale = uint8_t;

  PYCOMM_INLINE static uint32_t wide_scale(uint32_t amax) {
    // 448 = 1.75 * 2^8, so the power is that of amax less 8; with kCeil a fraction above 1.75 takes the next
    // one.
    const uint32_t above = kCeil ? 0x7fffff - 0x600000 : 0;
    const uint32_t exponent = (amax + above) >> 23;
    const uint32_t power = if_less(exponent, 8, 0, exponent - 8);
    const uint32_t number = if_less(power, 254 - 8, power, 254 - 8);  // 448 * 2^119 is finite
    return if_less(amax, kFloatInf, number, 255);
  }
  PYCOMM_INLINE static Scale scale(uint32_t amax) { return static_cast<Scale>(wide_scale(amax)); }
  PYCOMM_INLINE static float value(uint32_t scale) {
    return as_float(if_less(scale, 255, scale << 23, kFloatNan));
  }
};

// Two's complement integers with a bfloat16 scale: amax / kLimit rounded up.
template <int kBlockSize, int kBitsOfElement, int kLargestInteger, uint32_t kHeld>
struct IntegerCode {
  static constexpr int kBlock = kBlockSize, kBits = kBitsOfElement, kLimit = kLargestInteger;
  using Scale = uint16_t;

  PYCOMM_INLINE static uint32_t wide_scale(uint32_t amax) {
    const uint32_t up = (as_bits(as_float(amax) / static_cast<float>(kLimit)) + 0xffff) & 0xffff0000;
    return if_less(amax, kFloatInf, held(up, kHeld), kFloatNan) >> 16;
  }
  PYCOMM_INLINE static Scale scale(uint32_t amax) { return static_cast<Scale>(wide_scale(amax)); }
  PYCOMM_INLINE static float value(uint32_t scale) { return as_float(scale << 16); }

  template <bool kStochastic>
  PYCOMM_INLINE static uint32_t encode(float x, float s, uint32_t random) {
    return round<kStochastic>(x * inverse(s), random);
  }
  template <bool kStochastic, class W>
  PYCOMM_INLINE static W round(Float<W> t, W random) {
    const Integer<W> q = kStochastic ? round_stochastic<W>(t, random) : round_even<W>(t);
    return __builtin_bit_cast(W, clamp<W>(q, kLimit)) & ((1u << kBits) - 1);
  }
  PYCOMM_INLINE static int32_t integer(uint32_t bits) {
    return static_cast<int32_t>(bits << (32 - kBits)) >> (32 - kBits);
  }
  PYCOMM_INLINE static float decode(uint32_t bits, float s) { return static_cast<float>(integer(bits)) * s; }
};
using Int8Code = IntegerCode<128, 8, 127, 0x7c010000>;  // 127 * 0x1.02p121 is finite
using Int4Code = IntegerCode<32, 4, 7, 0x7e120000>;     // 7 * 0x1.24p125 is finite

// A sign bit, with the block's mean magnitude as the scale. The mean is that of the `count` elements that the
// block has: magnitudes / kBlock, 0 for missing elements, are summed by halves - element i takes i + 64, then
// i + 32, ..., i + 1 - and divided by count / kBlock.
struct SignCode {
  static constexpr int kBlock = 128, kBits = 1;
  using Scale = uint32_t;

  PYCOMM_INLINE static float share(float x) { return as_float(magnitude_of(x)) * (1.0f / kBlock); }
  // amax is as for other codecs; it only shows NaN and Inf here.
  PYCOMM_INLINE static Scale scale(uint32_t amax, float sum, int32_t count) {
    const float mean = sum / (static_cast<float>(count > 0 ? count : 1) * (1.0f / kBlock));
    return if_less(amax, kFloatInf, held(as_bits(mean), kFloatMax), kFloatNan);
  }
  PYCOMM_INLINE static float value(uint32_t scale) { return as_float(scale); }
  // -0 counts as positive.
  PYCOMM_INLINE static uint32_t encode(float x) { return static_cast<uint32_t>(x < 0); }
  PYCOMM_INLINE static float decode(uint32_t bit, float s) { return as_float(as_bits(s) ^ bit << 31); }
};

// ---- int4 rotated ----
//
// y = H x / 32 is encoded, with H the Hadamard matrix of 32 rows, entries +-1. x = H y = (H q) s, with H q in
// integers. A product with H takes five steps of a + b and a - b, on elements i and i + 16, then i + 8, ...,
// i + 1.
struct Hadamard {
  static constexpr int kBlock = 32;
  PYCOMM_INLINE static float share(float x) { return x * (1.0f / kBlock); }
  // An overflow gives the largest finite value.
  PYCOMM_INLINE static float decode(int32_t sum, float s) {
    const float x = static_cast<float>(sum) * s;
    const uint32_t bits = as_bits(x);
    return as_float(bits - static_cast<uint32_t>((bits & 0x7fffffff) == kFloatInf));
  }
};

// ---- shared_int ----

// Integers of magnitude at most `limit`. The scale s is amax / limit, or the least normal number if that is
// larger, as it can be with a large limit. amax is NaN for a block that is not finite; a denormal amax counts
// as 0.
class SharedCode {
 public:
  PYCOMM_INLINE explicit SharedCode(int32_t limit) : limit_(static_cast<float>(limit)) {
    // The largest float32 that is not above the limit. Where the two differ, t has no fraction.
    if (limit_ > 2147483520.0f || static_cast<int32_t>(limit_) > limit)
      limit_ = as_float(as_bits(limit_) - 1);
  }
  PYCOMM_INLINE float scale(float amax) const { return as_float(scale_bits(amax)); }
  PYCOMM_INLINE int32_t encode(float x, float s, uint32_t random) const {
    const float t = x * inverse(s);
    const float y = as_float(if_less(magnitude_of(t), as_bits(limit_), magnitude_of(t), as_bits(limit_)) |
                             (as_bits(t) & 0x80000000));
    const int32_t below = Lane<uint32_t>::floor(y);
    const auto fraction = static_cast<int32_t>((y - static_cast<float>(below)) * (1 << kDitherBits));
    return below + ((fraction + dither_of(random)) >> kDitherBits);
  }

 private:
  PYCOMM_INLINE uint32_t scale_bits(float amax) const {
    const uint32_t bits = as_bits(amax), s = as_bits(amax / limit_);
    const uint32_t number = if_less(s, kMinNormalBits, kMinNormalBits, s);
    return if_less(bits, kFloatInf, if_less(bits, kMinNormalBits, 0, number), kFloatNan);
  }
  float limit_;
};

// ---- error feedback ----

// e' = (v - d) / k if d, the decoded v, is finite; else e.
PYCOMM_INLINE float next_residual(float v, float d, float e, float k) {
  const uint32_t kept = as_bits((v - d) / k);
  return as_float(if_less(magnitude_of(d), kFloatInf, kept, as_bits(e)));
}

}  // namespace pycomm::kernels::PYCOMM_ISA
