#include "common/error.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/topk.h"

namespace pycomm::kernels::cuda {
namespace {

void require_divides(uintptr_t bytes, const void* p, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  throw ValueError(std::string(what) + " must be at a multiple of " + std::to_string(bytes) + " bytes");
}

}  // namespace

int64_t topk_workspace_bytes(size_t count) { return topk_room(static_cast<int64_t>(count)); }

void topk_encode(const TopkArgs& args, void* workspace, const Launch& how) {
  if (args.dtype != DType::float32 && args.dtype != DType::float16 && args.dtype != DType::bfloat16) {
    throw TypeError(std::string("codecs carry float32, float16 and bfloat16, not ") + name(args.dtype));
  }
  if (args.count >> 32 != 0) {
    throw ValueError("top-k of " + std::to_string(args.count) + " elements: 2^32 - 1 at most");
  }
  require_divides(4, args.record, "a top-k record");
  require_divides(16, workspace, "the workspace of top-k");
  const auto stream = static_cast<cudaStream_t>(how.stream);
  TopkCall call = make_topk_call(args, workspace);
  // Entries beyond the number of elements are zeros.
  if (call.k < args.capacity) {
    check(cudaMemsetAsync(args.record, 0, topk_record_bytes(static_cast<int64_t>(args.capacity)), stream),
          "topk");
  }
  const int64_t chunks = (call.count + kTopkChunk - 1) / kTopkChunk;
  if (call.k > 0) {
    check(cudaMemsetAsync(call.state, 0, sizeof *call.state, stream), "topk");
    for (call.pass = 0; call.pass < kTopkPasses; ++call.pass)
      launch<TopkHistogram>(call, chunks, how, "topk");
  }
  launch<TopkCount>(call, chunks, how, "topk");
  launch<TopkPlace>(call, 1, how, "topk");
  launch<TopkWrite>(call, chunks, how, "topk");
}

void topk_decode_add(const void* record, size_t capacity, float* sum, size_t count, const Launch& how) {
  require_divides(4, record, "a top-k record");
  const auto* header = static_cast<const uint32_t*>(record);
  const TopkAddCall call{.header = header,
                         .indices = header + 4,
                         .values = reinterpret_cast<const float*>(header + 4 + capacity),
                         .capacity = static_cast<uint32_t>(capacity),
                         .sum = sum,
                         .count = static_cast<int64_t>(count)};
  launch<TopkAdd>(call, (static_cast<int64_t>(capacity) + TopkAdd::kThreads - 1) / TopkAdd::kThreads, how,
                  "topk");
}

}  // namespace pycomm::kernels::cuda
