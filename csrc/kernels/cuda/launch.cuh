// Turns a body (grid.h) into a kernel, and launches it.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels/cuda.h"
#include "kernels/cuda/grid.h"

namespace pycomm::kernels::cuda {

template <int kThreadsOfBlock>
struct GpuBlock {
  static constexpr int kThreads = kThreadsOfBlock;
  template <class T>
  struct PerThread {
    T mine;
    __device__ __forceinline__ T& operator[](int) { return mine; }
  };
  __device__ __forceinline__ int64_t index() const { return blockIdx.x; }
  __device__ __forceinline__ int64_t blocks() const { return gridDim.x; }
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    f(static_cast<int>(threadIdx.x));
  }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ uint32_t add(uint32_t* p, uint32_t x) const { return atomicAdd(p, x); }
};

// The block of a body with 32 threads: one warp of several in a hardware block.
struct GpuWarp {
  static constexpr int kThreads = 32;
  static constexpr int kOfBlock = 4;
  template <class T>
  using PerThread = GpuBlock<kThreads>::PerThread<T>;
  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x) / kThreads; }
  __device__ __forceinline__ int64_t index() const { return int64_t{blockIdx.x} * kOfBlock + warp(); }
  __device__ __forceinline__ int64_t blocks() const { return int64_t{gridDim.x} * kOfBlock; }
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    f(static_cast<int>(threadIdx.x) % kThreads);
  }
  __device__ __forceinline__ void sync() const { __syncwarp(); }
};

template <class Body>
inline constexpr bool kIsWarp = Body::kThreads == GpuWarp::kThreads;
template <class Body>
inline constexpr int kBlocksOfBlock = kIsWarp<Body> ? GpuWarp::kOfBlock : 1;

template <class Body>
__global__ void __launch_bounds__(Body::kThreads* kBlocksOfBlock<Body>, Body::kResident)
    kernel(const __grid_constant__ typename Body::Args args) {
  __shared__ typename Body::Shared shared[kBlocksOfBlock<Body>];
  if constexpr (kIsWarp<Body>) {
    GpuWarp block;
    Body::run(block, args, shared[GpuWarp::warp()]);
  } else {
    GpuBlock<Body::kThreads> block;
    Body::run(block, args, shared[0]);
  }
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which is reported here
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")");
}

int multiprocessors();  // how many the current device has

// Launches at least 1 block, and no more than a few rounds of what the device holds: bodies loop over the
// rest.
template <class Body>
void launch(const typename Body::Args& args, int64_t blocks, const Launch& how, const char* what) {
  const int64_t most = how.blocks > 0 ? how.blocks : int64_t{multiprocessors()} * 16;
  if (blocks > most) blocks = most;
  if (blocks < 1) blocks = 1;
  kernel<Body>
      <<<static_cast<unsigned>(blocks), Body::kThreads, 0, static_cast<cudaStream_t>(how.stream)>>>(args);
  check(cudaGetLastError(), what);
}

}  // namespace pycomm::kernels::cuda
