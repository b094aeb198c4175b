// Arithmetic on single elements for the inner loops: the operators, and the conversions from memory and back.
// It has no branches, so that the compiler vectorises it. Only sources that are built for each instruction
// set, or for the GPU, include this file (see isa.h).
#pragma once

#include <cstddef>
#include <cstdint>

// Forces inlining: a call left in a loop prevents vectorisation, and the compiler's own limits would leave
// some.
#if defined(__CUDACC__)
#define PYCOMM_INLINE __host__ __device__ __forceinline__
#else
#define PYCOMM_INLINE [[gnu::always_inline]] inline
#endif

namespace pycomm::kernels::PYCOMM_ISA {

template <class T>
struct Bits;  // the unsigned integer that overlays a float, and the canonical NaN in it
template <>
struct Bits<float> {
  using type = uint32_t;
  static constexpr type kNan = 0x7fc00000;
};
template <>
struct Bits<double> {
  using type = uint64_t;
  static constexpr type kNan = 0x7ff8000000000000;
};

template <class T>
inline constexpr bool kIsFloat = false;
template <>
inline constexpr bool kIsFloat<float> = true;
template <>
inline constexpr bool kIsFloat<double> = true;

template <class T>
struct Complex {
  T re, im;
};

// Integers are computed unsigned and at least 32 bits wide: they wrap, and C++'s promotion to int cannot
// overflow.
template <class T>
PYCOMM_INLINE auto widen(T x) {
  if constexpr (kIsFloat<T>) {
    return x;
  } else if constexpr (sizeof(T) == 8) {
    return static_cast<uint64_t>(x);
  } else {
    return static_cast<uint32_t>(x);
  }
}

// -x by its sign bit, to subtract a product: gcc 12 fuses multiply and add into one rounding where it sees
// alternating sums and differences of products, even under -ffp-contract=off.
template <class T>
PYCOMM_INLINE T negate(T x) {
  using U = typename Bits<T>::type;
  return __builtin_bit_cast(T, static_cast<U>(__builtin_bit_cast(U, x) ^ U{1} << (8 * sizeof(T) - 1)));
}

struct Sum {
  template <class T>
  PYCOMM_INLINE static T apply(T a, T b) {
    return static_cast<T>(widen(a) + widen(b));
  }
};

template <class O>
inline constexpr bool kIsSum = false;
template <>
inline constexpr bool kIsSum<Sum> = true;

struct Prod {
  template <class T>
  PYCOMM_INLINE static T apply(T a, T b) {
    return static_cast<T>(widen(a) * widen(b));
  }
  template <class T>
  PYCOMM_INLINE static Complex<T> apply(Complex<T> a, Complex<T> b) {
    return {a.re * b.re + negate(a.im) * b.im, a.re * b.im + a.im * b.re};
  }
};

// IEEE 754-2019 minimum and maximum. Two equal floats with different bits are zeros: `or` keeps the sign of a
// negative zero, `and` drops it.
struct Min {
  template <class T>
  PYCOMM_INLINE static T apply(T a, T b) {
    if constexpr (kIsFloat<T>) {
      using U = typename Bits<T>::type;
      const T least = ((a < b) | (a != a)) ? a : b;
      const U both = __builtin_bit_cast(U, a) | __builtin_bit_cast(U, b);
      return a == b ? __builtin_bit_cast(T, both) : least;
    } else {
      return a < b ? a : b;
    }
  }
};

struct Max {
  template <class T>
  PYCOMM_INLINE static T apply(T a, T b) {
    if constexpr (kIsFloat<T>) {
      using U = typename Bits<T>::type;
      const T most = ((a > b) | (a != a)) ? a : b;
      const U both = __builtin_bit_cast(U, a) & __builtin_bit_cast(U, b);
      return a == b ? __builtin_bit_cast(T, both) : most;
    } else {
      return a > b ? a : b;
    }
  }
};

struct Band {
  template <class T>
  PYCOMM_INLINE static T apply(T a, T b) {
    return static_cast<T>(a & b);
  }
};

struct Bor {
  template <class T>
  PYCOMM_INLINE static T apply(T a, T b) {
    return static_cast<T>(a | b);
  }
};

struct Bxor {
  template <class T>
  PYCOMM_INLINE static T apply(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};

// How an element in memory becomes a value to compute with, and how a result becomes an element: one of
// these, or of the small floats (small_float.h).
template <class T>
struct Plain {  // partial results, and integers
  using Raw = T;
  using Value = T;
  PYCOMM_INLINE static T decode(T x) { return x; }
  PYCOMM_INLINE static T encode(T x) { return x; }
};

template <class T>
struct Wide {  // raw and final floats: a final NaN is the canonical one
  using Raw = T;
  using Value = T;
  PYCOMM_INLINE static T decode(T x) { return x; }
  PYCOMM_INLINE static T encode(T x) { return x == x ? x : __builtin_bit_cast(T, Bits<T>::kNan); }
};

template <class T>
struct Wide<Complex<T>> {
  using Raw = Complex<T>;
  using Value = Complex<T>;
  PYCOMM_INLINE static Value decode(Value x) { return x; }
  PYCOMM_INLINE static Value encode(Value x) { return {Wide<T>::encode(x.re), Wide<T>::encode(x.im)}; }
};

}  // namespace pycomm::kernels::PYCOMM_ISA
