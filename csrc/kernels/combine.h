// The inner loop of every collective: read k sources once, write m destinations once.
//
// One call does, for each element i in [0, count):
//
//     acc = src[0][i] op src[1][i] op ... op src[k-1][i];   dst[0][i] = ... = dst[m-1][i] = store(acc)
//
// * Operands are contiguous, of any alignment. A destination may be the very same address as a source (in
//   place); otherwise operands do not overlap.
// * Format says what an operand holds. `raw`: the caller's elements as they came (leaves). `partial`:
//   elements of accumulator(dtype), already scaled. `final`: elements of dtype, rounded and finished. `wire`:
//   what a codec made of them: for transcode() alone, see codec.h.
// * One source of the same format as the destination is a copy, bit for bit. Otherwise raw sources are
//   converted to the accumulator and multiplied by `prescale` (premul_sum), partial ones are taken as they
//   are, and a final destination divides by `divisor` (avg: the number of ranks), makes every NaN the
//   canonical quiet one and rounds once. Allowed: raw -> raw copy, partial -> partial, final -> final copy,
//   {raw, partial}* -> partial | final.
// * k sources associate as the balanced binary tree over their order, tree(0, k) = tree(0, p) op tree(p, k)
//   with p the largest power of two below k: bits depend on nothing else, not on alignment, count, or
//   instruction set.
// * `stream` asks for non-temporal stores: for outputs that are larger than the cache and not read again.
//   When the call returns they are ordered before any later store (sfence).
//
// prescale applies to sum and avg only, on floats and complex; divisor is 1 unless the operator is avg.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "kernels/isa.h"

namespace pycomm::kernels {

enum class Format : uint8_t { raw, partial, final, wire };

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

// What makes a sum over `num_ranks` an average that overflows nowhere on the way: elements are multiplied by
// the power of two that is 1 / num_ranks or the next below, the sum divided by what is left. The bits are
// those of the sum divided by num_ranks, but where that sum overflows, and where an element is so small
// (below num_ranks times the least normal number) that the power of two takes bits from it. Elements whose
// accumulator has room for any sum are not scaled.
struct Average {
  double prescale = 1.0, divisor = 1.0;
};
Average average(DType dtype, int num_ranks);

using CombineFn = void (*)(const CombineArgs&);

// The kernel for this pair. The pair must satisfy supports(dtype, op).
CombineFn find_combine(DType dtype, Op op, const Isa& isa = chosen_isa());

}  // namespace pycomm::kernels
