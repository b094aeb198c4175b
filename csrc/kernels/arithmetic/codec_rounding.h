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

// What follows is for one element, or for vectors of them (strips.h): W holds words, Float and Integer as
// many float32 and int32.
template <class W>
using Float = typename Lane<W>::Float;
template <class W>
using Integer = typename Lane<W>::Integer;

// In places of kDitherBits, times 2^kShift.
template <int kShift = 0, class W>
PYCOMM_INLINE Integer<W> dither_of(W random) {
  return __builtin_bit_cast(Integer<W>, (random << (kShift + 1)) + (1u << kShift));
}

// |x| < 2^22. Added to 1.5 * 2^23, whose last place is 1, a float is rounded by the hardware.
template <class W>
PYCOMM_INLINE Integer<W> round_even(Float<W> x) {
  constexpr uint32_t kAnchor = 0x4b400000;
  const W sum = Lane<W>::to_bits(x + Lane<W>::to_float(fill<W>(kAnchor)));
  return __builtin_bit_cast(Integer<W>, sum - kAnchor);
}

// |x| < 2^22
template <class W>
PYCOMM_INLINE Integer<W> round_stochastic(Float<W> x, W random) {
  return (Lane<W>::floor(x * static_cast<float>(1 << kDitherBits)) + dither_of(random)) >> kDitherBits;
}

template <class W>
PYCOMM_INLINE Integer<W> clamp(Integer<W> x, int32_t limit) {
  const Integer<W> most = Integer<W>{} + limit;
  return larger(smaller(x, most), -most);
}

// kLargest: the magnitude of the largest finite value as a code.
template <class F, uint32_t kLargest>
struct SaturatingFloat {
  using Format = F;
  static constexpr int kMantissa = 23 - F::kShift;
  // The largest finite value as a float32.
  static constexpr uint32_t kMax = (kLargest << F::kShift) + F::kRebias;

  template <class W>
  PYCOMM_INLINE static W held(W x) {
    return smaller(x & 0x7fffffff, fill<W>(kMax));
  }
  template <class W>
  PYCOMM_INLINE static W nearest(W x) {
    return F::with_sign(F::round_magnitude(held(x)), x);
  }
  template <class W>
  PYCOMM_INLINE static W stochastic(W x, W random) {
    return F::with_sign(round_stochastic_magnitude(held(x), random), x);
  }

  // Of a magnitude that is not subnormal.
  template <class W>
  PYCOMM_INLINE static W round_stochastic_normal(W magnitude, W random) {
    constexpr int kPlace = F::kShift - kDitherBits;
    return (magnitude + (random << (kPlace + 1)) + ((1u << kPlace) - F::kRebias)) >> F::kShift;
  }
  // Of a subnormal, the places are at most what the other formula gives; of others, 2^kMantissa and no more.
  template <class W>
  PYCOMM_INLINE static W round_stochastic_magnitude(W magnitude, W random) {
    const Integer<W> dither = dither_of<F::kShift - kDitherBits>(random);
    const Integer<W> normal = (__builtin_bit_cast(Integer<W>, magnitude - F::kRebias) + dither) >> F::kShift;
    const Float<W> small = Lane<W>::to_float(smaller(magnitude, fill<W>(F::kMinNormal)));
    const float unit = as_float(F::power(F::kShift - (1 - F::kBias - kMantissa)));
    const Integer<W> places = (Lane<W>::to_integer(small * unit) + dither) >> F::kShift;
    return __builtin_bit_cast(W, larger(normal, places));
  }
};

}  // namespace pycomm::kernels::PYCOMM_ISA
