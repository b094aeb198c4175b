// The kernels for buffers in GPU memory, under the contracts of combine.h, pack.h, codec.h and topk.h: the
// same arguments, the same bits.
//
// * Pointers are device pointers; the arguments themselves (lists of pointers, items, segments) lie in host
//   memory and are copied into the launch before the call returns. So nothing must outlive the call, no
//   copy synchronises, and a captured graph holds all that its replays need.
// * Calls enqueue on the stream of `launch` and return. The stream's device must be the current one
//   (DeviceGuard).
// * Nothing is allocated: a call that needs memory to work in says how much, and the caller gives it. The
//   call uses it until the stream has passed the call.
// * One exception to "the same bits": a NaN in a *partial* result may be another NaN than the CPU's.
//
// Usage errors are TypeError and ValueError; what CUDA reports is a std::runtime_error with CUDA's name of
// it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "common/dtype.h"
#include "kernels/codec.h"
#include "kernels/combine.h"
#include "kernels/pack.h"
#include "kernels/topk.h"

namespace pycomm::kernels::cuda {

struct Launch {
  void* stream = nullptr;  // a cudaStream_t; null is the legacy default stream
  int blocks = 0;          // at most that many; 0: as many as fill the device. Results do not depend on it
};

inline constexpr int kMaxOperands = 128;  // sources, and destinations, of one call

// `args.stream` is about the CPU's caches and has no meaning here.
void combine(DType dtype, Op op, const CombineArgs& args, const Launch& launch);

// pack.h. `workspace`: null, or device memory of stats_workspace_bytes() at a multiple of 16, which then
// holds the statistics; read_stats() waits for the stream and reads them.
int64_t stats_workspace_bytes(std::span<const PackItem> items);
void pack(const PackArgs& args, void* workspace, const Launch& launch);
void unpack(const PackArgs& args, void* workspace, const Launch& launch);
Stats read_stats(const void* workspace, const Launch& launch);

// codec.h
void transcode(const TranscodeArgs& args, const Launch& launch);
void shared_amax(DType dtype, const void* x, size_t count, float* amax, const Encoding& encoding,
                 const Launch& launch);
void shared_encode(DType dtype, const void* x, size_t count, const float* amax, int width, int64_t limit,
                   uint64_t seed, const Encoding& encoding, void* q, const Launch& launch);
void shared_decode(const void* q, size_t count, const float* amax, int width, int64_t limit, double divisor,
                   DType dtype, void* x, const Launch& launch);

// topk.h. `workspace`: device memory of topk_workspace_bytes() at a multiple of 16. A record's entries that
// do not fit `count` elements are left out: to say so would be to wait.
int64_t topk_workspace_bytes(size_t count);
void topk_encode(const TopkArgs& args, void* workspace, const Launch& launch);
void topk_decode_add(const void* record, size_t capacity, float* sum, size_t count, const Launch& launch);

// The device that the memory at `pointer` belongs to. Throws ValueError if it is not memory of a CUDA
// device (or managed memory).
int device_of(const void* pointer, const char* name);

// Makes a device the current one of this thread, and the one before it again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;  // -1: it was the current one already
};

// What there is. Neither throws: without a driver there are 0 devices, and `reason` says why.
int device_count(const char** reason);
int driver_version();   // 13000 is CUDA 13.0; 0 without a driver
int runtime_version();  // that this was built with

}  // namespace pycomm::kernels::cuda
