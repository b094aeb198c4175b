// The statistics of packed values, summed in a fixed order that any number of threads can keep.
//
// The elements of a tensor form chunks of kStatsChunk, counted from its first element; the last one may be
// short. Within a chunk, element i belongs to lane i % kStatsLanes. A lane adds its squares in order, in
// float64, where the square of a float32 is exact; the sums of the lanes are folded to the chunk's sum. The
// chunks of all tensors, in the order of the list, are summed in the same way: chunk c belongs to column c %
// kStatsColumns, a column adds its chunks in order, and the columns are folded to the result. Missing
// elements count as +0, which changes no sum. Largest magnitudes and counts are the same in every order.
//
// (A thread that reads 4, 8 or 16 elements at once takes as many lanes of a chunk, and 32 / 4, 8 or 16
// threads share the chunk. If there are at most kStatsColumns chunks, each column is one chunk.)
#pragma once

#include <cstdint>

#include "kernels/arithmetic/ops.h"
#include "kernels/arithmetic/small_float.h"

namespace pycomm::kernels {

inline constexpr int64_t kStatsChunk = 1024;
inline constexpr int kStatsLanes = 32;
inline constexpr int kStatsColumns = 1024;

namespace PYCOMM_ISA {

// A NaN counts as 0.
PYCOMM_INLINE float numeric(float x) { return x == x ? x : 0.0f; }
PYCOMM_INLINE uint32_t magnitude(float x) { return as_bits(x) & 0x7fffffff; }
PYCOMM_INLINE double add_square(double sum, float x) {
  return sum + static_cast<double>(x) * static_cast<double>(x);
}

// Adds element i + n/2 to element i, then halves n, until one element is left. n is a power of two.
PYCOMM_INLINE double fold(double* sums, int n) {
  for (int half = n / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

// What a code of the format F is: 0 a number, 1 an infinity, 2 a NaN.
template <class F>
PYCOMM_INLINE int special(typename F::Raw code) {
  const uint32_t bits = magnitude(F::decode(code));
  return bits < kFloatInf ? 0 : bits == kFloatInf ? 1 : 2;
}

}  // namespace PYCOMM_ISA
}  // namespace pycomm::kernels
