#include "common/error.h"
#include "kernels/cuda/combine.h"
#include "kernels/cuda/launch.cuh"

namespace pycomm::kernels::cuda {
namespace {

void require_operands(int count, const char* what) {
  if (count >= 1 && count <= kMaxOperands) return;
  throw ValueError(std::to_string(count) + " " + what + " in one call on the GPU: give 1 to " +
                   std::to_string(kMaxOperands));
}

void copy(const CombineArgs& args, int64_t bytes, const Launch& how) {
  for (int d = 0; d < args.num_dsts; ++d) {
    if (args.dsts[d] == args.srcs[0]) continue;
    check(cudaMemcpyAsync(args.dsts[d], args.srcs[0], bytes, cudaMemcpyDeviceToDevice,
                          static_cast<cudaStream_t>(how.stream)),
          "combine: cudaMemcpyAsync");
  }
}

struct LaunchCombine {
  const CombineArgs& args;
  const Launch& how;

  template <class F, class O, int kParts>
  void operator()() const {
    const auto call = make_combine_call<typename F::Raw, typename F::Value>(args, kParts);
    if (args.num_srcs > kGroup) {
      using Body = Combine<F, O, true>;
      launch<Body>(call, Body::blocks(call), how, "combine");
    } else {
      using Body = Combine<F, O, false>;
      launch<Body>(call, Body::blocks(call), how, "combine");
    }
  }
};

}  // namespace

void combine(DType dtype, Op op, const CombineArgs& args, const Launch& how) {
  require(dtype, op);
  require_operands(args.num_srcs, "sources");
  require_operands(args.num_dsts, "destinations");
  if (args.count == 0) return;
  if (args.num_srcs == 1 && args.src_formats[0] == args.dst_format) {
    const DType held = args.dst_format == Format::partial ? accumulator(dtype) : dtype;
    return copy(args, static_cast<int64_t>(args.count * size_of(held)), how);
  }
  pick_combine(dtype, op, LaunchCombine{args, how});
}

}  // namespace pycomm::kernels::cuda
