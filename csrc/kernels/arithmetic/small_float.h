// Conversions of the 16- and 8-bit floats to and from float32. They use integer arithmetic without branches,
// so that every instruction set gives the same bits and the compiler vectorises the loops.
//
// Encoding rounds to nearest even. Values beyond the largest finite one become infinity; float8_e4m3fn has
// none and gives NaN. Every NaN becomes the canonical one: positive, quiet, without payload. encode_number()
// takes only numbers that do not overflow.
#pragma once

#include <cstdint>

#include "kernels/arithmetic/ops.h"

namespace pycomm::kernels::PYCOMM_ISA {

PYCOMM_INLINE float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
PYCOMM_INLINE uint32_t as_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

// a < b ? yes : no, for a and b below 2^31. It uses masks instead of a comparison, which the compiler could
// turn back into a branch; it does not vectorise float arithmetic under a branch.
PYCOMM_INLINE uint32_t if_less(uint32_t a, uint32_t b, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - ((a - b) >> 31);
  return no ^ ((no ^ yes) & mask);
}

// For integers, or for vectors of them lane by lane.
template <class T>
PYCOMM_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
PYCOMM_INLINE T larger(T a, T b) {
  return a > b ? a : b;
}

// The words that floats are computed in: the 32 bits of one or, in cpu/strips.h, of several side by side.
template <class W>
struct Lane;
template <>
struct Lane<uint32_t> {
  using Float = float;
  using Integer = int32_t;
  PYCOMM_INLINE static float to_float(uint32_t bits) { return as_float(bits); }
  PYCOMM_INLINE static uint32_t to_bits(float x) { return as_bits(x); }
  PYCOMM_INLINE static uint32_t select_less(uint32_t a, uint32_t b, uint32_t yes, uint32_t no) {
    return if_less(a, b, yes, no);
  }
  // Rounds towards zero; |x| < 2^31. floor() uses the processor's instruction if there is one; both ways are
  // exact.
  PYCOMM_INLINE static int32_t to_integer(float x) { return static_cast<int32_t>(x); }
  PYCOMM_INLINE static int32_t floor(float x) {
#if defined(__SSE4_1__)
    return static_cast<int32_t>(__builtin_floorf(x));
#else
    const auto cut = static_cast<int32_t>(x);
    return cut - static_cast<int32_t>(x < static_cast<float>(cut));
#endif
  }
};
template <class W>
PYCOMM_INLINE W fill(uint32_t bits) {
  return W{} + bits;
}

inline constexpr uint32_t kFloatInf = 0x7f800000;
inline constexpr uint32_t kFloatNan = 0x7fc00000;

struct BFloat16 {
  using Raw = uint16_t;
  using Value = float;

  template <class W>
  PYCOMM_INLINE static W decode_word(W code) {
    return code << 16;
  }
  template <class W>
  PYCOMM_INLINE static W encode_number(W bits) {
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
  template <class W>
  PYCOMM_INLINE static W encode_word(W bits) {
    return Lane<W>::select_less(fill<W>(kFloatInf), bits & 0x7fffffff, fill<W>(kFloatNan >> 16),
                                encode_number(bits));
  }

  PYCOMM_INLINE static float decode(Raw x) { return as_float(decode_word(uint32_t{x})); }
  PYCOMM_INLINE static Raw encode(float x) { return static_cast<Raw>(encode_word(as_bits(x))); }
};

// A float with `kExponent` exponent bits and `kMantissa` mantissa bits. Magnitudes from `kOverflow` on are
// special: kOverflow is the infinity or, if it equals kNan, the only special one.
template <class R, int kExponent, int kMantissa, uint32_t kOverflow, uint32_t kNan>
struct SmallFloat {
  using Raw = R;
  using Value = float;
  static constexpr int kBias = (1 << (kExponent - 1)) - 1;
  static constexpr int kShift = 23 - kMantissa;  // from this mantissa's last bit to float32's
  static constexpr uint32_t kSign = 1u << (kExponent + kMantissa);
  static constexpr uint32_t kRebias = static_cast<uint32_t>(127 - kBias) << 23;
  static constexpr uint32_t kMinNormal = kRebias + (1u << 23);

  // The least float32 that rounds past the largest finite value: the one half a place below kOverflow or, if
  // that tie goes down to even, the next above.
  static constexpr uint32_t kPast = (kOverflow << kShift) + kRebias - (1u << (kShift - 1)) + (kOverflow & 1);
  static constexpr uint32_t kOffset = (0u - (((kMinNormal >> 23) + kShift) << kMantissa)) & (kSign - 1);

  // 2^n as bits of a float32.
  static constexpr uint32_t power(int n) { return static_cast<uint32_t>(127 + n) << 23; }
  // A power of two with the last place of this format's subnormals: a subnormal's code, added to its bits,
  // adds the subnormal's value.
  static constexpr uint32_t kAnchor = power(1 - kBias - kMantissa + 23);

  template <class W>
  PYCOMM_INLINE static W decode_word(W code) {
    const W magnitude = code & (kSign - 1);
    const W normal = (magnitude << kShift) + kRebias;
    const W subnormal =
        Lane<W>::to_bits(Lane<W>::to_float(magnitude + kAnchor) - Lane<W>::to_float(fill<W>(kAnchor)));
    const W finite = Lane<W>::select_less(magnitude, fill<W>(1u << kMantissa), subnormal, normal);
    W special = fill<W>(kFloatNan);
    if constexpr (kOverflow != kNan) {
      special = Lane<W>::select_less(fill<W>(kOverflow), magnitude, special, fill<W>(kFloatInf));
    }
    const W bits = Lane<W>::select_less(magnitude, fill<W>(kOverflow), finite, special);
    return bits | (code & kSign) << (31 - kExponent - kMantissa);
  }

  // Rounds a magnitude to nearest even; the code's bits from kSign on are garbage. The hardware rounds the
  // magnitude as it is added to a power of two whose last place is that of the result. The low bits of the
  // sum then count places, and its exponent counts powers, each worth as many places as a mantissa has.
  // kOffset makes both counts zero at zero.
  template <class W>
  PYCOMM_INLINE static W round_magnitude(W magnitude) {
    const W least = larger(magnitude & kFloatInf, fill<W>(kMinNormal));
    const W anchor = least + ((static_cast<uint32_t>(kShift) << 23) + kOffset);
    const W sum = Lane<W>::to_bits(Lane<W>::to_float(magnitude) + Lane<W>::to_float(anchor));
    return sum + (sum >> kShift);
  }
  template <class W>
  PYCOMM_INLINE static W with_sign(W code, W bits) {
    const W upper = bits >> (31 - kExponent - kMantissa);
    return upper ^ ((upper ^ code) & (kSign - 1));
  }

  template <class W>
  PYCOMM_INLINE static W encode_number(W bits) {
    return with_sign(round_magnitude(bits & 0x7fffffff), bits);
  }
  template <class W>
  PYCOMM_INLINE static W encode_word(W bits) {
    const W magnitude = bits & 0x7fffffff, nan = fill<W>(kNan);
    // On overflow, a format without infinity gives a NaN without a sign.
    const W past = kOverflow == kNan ? nan
                                     : Lane<W>::select_less(fill<W>(kFloatInf), magnitude, nan,
                                                            with_sign(fill<W>(kOverflow), bits));
    return Lane<W>::select_less(magnitude, fill<W>(kPast), encode_number(bits), past);
  }

  PYCOMM_INLINE static float decode(Raw x) { return as_float(decode_word(uint32_t{x})); }
  PYCOMM_INLINE static Raw encode(float x) { return static_cast<Raw>(encode_word(as_bits(x))); }
};

using Float16 = SmallFloat<uint16_t, 5, 10, 0x7c00, 0x7e00>;
using Float8E4M3 = SmallFloat<uint8_t, 4, 3, 0x7f, 0x7f>;
using Float8E5M2 = SmallFloat<uint8_t, 5, 2, 0x7c, 0x7e>;

}  // namespace pycomm::kernels::PYCOMM_ISA
