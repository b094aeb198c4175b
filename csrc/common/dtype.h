// Element types and reduction operators: their names, and which pairs are allowed.
//
//   sum, prod        every number (bool: a TypeError that names bor and band)
//   min, max         every real number and bool; IEEE 754-2019 minimum and maximum: a NaN on any rank is a
//                    NaN everywhere, and -0 < +0
//   avg              floats and complex: the sum divided by the number of ranks
//   band, bor, bxor  integers and bool
//
// A bool is a byte that holds 0 or 1. A view of bytes may hold other values; operators then combine their
// bits. float16, bfloat16 and both float8 types are accumulated in float32 and rounded once, to nearest even,
// at the final store. Overflow follows the format: float8_e4m3fn has no infinity and gives NaN, float8_e5m2
// and the others give Inf.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace pycomm {

// A new one is a row of the table in dtype.cc as well, in the same place.
enum class DType : uint8_t {
  float32,
  float64,
  float16,
  bfloat16,
  float8_e4m3fn,
  float8_e5m2,
  int8,
  int16,
  int32,
  int64,
  uint8,
  uint16,
  uint32,
  uint64,
  bool_,
  complex64,
  complex128,
};
inline constexpr int kNumDTypes = 17;

enum class Op : uint8_t { sum, prod, min, max, avg, band, bor, bxor };
inline constexpr int kNumOps = 8;

size_t size_of(DType dtype);
// The type of partial results: float32 for the 16- and 8-bit floats, else the type itself.
DType accumulator(DType dtype);
const char* name(DType dtype);  // "float32", ..., "bool": NumPy's and ml_dtypes' names
const char* name(Op op);
// Accepts also "bf16", "fp32", "half", "torch.float16" and the like, in upper or lower case. Throws TypeError
// that lists the names and suggests the nearest.
DType parse_dtype(std::string_view name);
Op parse_op(std::string_view name);  // exact names only; throws ValueError in the same form
bool supports(DType dtype, Op op);
Op any_op(DType dtype);            // an operator that it supports, for calls that only move data
void require(DType dtype, Op op);  // throws TypeError listing the operators and types that work

// How to average over `num_ranks` ranks without an overflow on the way: elements are multiplied by
// `prescale`, the largest power of two that is at most 1 / num_ranks, and the sum is divided by `divisor`.
// The bits equal those of the plain sum divided by num_ranks, except where the plain sum overflows, and where
// an element is so small (below num_ranks times the least normal number) that scaling drops some of its bits.
// Types whose accumulator has room for any sum are not scaled.
struct Average {
  double prescale = 1.0, divisor = 1.0;
};
Average average(DType dtype, int num_ranks);

}  // namespace pycomm
