// The statistics of packed values, in an order that any number of threads can keep.
//
// A tensor's elements form chunks of kStatsChunk, counted from its first element; the last one may be short.
// In a chunk element i belongs to lane i % kStatsLanes, which adds its squares in order, in float64: the
// square of a float32 is exact there. The lanes' sums are folded to the chunk's sum. The chunks of all
// tensors, one after another in the order of the list, go to columns in the same way: chunk c to column c %
// kStatsColumns, which adds in order; the columns are folded to the result. What is missing counts as +0,
// which changes no sum. Largest magnitudes and counts are the same in every order.
//
// (A thread that reads 4, 8 or 16 elements at once has as many lanes of a chunk, and 32 / 4, 8 or 16 threads
// have it whole. The columns of up to kStatsColumns chunks are the chunks themselves.)
#pragma once

#include <cstdint>

#include "kernels/arithmetic/ops.h"
#include "kernels/arithmetic/small_float.h"

namespace pycomm::kernels {

inline constexpr int64_t kStatsChunk = 1024;
inline constexpr int kStatsLanes = 32;
inline constexpr int kStatsColumns = 1024;

namespace PYCOMM_ISA {

// NaNs count as nothing.
PYCOMM_INLINE float numeric(float x) { return x == x ? x : 0.0f; }
PYCOMM_INLINE uint32_t magnitude(float x) { return as_bits(x) & 0x7fffffff; }
PYCOMM_INLINE double add_square(double sum, float x) {
  return sum + static_cast<double>(x) * static_cast<double>(x);
}

// Element i takes i + n/2's, until one is left. n is a power of two.
PYCOMM_INLINE double fold(double* sums, int n) {
  for (int half = n / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

// A code of the format F: 0 for a number, 1 for an infinity, 2 for a NaN.
template <class F>
PYCOMM_INLINE int special(typename F::Raw code) {
  const uint32_t bits = magnitude(F::decode(code));
  return bits < kFloatInf ? 0 : bits == kFloatInf ? 1 : 2;
}

}  // namespace PYCOMM_ISA
}  // namespace pycomm::kernels
