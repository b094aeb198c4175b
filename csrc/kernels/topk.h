// The k elements of largest magnitude, and sums of such sparse vectors.
//
// Exactly k elements, ties to the lowest index, in one pass and without a sort. Elements that reach the
// current threshold (at first a guess from a sample) are kept as candidates; when there are many, histograms
// of the bits of their magnitudes, leading bits first, give the exact threshold among them. NaN counts as
// larger than Inf, and Inf as larger than all finite values, so that both are sent. All NaNs count alike, and
// the record holds the canonical one.
//
// A record is a uint32 count, padding to 16 bytes, `capacity` uint32 indices in ascending order, and
// `capacity` float32 values; entries beyond the count are zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "kernels/isa.h"

namespace pycomm::kernels {

int64_t topk_record_bytes(int64_t capacity);

// v = x + residual_scale * residual (v = x without a residual). The min(k, count) largest elements of v go
// into the record. The others, in units of residual_scale, go to next_residual, which may be `residual`.
// count is below 2^32.
struct TopkArgs {
  DType dtype;  // float32, float16, bfloat16
  const void* x;
  size_t count;
  size_t capacity;
  void* record;
  const float* residual = nullptr;
  float* next_residual = nullptr;
  float residual_scale = 1;
};
void topk_encode(const TopkArgs& args, const Isa& isa = chosen_isa());

// sum[index] += value for each entry. Throws ValueError for a record that does not fit `count` elements.
void topk_decode_add(const void* record, size_t capacity, float* sum, size_t count);

// Whether x (float32, float16 or bfloat16) is finite at every index of the record. The record must have
// passed topk_decode_add() before.
bool topk_finite(const void* record, size_t capacity, DType dtype, const void* x,
                 const Isa& isa = chosen_isa());

}  // namespace pycomm::kernels
