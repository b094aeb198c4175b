// What the kernels' sources and the copies of cpu/*_isa.cc, one compiled for each instruction set, know of
// each other.
//
// All that a copy defines lies in a namespace of its own, and it calls no inline function or template from
// elsewhere: the linker keeps one body of such a function for the whole program, and it might be the one in
// AVX-512.
#pragma once

#include <cstddef>

#include "kernels/combine.h"

namespace pycomm::kernels {

struct CodecKernels;
struct PackKernels;
struct TopkKernels;

// The kernels of one instruction set, which a copy defines. find() gives null if the pair does not satisfy
// supports(dtype, op).
#define PYCOMM_DECLARE_KERNELS(set)        \
  namespace set {                          \
  CombineFn find(DType dtype, Op op);      \
  extern const CodecKernels codec_kernels; \
  extern const PackKernels pack_kernels;   \
  extern const TopkKernels topk_kernels;   \
  }
PYCOMM_DECLARE_KERNELS(baseline)
PYCOMM_DECLARE_KERNELS(avx2)
PYCOMM_DECLARE_KERNELS(avx512)
PYCOMM_DECLARE_KERNELS(neon)

struct Isa {
  const char* name;
  CombineFn (*find_combine)(DType, Op);
  const CodecKernels* codec;
  const PackKernels* pack;
  const TopkKernels* topk;
};

// Copies with non-temporal stores for the full cache lines of dst; stream_fence() orders them before later
// stores. Where there are none (not x86), a memcpy and nothing.
void stream_copy(void* dst, const void* src, size_t bytes);
void stream_fence();

}  // namespace pycomm::kernels
