#include "common/error.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/shared_int.h"

namespace pycomm::kernels::cuda {
namespace {

int64_t halves(int64_t count) { return (count + kHalf - 1) / kHalf; }

void require(DType dtype, int width) {
  if (dtype != DType::float32 && dtype != DType::float16 && dtype != DType::bfloat16) {
    throw TypeError(std::string("codecs carry float32, float16 and bfloat16, not ") + name(dtype));
  }
  if (width != 8 && width != 16 && width != 32) {
    throw ValueError("shared_int of " + std::to_string(width) + " bits: use 8, 16 or 32");
  }
}

}  // namespace

void shared_amax(DType dtype, const void* x, size_t count, float* amax, const Encoding& encoding,
                 const Launch& how) {
  require(dtype, 32);
  each_launch(encoding, static_cast<int64_t>(count), [&](int64_t begin, int64_t n, const Segments& segments) {
    SharedCall call = make_shared_call(dtype, x, nullptr, 32, 0, nullptr, begin, n);
    call.encode = make_encode_call(encoding, true, 0, begin, n, segments);
    call.new_amax = amax + begin / kSharedBlock;
    launch<SharedAmax>(call, halves(n), how, "shared_amax");
  });
}

void shared_encode(DType dtype, const void* x, size_t count, const float* amax, int width, int64_t limit,
                   uint64_t seed, const Encoding& encoding, void* q, const Launch& how) {
  require(dtype, width);
  each_launch(encoding, static_cast<int64_t>(count), [&](int64_t begin, int64_t n, const Segments& segments) {
    SharedCall call = make_shared_call(dtype, x, q, width, limit, amax, begin, n);
    call.encode = make_encode_call(encoding, true, seed, begin, n, segments);
    launch<SharedEncode>(call, halves(n), how, "shared_encode");
  });
}

void shared_decode(const void* q, size_t count, const float* amax, int width, int64_t limit, double divisor,
                   DType dtype, void* x, const Launch& how) {
  require(dtype, width);
  if (count == 0) return;
  const auto n = static_cast<int64_t>(count);
  SharedCall call = make_shared_call(dtype, x, q, width, limit, amax, 0, n);
  call.divisor = static_cast<float>(divisor);
  launch<SharedDecode>(call, halves(n), how, "shared_decode");
}

}  // namespace pycomm::kernels::cuda
