// Vectors as wide as the instruction set has them, and elements from memory to vectors of float32 and back.
// Included by *_isa.cc alone, see isa.h.
//
// The arithmetic is that of small_float.h, on several words side by side. float16 goes through the
// processor's own conversions where there are any: they round alike, and only what they make of NaNs has to
// be made canonical.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/arithmetic/ops.h"
#include "kernels/arithmetic/small_float.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define PYCOMM_LAMBDA __attribute__((always_inline))

namespace pycomm::kernels::PYCOMM_ISA {

#if defined(__AVX512F__)
inline constexpr int kWidth = 16;
#elif defined(__AVX2__)
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif

template <class T, int kCount>
struct VectorOf {
  using type __attribute__((vector_size(sizeof(T) * kCount))) = T;
};
using Words = VectorOf<uint32_t, kWidth>::type;
using Integers = VectorOf<int32_t, kWidth>::type;
using Floats = VectorOf<float, kWidth>::type;
using Halves = VectorOf<float, kWidth / 2>::type;
using Doubles = VectorOf<double, kWidth / 2>::type;

// For the operators of ops.h.
template <>
struct Bits<Floats> {
  using type = Words;
};
template <>
inline constexpr bool kIsFloat<Floats> = true;

template <>
struct Lane<Words> {
  using Float = Floats;
  using Integer = Integers;
  PYCOMM_INLINE static Floats to_float(Words bits) { return __builtin_bit_cast(Floats, bits); }
  PYCOMM_INLINE static Words to_bits(Floats x) { return __builtin_bit_cast(Words, x); }
  PYCOMM_INLINE static Words select_less(Words a, Words b, Words yes, Words no) {
    return __builtin_bit_cast(Integers, a) < __builtin_bit_cast(Integers, b) ? yes : no;
  }
  PYCOMM_INLINE static Integers to_integer(Floats x) { return __builtin_convertvector(x, Integers); }
  PYCOMM_INLINE static Integers floor(Floats x) {
#if defined(__AVX512F__)
    return __builtin_bit_cast(Integers,
                              _mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
    return __builtin_convertvector(__builtin_bit_cast(Floats, _mm256_floor_ps(x)), Integers);
#else
    const Integers cut = __builtin_convertvector(x, Integers);
    return cut + (x < __builtin_convertvector(cut, Floats));
#endif
  }
};

// An element in memory, at any address and of any declared type.
template <class T>
struct __attribute__((packed, may_alias)) Unaligned {
  T value;
};
template <class T>
PYCOMM_INLINE const Unaligned<T>* in(const void* p) {
  return static_cast<const Unaligned<T>*>(p);
}
template <class T>
PYCOMM_INLINE Unaligned<T>* out(void* p) {
  return static_cast<Unaligned<T>*>(p);
}

template <class V>
PYCOMM_INLINE V load(const void* from) {
  V x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <class V>
PYCOMM_INLINE void store(void* to, V x) {
  std::memcpy(to, &x, sizeof x);
}

// Bytes that are fetched before they are read. The processor's own prefetching stops at a page's end; and in
// the midst of a loop's arithmetic, few at a time, fetching waits for no free buffer.
inline constexpr size_t kLine = 64, kAhead = 8192;
PYCOMM_INLINE void prefetch(const void* p, size_t bytes) {
  for (size_t line = 0; line < bytes; line += kLine) {
    __builtin_prefetch(static_cast<const char*>(p) + kAhead + line);
  }
}

// Codes of 8 and 16 bits to words and back: one vector's, two vectors' of 16 bits, four vectors' bytes. And
// a bit for each lane of four vectors of masks, the first one's lowest.
#if defined(__AVX512F__)

PYCOMM_INLINE Words widen(const void* from, uint8_t) {
  return __builtin_bit_cast(Words, _mm512_cvtepu8_epi32(load<__m128i>(from)));
}
PYCOMM_INLINE Integers widen(const void* from, int8_t) {
  return __builtin_bit_cast(Integers, _mm512_cvtepi8_epi32(load<__m128i>(from)));
}
PYCOMM_INLINE Words widen(const void* from, uint16_t) {
  return __builtin_bit_cast(Words, _mm512_cvtepu16_epi32(load<__m256i>(from)));
}
PYCOMM_INLINE __m128i narrow(Words codes, uint8_t) {
  return _mm512_cvtepi32_epi8(__builtin_bit_cast(__m512i, codes));
}
PYCOMM_INLINE __m256i narrow(Words codes, uint16_t) {
  return _mm512_cvtepi32_epi16(__builtin_bit_cast(__m512i, codes));
}
PYCOMM_INLINE __m512i narrow_two(const Words* codes) {
  const auto at = [&](int i) { return __builtin_bit_cast(__m512i, codes[i]); };
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return _mm512_permutexvar_epi64(order, _mm512_packus_epi32(at(0), at(1)));
}
PYCOMM_INLINE uint64_t mask_of_four(const Integers* masks) {
  const auto at = [&](int i) {
    return uint64_t{_mm512_movepi32_mask(__builtin_bit_cast(__m512i, masks[i]))} << 16 * i;
  };
  return at(0) | at(1) | at(2) | at(3);
}
PYCOMM_INLINE __m512i narrow_four(const Words* codes) {
  const auto at = [&](int i) { return __builtin_bit_cast(__m512i, codes[i]); };
  const __m512i low = _mm512_packus_epi32(at(0), at(1)), high = _mm512_packus_epi32(at(2), at(3));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
}

#elif defined(__AVX2__)

PYCOMM_INLINE Words widen(const void* from, uint8_t) {
  return __builtin_bit_cast(Words, _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
}
PYCOMM_INLINE Integers widen(const void* from, int8_t) {
  return __builtin_bit_cast(Integers,
                            _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
}
PYCOMM_INLINE Words widen(const void* from, uint16_t) {
  return __builtin_bit_cast(Words, _mm256_cvtepu16_epi32(load<__m128i>(from)));
}
PYCOMM_INLINE __m128i narrow(Words codes, uint16_t) {
  const auto words = __builtin_bit_cast(__m256i, codes);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
PYCOMM_INLINE uint64_t narrow(Words codes, uint8_t) {
  const __m128i halves = narrow(codes, uint16_t{});
  return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_packus_epi16(halves, halves)));
}
PYCOMM_INLINE __m256i narrow_two(const Words* codes) {
  const auto at = [&](int i) { return __builtin_bit_cast(__m256i, codes[i]); };
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(at(0), at(1)), _MM_SHUFFLE(3, 1, 2, 0));
}
PYCOMM_INLINE __m256i narrow_four(const Words* codes) {
  const auto at = [&](int i) { return __builtin_bit_cast(__m256i, codes[i]); };
  const __m256i low = _mm256_packus_epi32(at(0), at(1)), high = _mm256_packus_epi32(at(2), at(3));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
}
PYCOMM_INLINE uint64_t mask_of_four(const Integers* masks) {
  const auto at = [&](int i) { return __builtin_bit_cast(__m256i, masks[i]); };
  const __m256i low = _mm256_packs_epi32(at(0), at(1)), high = _mm256_packs_epi32(at(2), at(3));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
  return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}

#else

using Bytes = VectorOf<uint8_t, 16>::type;
using Shorts = VectorOf<uint16_t, 8>::type;

PYCOMM_INLINE Words widen_shorts(Shorts low) {
  return __builtin_bit_cast(Words, __builtin_shufflevector(low, Shorts{}, 0, 8, 1, 9, 2, 10, 3, 11));
}
PYCOMM_INLINE Words widen(const void* from, uint16_t) {
  const VectorOf<uint64_t, 2>::type low = {load<uint64_t>(from), 0};
  return widen_shorts(__builtin_bit_cast(Shorts, low));
}
PYCOMM_INLINE Words widen(const void* from, uint8_t) {
  const Words low = {load<uint32_t>(from), 0, 0, 0};
  return widen_shorts(
      __builtin_bit_cast(Shorts, __builtin_shufflevector(__builtin_bit_cast(Bytes, low), Bytes{}, 0, 16, 1, 17,
                                                         2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)));
}
PYCOMM_INLINE Integers widen(const void* from, int8_t) {
  return __builtin_bit_cast(Integers, widen(from, uint8_t{}) << 24) >> 24;
}

#if defined(__SSE2__)

PYCOMM_INLINE Shorts narrow_two(const Words* codes) {  // it packs signed words alone
  const auto at = [&](int i) {
    return __builtin_bit_cast(__m128i, __builtin_bit_cast(Integers, codes[i] << 16) >> 16);
  };
  return __builtin_bit_cast(Shorts, _mm_packs_epi32(at(0), at(1)));
}
PYCOMM_INLINE Bytes narrow_four(const Words* codes) {
  const auto at = [&](int i) { return __builtin_bit_cast(__m128i, codes[i]); };
  const __m128i low = _mm_packs_epi32(at(0), at(1)), high = _mm_packs_epi32(at(2), at(3));
  return __builtin_bit_cast(Bytes, _mm_packus_epi16(low, high));
}
PYCOMM_INLINE uint64_t mask_of_four(const Integers* masks) {
  const auto at = [&](int i) { return __builtin_bit_cast(__m128i, masks[i]); };
  const __m128i low = _mm_packs_epi32(at(0), at(1)), high = _mm_packs_epi32(at(2), at(3));
  return static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(low, high)));
}

#else

template <class V>
PYCOMM_INLINE V even(V a, V b) {
  if constexpr (sizeof(V) / sizeof(a[0]) == 8) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  } else {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  }
}
PYCOMM_INLINE Shorts narrow_two(const Words* codes) {
  return even(__builtin_bit_cast(Shorts, codes[0]), __builtin_bit_cast(Shorts, codes[1]));
}
PYCOMM_INLINE Bytes narrow_four(const Words* codes) {
  return even(__builtin_bit_cast(Bytes, narrow_two(codes)), __builtin_bit_cast(Bytes, narrow_two(codes + 2)));
}
// Each lane's bit is added to those of its neighbours, three times.
PYCOMM_INLINE uint64_t mask_of_four(const Integers* masks) {
  Bytes bits = narrow_four(reinterpret_cast<const Words*>(masks)) &
               Bytes{1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const auto odd = [](Bytes x) {
    return __builtin_shufflevector(x, x, 1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15);
  };
  for (int step = 0; step < 3; ++step) bits = even(bits, bits) + odd(bits);
  return __builtin_bit_cast(Shorts, bits)[0];
}

#endif

PYCOMM_INLINE uint64_t narrow(Words codes, uint16_t) {
  const Words both[2] = {codes, codes};
  return __builtin_bit_cast(VectorOf<uint64_t, 2>::type, narrow_two(both))[0];
}
PYCOMM_INLINE uint32_t narrow(Words codes, uint8_t) {
  const Words four[4] = {codes, codes, codes, codes};
  return __builtin_bit_cast(Words, narrow_four(four))[0];
}
#endif

// kWidth elements of the format F.
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

// The processor's own float16. float8_e5m2 is its upper half; float8_e4m3 is 2^8 times what its bits mean
// there.
inline constexpr int16_t kMiddleBits = static_cast<int16_t>(0xbf80);
#if defined(__AVX512F__)
using HalfCodes = __m256i;
PYCOMM_INLINE HalfCodes upper_halves(const void* bytes) {
  return _mm256_slli_epi16(_mm256_cvtepu8_epi16(load<__m128i>(bytes)), 8);
}
// A float8_e4m3 with its exponent's and its mantissa's bits where a float16 has them.
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

// NaNs come quiet; they keep their signs without their payloads, as decode_word() has it. decode_number(), for
// what becomes canonical anyway, leaves NaNs as they come.
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
  constexpr uint32_t kPast = 0x43f00000;  // 480: what the NaN's code would be
  const Words bits = Lane<Words>::to_bits(from_halves(middle_bits(from)) * 256.0f);
  return Lane<Words>::to_float(bits | __builtin_bit_cast(Words, bits << 1 == kPast << 1) >> 1);
}
PYCOMM_INLINE Floats decode(const void* from, Float16) { return without_payload(decode_number(from, Float16{})); }
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

// Two vectors of a format of 16 bits. kNumbers: of numbers that do not overflow.
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

// Past the cache, where `to` is aligned.
template <class V>
PYCOMM_INLINE void stream(void* to, V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64)
    return _mm512_stream_si512(static_cast<__m512i*>(to), __builtin_bit_cast(__m512i, x));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32)
    return _mm256_stream_si256(static_cast<__m256i*>(to), __builtin_bit_cast(__m256i, x));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16)
    return _mm_stream_si128(static_cast<__m128i*>(to), __builtin_bit_cast(__m128i, x));
  if constexpr (sizeof(V) == 8)
    return _mm_stream_si64(static_cast<long long*>(to), __builtin_bit_cast(long long, x));
#endif
  store(to, x);
}

// Four vectors of the format F. kNumbers: of numbers that do not overflow. kPast: past the cache.
template <bool kNumbers, bool kPast, class F>
PYCOMM_INLINE void encode_four(char* to, const Floats* x, F) {
  const auto leave = [](char* at, auto codes) PYCOMM_LAMBDA {
    if constexpr (kPast) {
      stream(at, codes);
    } else {
      store(at, codes);
    }
  };
  constexpr size_t kBytes = sizeof(typename F::Raw);
  if constexpr (kBytes == 1) {
    Words codes[4];
    for (int i = 0; i < 4; ++i) codes[i] = code_of<kNumbers>(x[i], F{});
    leave(to, narrow_four(codes));
  } else if constexpr (kBytes == 2) {
    for (int i = 0; i < 4; i += 2) leave(to + i * kWidth * kBytes, encoded_two<kNumbers>(x + i, F{}));
  } else {
    for (int i = 0; i < 4; ++i) leave(to + i * kWidth * kBytes, kNumbers ? x[i] : encoded(x[i], F{}));
  }
}

// For statistics: the halves of a vector in float64, and x * x + sum where x * x is exact.
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

// Whole cache lines past the cache: to is aligned to one.
PYCOMM_INLINE void stream_lines(char* to, const char* from, size_t lines) {
  constexpr size_t kLine = 64;
#if defined(__AVX512F__)
  for (size_t i = 0; i < lines * kLine; i += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), load<__m512i>(from + i));
  }
#else
  stream_copy(to, from, lines * kLine);
#endif
}

}  // namespace pycomm::kernels::PYCOMM_ISA
