// The inner loop of every collective: read k sources once, write m destinations once.
//
// One call does, for each element i in [0, count):
//
//     acc = src[0][i] op src[1][i] op ... op src[k-1][i];   dst[0][i] = ... = dst[m-1][i] = store(acc)
//
// * Operands are contiguous, of any alignment. A destination may have the same address as a source (in
//   place); otherwise operands do not overlap.
// * Format says what an operand holds; no operand is `wire`.
// * A single source of the destination's format is copied bit for bit. Otherwise raw sources are converted to
//   the accumulator type and multiplied by `prescale` (premul_sum), and partial ones are taken as they are.
//   For a final destination the result is divided by `divisor` (avg: the number of ranks), every NaN becomes
//   the canonical quiet one, and the result is rounded once. Allowed: raw -> raw copy, partial -> partial,
//   final -> final copy, {raw, partial}* -> partial | final.
// * k sources associate as the balanced binary tree over their order, tree(0, k) = tree(0, p) op tree(p, k)
//   with p the largest power of two below k. So the bits do not depend on alignment, count, or instruction
//   set.
// * `stream` asks for non-temporal stores: for outputs that are larger than the cache and not read again
//   soon. When the call returns, they are ordered before any later store (sfence).
//
// prescale applies to sum and avg only, on floats and complex; divisor is 1 unless the operator is avg.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/format.h"
#include "kernels/isa.h"

namespace pycomm::kernels {

struct CombineArgs {
  void* const* dsts;
  const void* const* srcs;
  const Format* src_formats;  // one per source
  int num_dsts;               // >= 1
  int num_srcs;               // >= 1
  Format dst_format;          // all destinations share it
  bool stream = false;
  size_t count = 0;  // elements
  double prescale = 1.0;
  double divisor = 1.0;
};

using CombineFn = void (*)(const CombineArgs&);

// The kernel for this pair, which must satisfy supports(dtype, op).
CombineFn find_combine(DType dtype, Op op, const Isa& isa = chosen_isa());

}  // namespace pycomm::kernels
