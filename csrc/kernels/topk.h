// The k elements of largest magnitude, and sums of such sparse vectors.
//
// Exactly k, ties to the lowest index, in one pass and without a sort: candidates that reach the threshold so
// far (at first a guess from a sample) are kept, and when there are many, the exact threshold among them is
// found by histograms of magnitudes' bits, the leading ones first. NaN counts as larger than Inf, Inf as
// larger than all finite values, so that both are sent. Any NaN counts alike, and is the canonical one in the
// record.
//
// A record: uint32 count, then padding to 16 bytes, then `capacity` uint32 indices in ascending order, then
// as many float32 values, entries beyond count zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "kernels/isa.h"

namespace pycomm::kernels {

int64_t topk_record_bytes(int64_t capacity);

// v = x + residual_scale * residual where there is one; its min(k, count) largest go into the record, and
// what is left, in units of residual_scale, to next_residual (may be residual). count is below 2^32.
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

// Whether x, of float32, float16 or bfloat16, is finite wherever the record has an entry; to ask once
// topk_decode_add() has found that the record fits.
bool topk_finite(const void* record, size_t capacity, DType dtype, const void* x,
                 const Isa& isa = chosen_isa());

}  // namespace pycomm::kernels
