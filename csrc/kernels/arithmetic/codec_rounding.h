// How codecs round: a scaled value to an integer or to a small float, to nearest even or stochastically.
// Values are finite; those that are too large become the largest.
//
// Stochastic rounding adds (2 r + 1) / 2^9 of a last place, r being 8 random bits, and cuts off: it takes the
// floor of an integer and truncates the magnitude of a float. It is computed in integers with 9 bits below
// the last place, hence exactly.
#pragma once

#include <cstdint>

#include "kernels/arithmetic/ops.h"
#include "kernels/arithmetic/small_float.h"

namespace pycomm::kernels::PYCOMM_ISA {

inline constexpr uint32_t kFloatMax = 0x7f7fffff;
inline constexpr int kDitherBits = 9;

PYCOMM_INLINE uint32_t magnitude_of(float x) { return as_bits(x) & 0x7fffffff; }
PYCOMM_INLINE float canonical(float x) { return Wide<float>::encode(x); }

// The functions below take one element or a vector of elements (strips.h): W holds the words, Float<W> and
// Integer<W> as many float32 and int32.
template <class W>
using Float = typename Lane<W>::Float;
template <class W>
using Integer = typename Lane<W>::Integer;

// The dither 2 r + 1, in units of 2^-kDitherBits of the last place, times 2^kShift.
template <int kShift = 0, class W>
PYCOMM_INLINE Integer<W> dither_of(W random) {
  return __builtin_bit_cast(Integer<W>, (random << (kShift + 1)) + (1u << kShift));
}

// For |x| < 2^22. The hardware rounds x as it is added to 1.5 * 2^23, whose last place is 1.
template <class W>
PYCOMM_INLINE Integer<W> round_even(Float<W> x) {
  constexpr uint32_t kAnchor = 0x4b400000;
  const W sum = Lane<W>::to_bits(x + Lane<W>::to_float(fill<W>(kAnchor)));
  return __builtin_bit_cast(Integer<W>, sum - kAnchor);
}

// For |x| < 2^22.
template <class W>
PYCOMM_INLINE Integer<W> round_stochastic(Float<W> x, W random) {
  return (Lane<W>::floor(x * static_cast<float>(1 << kDitherBits)) + dither_of(random)) >> kDitherBits;
}

template <class W>
PYCOMM_INLINE Integer<W> clamp(Integer<W> x, int32_t limit) {
  const Integer<W> most = Integer<W>{} + limit;
  return larger(smaller(x, most), -most);
}

// kLargest: the code of the largest finite value.
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

  // For a magnitude that is not subnormal.
  template <class W>
  PYCOMM_INLINE static W round_stochastic_normal(W magnitude, W random) {
    constexpr int kPlace = F::kShift - kDitherBits;
    return (magnitude + (random << (kPlace + 1)) + ((1u << kPlace) - F::kRebias)) >> F::kShift;
  }
  // `places` is right for a subnormal magnitude and at least `normal` there; above, it stays at 2^kMantissa,
  // and `normal` is right and at least as large.
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
