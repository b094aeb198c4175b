#include "common/error.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/pack.h"

namespace pycomm::kernels::cuda {
namespace {

constexpr int64_t kStatsRoom = 64;  // bytes for the call's statistics; those of the chunks follow
static_assert(sizeof(Stats) <= kStatsRoom);

bool is_packed(DType dtype) { return dtype != DType::float64 && dtype <= DType::float8_e5m2; }

void require_types(const PackArgs& args) {
  const auto refuse = [](DType dtype) {
    throw TypeError(std::string("pack and unpack take floats of 8 to 32 bits, not ") + name(dtype));
  };
  if (!is_packed(args.dtype)) refuse(args.dtype);
  for (const PackItem& item : args.items) {
    if (!is_packed(item.dtype)) refuse(item.dtype);
  }
}

template <bool kPacks>
struct LaunchPack {
  const PackArgs& args;
  ChunkStats* chunks;
  const Launch& how;

  template <class B>
  void operator()() const {
    make_pack_calls(args, chunks, [&](const PackCall& call) {
      launch<Pack<B, kPacks>>(call, call.tiles, how, kPacks ? "pack" : "unpack");
    });
  }
};

template <bool kPacks>
void run(const PackArgs& args, void* workspace, const Launch& how) {
  require_types(args);
  auto* chunks = reinterpret_cast<ChunkStats*>(static_cast<char*>(workspace) + kStatsRoom);
  pick_bucket(args.dtype, LaunchPack<kPacks>{args, workspace ? chunks : nullptr, how});
  if (!workspace) return;
  launch<Finish>({chunks, count_chunks(args.items), static_cast<Stats*>(workspace)}, 1, how, "pack");
}

}  // namespace

int64_t stats_workspace_bytes(std::span<const PackItem> items) {
  return kStatsRoom + count_chunks(items) * static_cast<int64_t>(sizeof(ChunkStats));
}

void pack(const PackArgs& args, void* workspace, const Launch& how) { run<true>(args, workspace, how); }
void unpack(const PackArgs& args, void* workspace, const Launch& how) { run<false>(args, workspace, how); }

Stats read_stats(const void* workspace, const Launch& how) {
  Stats stats;
  const auto stream = static_cast<cudaStream_t>(how.stream);
  check(cudaMemcpyAsync(&stats, workspace, sizeof stats, cudaMemcpyDeviceToHost, stream),
        "reading statistics");
  check(cudaStreamSynchronize(stream), "reading statistics");
  return stats;
}

}  // namespace pycomm::kernels::cuda
