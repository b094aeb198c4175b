#include "kernels/combine.h"

#include "kernels/cpu/isa.h"

namespace pycomm::kernels {

CombineFn find_combine(DType dtype, Op op, const Isa& isa) { return isa.find_combine(dtype, op); }

}  // namespace pycomm::kernels
