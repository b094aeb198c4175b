#include "kernels/combine.h"

#include <bit>

#include "kernels/cpu/isa.h"

namespace pycomm::kernels {

Average average(DType dtype, int num_ranks) {
  switch (dtype) {
    case DType::float32:
    case DType::float64:
    case DType::bfloat16:  // as far as float32, in which it is summed
    case DType::complex64:
    case DType::complex128: {
      const double scale = 1.0 / static_cast<double>(std::bit_ceil(static_cast<unsigned>(num_ranks)));
      return {scale, num_ranks * scale};
    }
    default:
      return {1.0, static_cast<double>(num_ranks)};
  }
}

CombineFn find_combine(DType dtype, Op op, const Isa& isa) { return isa.find_combine(dtype, op); }

}  // namespace pycomm::kernels
