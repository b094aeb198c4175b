// Conversion of elements in memory to vectors of float32 and back. Only *_isa.cc include this file, see
// isa.h.
//
// The arithmetic is that of small_float.h, on several words side by side. float16 uses the processor's own
// conversions where there are any: they round alike, and only their NaNs must be made canonical.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/arithmetic/ops.h"
#include "kernels/arithmetic/small_float.h"
#include "kernels/cpu/vectors.h"

namespace pycomm::kernels::PYCOMM_ISA {

// Conversions of kWidth elements of the format F.
template <class F>
PYCOMM_INLINE Floats decode(const void* from, F) {
  return Lane<Words>::to_float(F::decode_word(widen(from, typename F::Raw{})));
}
template <class F>
PYCOMM_INLINE auto encoded(Floats x, F) {
  return narrow(F::encode_word(Lane<Words>::to_bits(x)), typename F::Raw{});
}

PYCOMM_INLINE Floats decode(const void* from, Plain<float>) { return load<Floats>(from); }
PYCOMM_INLINE Floats encoded(Floats x, Plain<float>) { return x; }
PYCOMM_INLINE Floats decode(const void* from, Wide<float>) { return load<Floats>(from); }
PYCOMM_INLINE Floats encoded(Floats x, Wide<float>) {
  return x == x ? x : Lane<Words>::to_float(fill<Words>(kFloatNan));
}

#if defined(__F16C__)

// The processor's own float16. A float8_e5m2 is the upper half of a float16; a float8_e4m3 is 2^8 times the
// float16 that has its bits.
inline constexpr int16_t kMiddleBits = static_cast<int16_t>(0xbf80);
#if defined(__AVX512F__)
using HalfCodes = __m256i;
PYCOMM_INLINE HalfCodes upper_halves(const void* bytes) {
  return _mm256_slli_epi16(_mm256_cvtepu8_epi16(load<__m128i>(bytes)), 8);
}
// A float8_e4m3 with its exponent and mantissa bits where a float16 has them.
PYCOMM_INLINE HalfCodes middle_bits(const void* bytes) {
  const __m256i sign_extended = _mm256_cvtepi8_epi16(load<__m128i>(bytes));
  return _mm256_and_si256(_mm256_slli_epi16(sign_extended, 7), _mm256_set1_epi16(kMiddleBits));
}
PYCOMM_INLINE Floats from_halves(HalfCodes x) { return __builtin_bit_cast(Floats, _mm512_cvtph_ps(x)); }
#else
using HalfCodes = __m128i;
PYCOMM_INLINE HalfCodes upper_halves(const void* bytes) {
  return _mm_unpacklo_epi8(_mm_setzero_si128(), _mm_loadl_epi64(static_cast<const __m128i*>(bytes)));
}
PYCOMM_INLINE HalfCodes middle_bits(const void* bytes) {
  const __m128i sign_extended = _mm_cvtepi8_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(bytes)));
  return _mm_and_si128(_mm_slli_epi16(sign_extended, 7), _mm_set1_epi16(kMiddleBits));
}
PYCOMM_INLINE Floats from_halves(HalfCodes x) { return __builtin_bit_cast(Floats, _mm256_cvtph_ps(x)); }
#endif

// Makes NaNs quiet; they keep their sign and lose their payload, as in decode_word(). decode_number() leaves
// NaNs unchanged: it is for values that become canonical anyway.
PYCOMM_INLINE Floats without_payload(Floats x) {
  const Words bits = Lane<Words>::to_bits(x);
  return Lane<Words>::to_float(x == x ? bits : bits & ~0x3fffffu);
}

template <class F>
PYCOMM_INLINE Floats decode_number(const void* from, F) {
  return decode(from, F{});
}
PYCOMM_INLINE Floats decode_number(const void* from, Float16) { return from_halves(load<HalfCodes>(from)); }
PYCOMM_INLINE Floats decode_number(const void* from, Float8E5M2) { return from_halves(upper_halves(from)); }
PYCOMM_INLINE Floats decode_number(const void* from, Float8E4M3) {
  constexpr uint32_t kPast = 0x43f00000;  // 480: the value that the NaN's code would have
  const Words bits = Lane<Words>::to_bits(from_halves(middle_bits(from)) * 256.0f);
  return Lane<Words>::to_float(bits | __builtin_bit_cast(Words, bits << 1 == kPast << 1) >> 1);
}
PYCOMM_INLINE Floats decode(const void* from, Float16) {
  return without_payload(decode_number(from, Float16{}));
}
PYCOMM_INLINE Floats decode(const void* from, Float8E5M2) {
  return without_payload(decode_number(from, Float8E5M2{}));
}
PYCOMM_INLINE Floats decode(const void* from, Float8E4M3) {
  return without_payload(decode_number(from, Float8E4M3{}));
}

#if defined(__AVX512F__)
PYCOMM_INLINE HalfCodes encoded_number(Floats x, Float16) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}
PYCOMM_INLINE HalfCodes encoded(Floats x, Float16) {
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm256_mask_mov_epi16(encoded_number(x, Float16{}), nan, _mm256_set1_epi16(0x7e00));
}
PYCOMM_INLINE __m512i joined(HalfCodes a, HalfCodes b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}
#else
PYCOMM_INLINE HalfCodes encoded_number(Floats x, Float16) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}
PYCOMM_INLINE HalfCodes encoded(Floats x, Float16) {
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m128i narrow_nan = _mm_packs_epi32(_mm256_castsi256_si128(nan), _mm256_extracti128_si256(nan, 1));
  return _mm_blendv_epi8(encoded_number(x, Float16{}), _mm_set1_epi16(0x7e00), narrow_nan);
}
PYCOMM_INLINE __m256i joined(HalfCodes a, HalfCodes b) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
}
#endif

// Encodes two vectors in a 16-bit format. kNumbers: all are numbers that do not overflow.
template <bool kNumbers>
PYCOMM_INLINE auto encoded_two(const Floats* x, Float16) {
  if constexpr (kNumbers) return joined(encoded_number(x[0], Float16{}), encoded_number(x[1], Float16{}));
  return joined(encoded(x[0], Float16{}), encoded(x[1], Float16{}));
}

#else

template <class F>
PYCOMM_INLINE Floats decode_number(const void* from, F) {
  return decode(from, F{});
}

#endif

template <bool kNumbers, class F>
PYCOMM_INLINE Words code_of(Floats x, F) {
  const Words bits = Lane<Words>::to_bits(x);
  return kNumbers ? F::encode_number(bits) : F::encode_word(bits);
}
template <bool kNumbers, class F>
PYCOMM_INLINE auto encoded_two(const Floats* x, F) {
  const Words codes[2] = {code_of<kNumbers>(x[0], F{}), code_of<kNumbers>(x[1], F{})};
  return narrow_two(codes);
}

template <class F>
PYCOMM_INLINE void encode(void* to, Floats x, F) {
  store(to, encoded(x, F{}));
}

// Stores past the cache, to a multiple of kStreamAlign: 16 bytes without AVX-512, since malloc() and NumPy
// align memory to 16 at least. Consecutive stores fill a line in the processor's buffers.
#if defined(__AVX512F__)
inline constexpr size_t kStreamAlign = 64;
#else
inline constexpr size_t kStreamAlign = 16;
#endif
template <class V>
PYCOMM_INLINE void stream(void* to, V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    return _mm512_stream_si512(static_cast<__m512i*>(to), __builtin_bit_cast(__m512i, x));
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) % 16 == 0) {
    __m128i parts[sizeof(V) / 16];
    std::memcpy(parts, &x, sizeof x);
    for (size_t i = 0; i < sizeof(V) / 16; ++i) _mm_stream_si128(static_cast<__m128i*>(to) + i, parts[i]);
    return;
  }
#endif
  store(to, x);
}

// Encodes as many vectors as make one vector of the format F. kNumbers: all are numbers that do not overflow.
// kPast: store past the cache.
template <class F>
inline constexpr int kToFill = sizeof(float) / sizeof(typename F::Raw);
template <bool kNumbers, bool kPast, class F>
PYCOMM_INLINE void encode_full(char* to, const Floats* x, F) {
  const auto store_full = [=](auto codes) PYCOMM_LAMBDA {
    if constexpr (kPast) {
      stream(to, codes);
    } else {
      store(to, codes);
    }
  };
  if constexpr (kToFill<F> == 4 && kNumbers) {
    Words codes[4];
    for (int i = 0; i < 4; ++i) {
      codes[i] = F::round_magnitude(Lane<Words>::to_bits(x[i]) & 0x7fffffff) & (F::kSign - 1);
    }
    store_full(narrow_four(codes, x));
  } else if constexpr (kToFill<F> == 4) {
    Words codes[4];
    for (int i = 0; i < 4; ++i) codes[i] = F::encode_word(Lane<Words>::to_bits(x[i]));
    store_full(narrow_four(codes));
  } else if constexpr (kToFill<F> == 2) {
    store_full(encoded_two<kNumbers>(x, F{}));
  } else {
    store_full(kNumbers ? x[0] : encoded(x[0], F{}));
  }
}

// For statistics: the halves of a vector in float64, and x * x + sum, where x * x is exact.
#if defined(__AVX512F__)

PYCOMM_INLINE Doubles first_half(Floats x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
PYCOMM_INLINE Doubles second_half(Floats x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
PYCOMM_INLINE Doubles add_squares(Doubles sum, Doubles x) { return _mm512_fmadd_pd(x, x, sum); }

#elif defined(__AVX2__)

PYCOMM_INLINE Doubles first_half(Floats x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
PYCOMM_INLINE Doubles second_half(Floats x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
PYCOMM_INLINE Doubles add_squares(Doubles sum, Doubles x) { return _mm256_fmadd_pd(x, x, sum); }

#else

PYCOMM_INLINE Doubles first_half(Floats x) {
  return __builtin_convertvector(__builtin_shufflevector(x, x, 0, 1), Doubles);
}
PYCOMM_INLINE Doubles second_half(Floats x) {
  return __builtin_convertvector(__builtin_shufflevector(x, x, 2, 3), Doubles);
}
PYCOMM_INLINE Doubles add_squares(Doubles sum, Doubles x) { return x * x + sum; }

#endif

// Copies `lines` cache lines past the cache; `to` is aligned to kStreamAlign.
PYCOMM_INLINE void stream_lines(char* to, const char* from, size_t lines) {
  for (size_t i = 0; i < lines * kLine; i += sizeof(Words)) stream(to + i, load<Words>(from + i));
}

}  // namespace pycomm::kernels::PYCOMM_ISA
