// Lists of tensors into one bucket and back, in one pass: cast, scale, and statistics on the way.
//
//     bucket[item.offset + i] = cast(item.tensor[i] * scale)      pack
//     item.tensor[i] = cast(bucket[item.offset + i] * scale)      unpack
//
// * Element types: float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, each item's its own. The product
//   is float32 (scale is rounded to it once) and is rounded once, to nearest even, as
//   arithmetic/small_float.h says. scale = 1 between equal types is a copy, bit for bit.
// * Tensors are contiguous, of any length (0 included) and any alignment; they overlap nothing, but for an
//   item that lies in its place in the bucket already: with equal types and scale 1 it is not copied, else it
//   is worked on in place.
// * Statistics are of the values that are written: the sum of squares and the largest magnitude of the scaled
//   float32 values before rounding, NaNs left out of both; the counts of NaN and of Inf of what the bucket or
//   tensor then holds. Squares are exact in float64 and their sums' order is fixed (arithmetic/stats.h), so
//   that the same bits come out on every instruction set and on the GPU, and 10^9 elements keep far more than
//   6 digits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "common/dtype.h"
#include "kernels/isa.h"

namespace pycomm::kernels {

struct PackItem {
  void* tensor;
  DType dtype;
  int64_t count;   // elements
  int64_t offset;  // of the first one in the bucket, in elements
};

struct PackArgs {
  std::span<const PackItem> items;
  void* bucket;
  DType dtype;  // of the bucket
  double scale = 1.0;
};

struct Stats {
  double sum_squares = 0;
  float max_abs = 0;
  int64_t nans = 0, infs = 0;
  bool operator==(const Stats&) const = default;
};

void pack(const PackArgs& args, Stats* stats, const Isa& isa = chosen_isa());  // stats may be null
void unpack(const PackArgs& args, Stats* stats, const Isa& isa = chosen_isa());

}  // namespace pycomm::kernels
