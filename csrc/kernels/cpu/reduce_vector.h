// Reductions of many short blocks at once: as many vectors as a vector has lanes, one for each block, become
// one vector of their results. Each step combines lanes i and i ^ kHalf of a vector, so that a sum is the sum
// by halves that SignCode requires.
#pragma once

#include <cstdint>
#include <utility>

#include "kernels/arithmetic/ops.h"
#include "kernels/cpu/vectors.h"

namespace pycomm::kernels::PYCOMM_ISA {

struct Largest {
  PYCOMM_INLINE static Words apply(Words a, Words b) { return larger(a, b); }
};
struct Total {
  template <class V>
  PYCOMM_INLINE static V apply(V a, V b) {
    return a + b;
  }
};

template <class O, int kHalf, class V, int... i>
PYCOMM_INLINE V pair(V a, V b, std::integer_sequence<int, i...>) {
  return O::apply(__builtin_shufflevector(a, b, (i & kHalf ? kWidth + i : i)...),
                  __builtin_shufflevector(a, b, (i & kHalf ? kWidth + (i ^ kHalf) : i ^ kHalf)...));
}

// Lane i of the result is the reduction of vectors[i]. Overwrites the vectors.
template <class O, int kHalf = kWidth / 2, class V>
PYCOMM_INLINE V reduce_each(V* vectors) {
  for (int i = 0; i < kHalf; ++i) {
    vectors[i] = pair<O, kHalf>(vectors[i], vectors[i + kHalf], std::make_integer_sequence<int, kWidth>());
  }
  if constexpr (kHalf > 1) {
    return reduce_each<O, kHalf / 2>(vectors);
  } else {
    return vectors[0];
  }
}

// The largest lane of one vector.
PYCOMM_INLINE uint32_t largest(Words top) {
  uint32_t words[kWidth];
  store(words, top);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) words[i] = words[i] > words[i + half] ? words[i] : words[i + half];
  }
  return words[0];
}

// Reduces load(v) over kVectors vectors v: v takes v + kVectors / 2, then v + kVectors / 4, ...
template <class O, int kVectors, class Load>
PYCOMM_INLINE auto over_lanes(Load load, int at = 0, int stride = 1) {
  if constexpr (kVectors == 1) {
    return load(at);
  } else {
    return O::apply(over_lanes<O, kVectors / 2>(load, at, 2 * stride),
                    over_lanes<O, kVectors / 2>(load, at + stride, 2 * stride));
  }
}

}  // namespace pycomm::kernels::PYCOMM_ISA
