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

// |x| < 2^31. Exact either way; where there is an instruction, by it.
PYCOMM_INLINE int32_t floor_of(float x) {
#if defined(__SSE4_1__)
  return static_cast<int32_t>(__builtin_floorf(x));
#else
  const auto cut = static_cast<int32_t>(x);
  return cut - static_cast<int32_t>(x < static_cast<float>(cut));
#endif
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

  // Added to the power of two whose last place is that of our results, a float is rounded by the hardware,
  // and what is added up there counts places. A power more is 2^kMantissa more of them in the code.
  PYCOMM_INLINE static uint32_t nearest(float x) {
    const uint32_t magnitude = magnitude_of(x) < kMax ? magnitude_of(x) : kMax;
    const uint32_t power = magnitude & kFloatInf;
    const uint32_t least = power < F::kMinNormal ? F::kMinNormal : power;
    const uint32_t anchor = least + (static_cast<uint32_t>(F::kShift) << 23);
    const uint32_t places = as_bits(as_float(magnitude) + as_float(anchor)) - anchor;
    return signed_code(x, places + ((least - F::kMinNormal) >> F::kShift));
  }

  // Of a subnormal, the places are at most what the other formula gives; of others, 2^kMantissa and no more.
  PYCOMM_INLINE static uint32_t stochastic(float x, uint32_t random) {
    const uint32_t magnitude = magnitude_of(x) < kMax ? magnitude_of(x) : kMax;
    const int32_t dither = dither_of(random) << (F::kShift - kDitherBits);
    const int32_t normal = (static_cast<int32_t>(magnitude - F::kRebias) + dither) >> F::kShift;
    const uint32_t small = magnitude < F::kMinNormal ? magnitude : F::kMinNormal;
    const float unit = as_float(F::power(F::kShift - (1 - F::kBias - kMantissa)));
    const int32_t places = (static_cast<int32_t>(as_float(small) * unit) + dither) >> F::kShift;
    return signed_code(x, static_cast<uint32_t>(normal > places ? normal : places));
  }

  PYCOMM_INLINE static uint32_t signed_code(float x, uint32_t magnitude) {
    return magnitude | (as_bits(x) >> (31 - __builtin_ctz(F::kSign)) & F::kSign);
  }
};

}  // namespace pycomm::kernels::PYCOMM_ISA
