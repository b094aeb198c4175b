// Top-k's inner loops, over up to kTile elements.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pycomm::kernels {

struct TopkKernels {
  // Appends the elements whose magnitude, as bits, is at least `least`, with indices from `index` on; returns
  // how many. Every NaN counts and is stored as the canonical one.
  size_t (*scan)(const float* x, size_t n, uint32_t least, uint32_t index, uint32_t* indices, float* values);
  void (*keep_residual)(float* next, const float* v, size_t n, float k);  // v / k
};

}  // namespace pycomm::kernels
