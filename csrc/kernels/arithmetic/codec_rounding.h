// How codecs round: a scaled value to an integer or to a small float, to nearest even or stochastically.
// Values are finite; what is too large becomes the largest.
//
// Stochastic rounding adds (2 r + 1) / 2^9 of a last place, r being 8 random bits, and cuts off: an integer's
// floor, a float's magnitude. It is done in integers with 9 bits below the last place, hence exactly.
#pragma once

#include <cstdint>

#include "kernels/arithmetic/ops.h"
#include "kernels/arithmetic/small_float.h"

namespace pycomm::kernels::PYCOMM_ISA {

inline constexpr uint32_t kFloatMax = 0x7f7fffff;
inline constexpr int kDitherBits = 9;

PYCOMM_INLINE uint32_t magnitude_of(float x) { return as_bits(x) & 0x7fffffff; }
PYCOMM_INLINE float canonical(float x) { return Wide<float>::encode(x); }
PYCOMM_INLINE int32_t dither_of(uint32_t random) { return static_cast<int32_t>(2 * random + 1); }

// |x| < 2^22. Added to 1.5 * 2^23, whose last place is 1, a float is rounded by the hardware.
PYCOMM_INLINE int32_t round_even(float x) {
  constexpr uint32_t kAnchor = 0x4b400000;
  return static_cast<int32_t>(as_bits(x + as_float(kAnchor)) - kAnchor);
}

// |x| < 2^31
PYCOMM_INLINE int32_t floor_of(float x) {
  const auto cut = static_cast<int32_t>(x);
  return cut - static_cast<int32_t>(x < static_cast<float>(cut));
}

// |x| < 2^22
PYCOMM_INLINE int32_t round_stochastic(float x, uint32_t random) {
  return (floor_of(x * (1 << kDitherBits)) + dither_of(random)) >> kDitherBits;
}

PYCOMM_INLINE int32_t clamp(int32_t x, int32_t limit) {
  const int32_t below = x < limit ? x : limit;
  return below > -limit ? below : -limit;
}

// kLargest: the magnitude of the largest finite value as a code.
template <class F, uint32_t kLargest>
struct SaturatingFloat {
  using Format = F;
  static constexpr int kMantissa = 23 - F::kShift;
  // The largest finite value as a float32.
  static constexpr uint32_t kMax = (kLargest << F::kShift) + F::kRebias;

  PYCOMM_INLINE static uint32_t nearest(float x) {
    const uint32_t magnitude = if_less(magnitude_of(x), kMax, magnitude_of(x), kMax);
    const uint32_t normal =
        (magnitude - F::kRebias + ((1u << (F::kShift - 1)) - 1) + (magnitude >> F::kShift & 1)) >> F::kShift;
    constexpr uint32_t kAnchor = F::power(1 - F::kBias - kMantissa + 23);
    const uint32_t subnormal = as_bits(as_float(magnitude) + as_float(kAnchor)) - kAnchor;
    return signed_code(x, if_less(magnitude, F::kMinNormal, subnormal, normal));
  }

  PYCOMM_INLINE static uint32_t stochastic(float x, uint32_t random) {
    const uint32_t magnitude = if_less(magnitude_of(x), kMax, magnitude_of(x), kMax);
    const auto dither = static_cast<uint32_t>(dither_of(random));
    const uint32_t normal = (magnitude - F::kRebias + (dither << (F::kShift - kDitherBits))) >> F::kShift;
    const float unit = as_float(F::power(kDitherBits - (1 - F::kBias - kMantissa)));
    // Of what is not subnormal, the smallest normal: a product that fits an integer.
    const uint32_t small = if_less(magnitude, F::kMinNormal, magnitude, F::kMinNormal);
    const auto fixed = static_cast<uint32_t>(static_cast<int32_t>(as_float(small) * unit));
    const uint32_t subnormal = (fixed + dither) >> kDitherBits;
    return signed_code(x, if_less(magnitude, F::kMinNormal, subnormal, normal));
  }

  PYCOMM_INLINE static uint32_t signed_code(float x, uint32_t magnitude) {
    return magnitude | (as_bits(x) >> (31 - __builtin_ctz(F::kSign)) & F::kSign);
  }
};

}  // namespace pycomm::kernels::PYCOMM_ISA
