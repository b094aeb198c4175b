#include "common/error.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/transcode.h"

namespace pycomm::kernels::cuda {
namespace {

void require_operands(int count, const char* what) {
  if (count >= 1 && count <= kMaxOperands) return;
  throw ValueError(std::to_string(count) + " " + what + " in one call on the GPU: give 1 to " +
                   std::to_string(kMaxOperands));
}

void copy(const TranscodeArgs& args, const Launch& how) {
  const int64_t bytes = wire_bytes(args.codec->kind, static_cast<int64_t>(args.count));
  for (int d = 0; d < args.num_dsts; ++d) {
    check(cudaMemcpyAsync(args.dsts[d], args.srcs[0], bytes, cudaMemcpyDeviceToDevice,
                          static_cast<cudaStream_t>(how.stream)),
          "transcode: cudaMemcpyAsync");
  }
}

struct LaunchTranscode {
  const TranscodeArgs& args;
  const Launch& how;

  template <class Body>
  void each(const Encoding& encoding) const {
    each_launch(encoding, static_cast<int64_t>(args.count),
                [&](int64_t begin, int64_t count, const Segments& segments) {
                  const auto call =
                      make_transcode_call(args, tile_bytes(args.codec->kind), begin, count, segments);
                  launch<Body>(call, (count + kHalf - 1) / kHalf, how, "transcode");
                });
  }

  template <class C>
  void operator()() const {
    const bool many = args.num_srcs > 4;
    if (args.dst_format == Format::wire) {
      return many ? each<Encode<C, true>>(args.encoding) : each<Encode<C, false>>(args.encoding);
    }
    return many ? each<Decode<C, true>>({}) : each<Decode<C, false>>({});
  }
};

}  // namespace

void transcode(const TranscodeArgs& args, const Launch& how) {
  require_operands(args.num_srcs, "sources");
  require_operands(args.num_dsts, "destinations");
  if (args.dtype != DType::float32 && args.dtype != DType::float16 && args.dtype != DType::bfloat16) {
    throw TypeError(std::string("codecs carry float32, float16 and bfloat16, not ") + name(args.dtype));
  }
  if (args.count == 0) return;
  if (args.num_srcs == 1 && args.src_formats[0] == Format::wire && args.dst_format == Format::wire) {
    return copy(args, how);
  }
  if (!pick_codec(*args.codec, LaunchTranscode{args, how})) {
    throw ValueError("a codec is needed: \"none\" has no wire form");
  }
}

}  // namespace pycomm::kernels::cuda
