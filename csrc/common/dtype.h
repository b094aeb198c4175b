// Element types and reduction operators, the words for them, and which pairs make sense.
//
//   sum, prod        every number (bool: a TypeError that names bor and band)
//   min, max         every real number and bool; IEEE 754-2019 minimum and maximum: a NaN on any rank is a
//                    NaN everywhere, and -0 < +0
//   avg              floats and complex: the sum divided by the number of ranks
//   band, bor, bxor  integers and bool
//
// A bool is a byte of 0 or 1; in others, which views of bytes may hold, the bits are combined.
// float16, bfloat16 and both float8 are accumulated in float32 and rounded once, to nearest even, at the
// final store. Overflow follows the format: float8_e4m3fn has no infinity and gives NaN, float8_e5m2 and the
// others give Inf.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace pycomm {

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
// The type partial results are held in: float32 for the 16- and 8-bit floats, else the type itself.
DType accumulator(DType dtype);
const char* name(DType dtype);  // "float32", ..., "bool": NumPy's and ml_dtypes' names
const char* name(Op op);
// Also "bf16", "fp32", "half", "torch.float16" and so on, in upper or lower case. Throws TypeError that lists
// the names, and says which may have been meant.
DType parse_dtype(std::string_view name);
Op parse_op(std::string_view name);  // the name itself; throws ValueError that does the same
bool supports(DType dtype, Op op);
Op any_op(DType dtype);            // some operator that makes sense on it: for calls that only move data
void require(DType dtype, Op op);  // throws TypeError that says which operators or types would do

// What makes a sum over `num_ranks` an average that overflows nowhere on the way: elements are multiplied by
// the power of two that is 1 / num_ranks or the next below, the sum divided by what is left. The bits are
// those of the sum divided by num_ranks, but where that sum overflows, and where an element is so small
// (below num_ranks times the least normal number) that the power of two takes bits from it. Elements whose
// accumulator has room for any sum are not scaled.
struct Average {
  double prescale = 1.0, divisor = 1.0;
};
Average average(DType dtype, int num_ranks);

}  // namespace pycomm
