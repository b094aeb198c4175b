// The kernels for buffers in GPU memory, under the contracts of combine.h, pack.h, codec.h and topk.h: the
// same arguments, the same bits.
//
// * Pointers are device pointers; the arguments themselves (lists of pointers, items, segments) lie in host
//   memory and are copied into the launch before the call returns. So the arguments need not outlive the
//   call, no copy synchronises, and a captured graph holds all that its replays need.
// * Calls enqueue on the stream of `launch` and return. The stream's device must be the current one
//   (DeviceGuard).
// * Nothing is allocated: a call that needs a workspace says how large, and the caller provides it. The
//   workspace is in use until the stream has completed the call.
// * One exception to "the same bits": a NaN in a *partial* result may differ from the CPU's.
//
// Usage errors are TypeError and ValueError; an error of CUDA is a std::runtime_error that gives CUDA's name
// for it.
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

// `args.stream` concerns the CPU's caches and is ignored.
void combine(DType dtype, Op op, const CombineArgs& args, const Launch& launch);

// pack.h. `workspace` is null, or device memory of stats_workspace_bytes(), aligned to 16 bytes, that
// receives the statistics; read_stats() waits for the stream and reads them.
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

// topk.h. `workspace` is device memory of topk_workspace_bytes(), aligned to 16 bytes. Entries of a record
// that do not fit `count` elements are skipped: an error would have to wait for the GPU.
int64_t topk_workspace_bytes(size_t count);
void topk_encode(const TopkArgs& args, void* workspace, const Launch& launch);
void topk_decode_add(const void* record, size_t capacity, float* sum, size_t count, const Launch& launch);

// The device that the memory at `pointer` belongs to. Throws ValueError if it is not memory of a CUDA
// device (or managed memory).
int device_of(const void* pointer, const char* name);

// Makes a device the current one of this thread, and restores the previous one at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;  // -1: the device was current already
};

// None of these throws: without a driver there are 0 devices, and `reason` says why.
int device_count(const char** reason);
int driver_version();   // 13000 is CUDA 13.0; 0 without a driver
int runtime_version();  // the version that this library was built with

}  // namespace pycomm::kernels::cuda
