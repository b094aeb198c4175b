// Vectors as wide as the instruction set allows: loads, stores, narrowing and widening. Only *_isa.cc include
// this file, see isa.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

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

// An element in memory, at any address, whatever the declared type there.
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

// Prefetches what is read kAhead bytes later. The processor's own prefetching stops at the end of a page. A
// core can have some 20 lines in flight, so each step of a loop's arithmetic should prefetch a few; if two
// loops pass over the same data, the first should prefetch every second line.
inline constexpr size_t kLine = 64, kAhead = 8192;
template <size_t kEvery = 1>
PYCOMM_INLINE void prefetch(const void* p, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p) + kAhead;  // anywhere: a prefetch never faults
  for (size_t line = 0; line < bytes; line += kEvery * kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(begin + line));
  }
}

// Widens codes of 8 and 16 bits to words.
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

#elif defined(__AVX2__)

PYCOMM_INLINE __m128i load_eight(const void* from) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(from));
}
PYCOMM_INLINE Words widen(const void* from, uint8_t) {
  return __builtin_bit_cast(Words, _mm256_cvtepu8_epi32(load_eight(from)));
}
PYCOMM_INLINE Integers widen(const void* from, int8_t) {
  return __builtin_bit_cast(Integers, _mm256_cvtepi8_epi32(load_eight(from)));
}
PYCOMM_INLINE Words widen(const void* from, uint16_t) {
  return __builtin_bit_cast(Words, _mm256_cvtepu16_epi32(load<__m128i>(from)));
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
      __builtin_bit_cast(Shorts, __builtin_shufflevector(__builtin_bit_cast(Bytes, low), Bytes{}, 0, 16, 1,
                                                         17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)));
}
PYCOMM_INLINE Integers widen(const void* from, int8_t) {
  return __builtin_bit_cast(Integers, widen(from, uint8_t{}) << 24) >> 24;
}

#endif

PYCOMM_INLINE Integers widen(const void* from, int16_t) {
  return __builtin_bit_cast(Integers, widen(from, uint16_t{}) << 16) >> 16;
}

// Narrows two vectors to one of half the bits, in the processor's order, which may be lane by lane. Signed
// elements of 32 and 16 bits saturate; halve_unsigned() turns those of 16 bits into unsigned bytes.
// in_order() sorts the result of two such steps on four vectors.
#if defined(__AVX512F__)

using Packed = __m512i;
PYCOMM_INLINE Packed halve_words(Packed a, Packed b) { return _mm512_packs_epi32(a, b); }
PYCOMM_INLINE Packed halve_shorts(Packed a, Packed b) { return _mm512_packs_epi16(a, b); }
PYCOMM_INLINE Packed halve_unsigned(Packed a, Packed b) { return _mm512_packus_epi16(a, b); }
PYCOMM_INLINE Packed in_order(Packed bytes) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, bytes);
}

// Narrows two vectors of words to 16-bit codes.
PYCOMM_INLINE Packed narrow_two(const Words* codes) {
  const auto at = [&](int i) { return __builtin_bit_cast(Packed, codes[i]); };
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return _mm512_permutexvar_epi64(order, _mm512_packus_epi32(at(0), at(1)));
}

#elif defined(__AVX2__)

using Packed = __m256i;
PYCOMM_INLINE Packed halve_words(Packed a, Packed b) { return _mm256_packs_epi32(a, b); }
PYCOMM_INLINE Packed halve_shorts(Packed a, Packed b) { return _mm256_packs_epi16(a, b); }
PYCOMM_INLINE Packed halve_unsigned(Packed a, Packed b) { return _mm256_packus_epi16(a, b); }
PYCOMM_INLINE Packed in_order(Packed bytes) {
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
PYCOMM_INLINE Packed narrow_two(const Words* codes) {
  const auto at = [&](int i) { return __builtin_bit_cast(Packed, codes[i]); };
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(at(0), at(1)), _MM_SHUFFLE(3, 1, 2, 0));
}

#elif defined(__SSE2__)

using Packed = __m128i;
PYCOMM_INLINE Packed halve_words(Packed a, Packed b) { return _mm_packs_epi32(a, b); }
PYCOMM_INLINE Packed halve_shorts(Packed a, Packed b) { return _mm_packs_epi16(a, b); }
PYCOMM_INLINE Packed halve_unsigned(Packed a, Packed b) { return _mm_packus_epi16(a, b); }
PYCOMM_INLINE Packed in_order(Packed bytes) { return bytes; }
PYCOMM_INLINE Packed narrow_two(const Words* codes) {  // sign-extended first, so that none saturates
  const auto at = [&](int i) {
    return __builtin_bit_cast(Packed, __builtin_bit_cast(Integers, codes[i] << 16) >> 16);
  };
  return _mm_packs_epi32(at(0), at(1));
}

#else

using Packed = Bytes;
using SignedShorts = VectorOf<int16_t, 8>::type;
PYCOMM_INLINE Shorts even(Shorts a, Shorts b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
}
PYCOMM_INLINE Bytes even(Bytes a, Bytes b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
template <class V, class Half>
PYCOMM_INLINE Packed halve(Packed a, Packed b, int least, int most) {
  using T = std::remove_cvref_t<decltype(V{}[0])>;
  const auto held = [&](Packed x) {
    const V low = V{} + static_cast<T>(least), high = V{} + static_cast<T>(most);
    return __builtin_bit_cast(Half, larger(low, smaller(high, __builtin_bit_cast(V, x))));
  };
  return __builtin_bit_cast(Packed, even(held(a), held(b)));
}
PYCOMM_INLINE Packed halve_words(Packed a, Packed b) { return halve<Integers, Shorts>(a, b, -32768, 32767); }
PYCOMM_INLINE Packed halve_shorts(Packed a, Packed b) { return halve<SignedShorts, Bytes>(a, b, -128, 127); }
PYCOMM_INLINE Packed halve_unsigned(Packed a, Packed b) { return halve<SignedShorts, Bytes>(a, b, 0, 255); }
PYCOMM_INLINE Packed in_order(Packed bytes) { return bytes; }
PYCOMM_INLINE Packed narrow_two(const Words* codes) {
  const auto at = [&](int i) { return __builtin_bit_cast(Shorts, codes[i]); };
  return __builtin_bit_cast(Packed, even(at(0), at(1)));
}

#endif

using PackedBytes = VectorOf<uint8_t, 4 * kWidth>::type;
using PackedIntegers = VectorOf<int8_t, 4 * kWidth>::type;

// Narrows four vectors to one.
template <class V>
PYCOMM_INLINE Packed halve_four(const V* x, Packed (*last)(Packed, Packed)) {
  const auto at = [&](int i) { return __builtin_bit_cast(Packed, x[i]); };
  return last(halve_words(at(0), at(1)), halve_words(at(2), at(3)));
}
// Narrows codes.
PYCOMM_INLINE Packed narrow_four(const Words* codes) { return in_order(halve_four(codes, halve_unsigned)); }
// Narrows integers, clamped to [-limit, limit].
PYCOMM_INLINE PackedIntegers narrow_four(const Integers* x, int limit) {
  const PackedIntegers most = PackedIntegers{} + static_cast<int8_t>(limit);
  const auto bytes = __builtin_bit_cast(PackedIntegers, in_order(halve_four(x, halve_shorts)));
  return larger(smaller(bytes, most), -most);
}
// Narrows codes below 0x80 and adds the signs of as many floats.
PYCOMM_INLINE Packed narrow_four(const Words* codes, const Floats* signs) {
  const auto sign = __builtin_bit_cast(PackedBytes, halve_four(signs, halve_shorts)) & 0x80;
  return in_order(
      __builtin_bit_cast(Packed, __builtin_bit_cast(PackedBytes, halve_four(codes, halve_unsigned)) | sign));
}

// Whether no lane is below `least`; both below 2^31.
PYCOMM_INLINE bool all_reach(Words x, uint32_t least) {
  const auto below = __builtin_bit_cast(Integers, x) < static_cast<int32_t>(least);
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(__builtin_bit_cast(__m512i, below)) == 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(__builtin_bit_cast(__m256, below)) == 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(__builtin_bit_cast(__m128, below)) == 0;
#else
  const auto any = __builtin_bit_cast(VectorOf<uint64_t, kWidth / 2>::type, below);
  return (any[0] | any[1]) == 0;
#endif
}

// A bit for each lane of four vectors of masks; those of the first vector are lowest.
PYCOMM_INLINE uint64_t mask_of_four(const Integers* masks) {
#if defined(__AVX512F__)
  const auto at = [&](int i) {
    return uint64_t{_mm512_movepi32_mask(__builtin_bit_cast(__m512i, masks[i]))} << 16 * i;
  };
  return at(0) | at(1) | at(2) | at(3);
#else
  const Packed bytes = in_order(halve_four(masks, halve_shorts));
#if defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
#else
  // Each lane's bit is added to those of its neighbours, three times.
  Bytes bits = bytes & Bytes{1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  for (int step = 0; step < 3; ++step) {
    bits = even(bits, bits) +
           __builtin_shufflevector(bits, bits, 1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15);
  }
  return __builtin_bit_cast(Shorts, bits)[0];
#endif
#endif
}

// Narrows one vector of codes.
#if defined(__AVX512F__)
PYCOMM_INLINE __m128i narrow(Words codes, uint8_t) {
  return _mm512_cvtepi32_epi8(__builtin_bit_cast(__m512i, codes));
}
PYCOMM_INLINE __m256i narrow(Words codes, uint16_t) {
  return _mm512_cvtepi32_epi16(__builtin_bit_cast(__m512i, codes));
}
#elif defined(__AVX2__)
PYCOMM_INLINE __m128i narrow(Words codes, uint16_t) {
  const auto words = __builtin_bit_cast(__m256i, codes);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
PYCOMM_INLINE uint64_t narrow(Words codes, uint8_t) {
  const __m128i halves = narrow(codes, uint16_t{});
  return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_packus_epi16(halves, halves)));
}
#else
PYCOMM_INLINE uint64_t narrow(Words codes, uint16_t) {
  const Words both[2] = {codes, codes};
  return __builtin_bit_cast(VectorOf<uint64_t, 2>::type, narrow_two(both))[0];
}
PYCOMM_INLINE uint32_t narrow(Words codes, uint8_t) {
  const Words four[4] = {codes, codes, codes, codes};
  return __builtin_bit_cast(Words, narrow_four(four))[0];
}
#endif

}  // namespace pycomm::kernels::PYCOMM_ISA
