// Packs a list of tensors into one bucket and unpacks it again, in one pass that also casts, scales and
// collects statistics.
//
//     bucket[item.offset + i] = cast(item.tensor[i] * scale)      pack
//     item.tensor[i] = cast(bucket[item.offset + i] * scale)      unpack
//
// * Element types are float32, float16, bfloat16, float8_e4m3fn and float8_e5m2; each item has its own. The
//   product is computed in float32 (scale is rounded to it once) and rounded once, to nearest even
//   (arithmetic/small_float.h). scale = 1 between equal types is a copy, bit for bit.
// * Tensors are contiguous, of any length (0 included) and any alignment, and do not overlap anything. One
//   exception: an item may already lie in its place in the bucket. With equal types and scale 1 it is then
//   not copied, otherwise it is converted in place.
// * Statistics describe the values that are written: the sum of squares and the largest magnitude of the
//   scaled float32 values before rounding, both without NaNs, and the counts of NaN and Inf among the stored
//   values. Squares are exact in float64 and summed in a fixed order (arithmetic/stats.h). So the bits are
//   the same on every instruction set and on the GPU, and the sum over 10^9 elements keeps far more than 6
//   digits.
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
  int64_t offset;  // of the first one from the bucket's start, in elements
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
