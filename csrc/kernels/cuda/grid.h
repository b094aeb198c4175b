// How the body of a kernel is written, so that the same source runs on the GPU and, one thread after another,
// in tests on the CPU.
//
// A body is a function over a *block* of threads: `block.each(f)` runs f(thread) for every thread, and
// `block.sync()` orders what the block's threads did before it and after it. Code outside each() is the same
// for all threads: loops and branches around sync() depend on nothing else. A value that a thread keeps from
// one each() to the next lies in a PerThread. Within one each(), no thread reads what another one writes.
//
//     template <class Block>
//     PYCOMM_DEVICE static void run(Block& block, const Args& args, Shared& shared) {
//       block.each([&](int thread) { shared.x[thread] = args.data[thread]; });
//       block.sync();
//       block.each([&](int thread) { args.out[thread] = shared.x[Block::kThreads - 1 - thread]; });
//     }
//
// A body declares kThreads, and kResident: how many of its blocks a multiprocessor should hold at least,
// which limits the registers that the compiler may use.
//
// launch.cuh has the GPU's block, tests/cpp/emulated_grid.h the CPU's.
#pragma once

#if defined(__CUDACC__)
#define PYCOMM_DEVICE __device__ __forceinline__
#define PYCOMM_UNROLL _Pragma("unroll")
#else
#define PYCOMM_DEVICE inline
#define PYCOMM_UNROLL
#endif
