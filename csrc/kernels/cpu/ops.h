// One element of the inner loops: the operators, and what a final store does to a result. Written without branches so
// that the compiler makes vectors of them. Included by combine_isa.cc alone, see isa.h.
#pragma once

#include <cstddef>
#include <cstdint>

// A call left in a loop keeps it from becoming vectors, and the compiler's own limits leave some.
#define PYCOMM_INLINE [[gnu::always_inline]] inline

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

template <class T>
inline constexpr bool kHasNan = kIsFloat<T>;
template <class T>
inline constexpr bool kHasNan<Complex<T>> = true;

// Integers compute unsigned and at least 32 bits wide: they wrap, and C++'s promotion to int cannot overflow.
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

// -x by its bits, for x times something that is subtracted: gcc 12 fuses multiply and add into one rounding where it
// sees alternating sums and differences of products, -ffp-contract=off or not.
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

// IEEE 754-2019 minimum and maximum. Equal floats differ in bits only as zeros: `or` keeps the sign of a negative
// zero, `and` drops it.
struct Min {
  template <class T>
  PYCOMM_INLINE static T apply(T a, T b) {
    if constexpr (kIsFloat<T>) {
      using U = typename Bits<T>::type;
      const T least = (a < b) | (a != a) ? a : b;
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
      const T most = (a > b) | (a != a) ? a : b;
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

// What a store does to a result: nothing to a partial one; a final one has its NaN made canonical, and is divided by
// the number of ranks before if it is an average.
enum class Finish { none, canonical, average };

template <Finish kFinish, class T>
PYCOMM_INLINE T finish(T x, T divisor) {
  if constexpr (kFinish == Finish::average) x /= divisor;
  if constexpr (kFinish != Finish::none) x = x == x ? x : __builtin_bit_cast(T, Bits<T>::kNan);
  return x;
}

template <Finish kFinish, class T>
PYCOMM_INLINE Complex<T> finish(Complex<T> x, Complex<T> divisor) {
  return {finish<kFinish>(x.re, divisor.re), finish<kFinish>(x.im, divisor.re)};
}

}  // namespace pycomm::kernels::PYCOMM_ISA
