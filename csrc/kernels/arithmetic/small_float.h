// The 16- and 8-bit floats to and from float32, in integer arithmetic without branches, so that every
// instruction set gives the same bits and the compiler makes vectors of the loops.
//
// Encoding rounds to nearest even. Beyond the largest finite value a format gives infinity; float8_e4m3fn has
// none and gives NaN. Every NaN becomes the canonical one: positive, quiet, without payload.
#pragma once

#include <cstdint>

#include "kernels/arithmetic/ops.h"

namespace pycomm::kernels::PYCOMM_ISA {

PYCOMM_INLINE float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
PYCOMM_INLINE uint32_t as_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

// a < b ? yes : no, for a and b below 2^31. Masks and no comparison: the compiler cannot turn it back into a
// branch, under which it does not make vectors of float arithmetic.
PYCOMM_INLINE uint32_t if_less(uint32_t a, uint32_t b, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - ((a - b) >> 31);
  return no ^ ((no ^ yes) & mask);
}

inline constexpr uint32_t kFloatInf = 0x7f800000;
inline constexpr uint32_t kFloatNan = 0x7fc00000;

struct BFloat16 {
  using Raw = uint16_t;
  using Value = float;

  PYCOMM_INLINE static float decode(Raw x) { return as_float(static_cast<uint32_t>(x) << 16); }

  PYCOMM_INLINE static Raw encode(float x) {
    const uint32_t bits = as_bits(x);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<Raw>(if_less(kFloatInf, bits & 0x7fffffff, kFloatNan >> 16, rounded));
  }
};

// A float of `kExponent` and `kMantissa` bits whose magnitudes from `kOverflow` on are special: kOverflow is
// the infinity, or, where it is kNan itself, all there is.
template <class R, int kExponent, int kMantissa, uint32_t kOverflow, uint32_t kNan>
struct SmallFloat {
  using Raw = R;
  using Value = float;
  static constexpr int kBias = (1 << (kExponent - 1)) - 1;
  static constexpr int kShift = 23 - kMantissa;  // from our mantissa's last bit to float32's
  static constexpr uint32_t kSign = 1u << (kExponent + kMantissa);
  static constexpr uint32_t kRebias = static_cast<uint32_t>(127 - kBias) << 23;
  static constexpr uint32_t kMinNormal = kRebias + (1u << 23);

  // 2^n as bits of a float32.
  static constexpr uint32_t power(int n) { return static_cast<uint32_t>(127 + n) << 23; }

  PYCOMM_INLINE static float decode(Raw x) {
    const uint32_t magnitude = x & (kSign - 1);
    const uint32_t normal = (magnitude << kShift) + kRebias;
    // A subnormal counts units of its last place.
    const uint32_t subnormal =
        as_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * as_float(power(1 - kBias - kMantissa)));
    const uint32_t special =
        kOverflow == kNan ? kFloatNan : if_less(kOverflow, magnitude, kFloatNan, kFloatInf);
    const uint32_t finite = if_less(magnitude, 1u << kMantissa, subnormal, normal);
    const uint32_t bits = if_less(magnitude, kOverflow, finite, special);
    return as_float(bits | (x & kSign) << (31 - kExponent - kMantissa));
  }

  PYCOMM_INLINE static Raw encode(float x) {
    const uint32_t bits = as_bits(x);
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t normal =
        (magnitude - kRebias + ((1u << (kShift - 1)) - 1) + (magnitude >> kShift & 1)) >> kShift;
    // Added to a power of two whose last place is that of our subnormals, a float is rounded by the hardware.
    constexpr uint32_t kAnchor = power(1 - kBias - kMantissa + 23);
    const uint32_t subnormal = as_bits(as_float(magnitude) + as_float(kAnchor)) - kAnchor;
    const uint32_t rounded = if_less(magnitude, kMinNormal, subnormal, normal);
    const uint32_t sign = bits >> (31 - kExponent - kMantissa) & kSign;
    // Where the format has no infinity, overflow is a NaN: without a sign.
    const uint32_t overflow = kOverflow == kNan ? kNan : sign | kOverflow;
    const uint32_t number = if_less(rounded, kOverflow, sign | rounded, overflow);
    return static_cast<Raw>(if_less(kFloatInf, magnitude, kNan, number));
  }
};

using Float16 = SmallFloat<uint16_t, 5, 10, 0x7c00, 0x7e00>;
using Float8E4M3 = SmallFloat<uint8_t, 4, 3, 0x7f, 0x7f>;
using Float8E5M2 = SmallFloat<uint8_t, 5, 2, 0x7c, 0x7e>;

}  // namespace pycomm::kernels::PYCOMM_ISA
