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

// Each copy's kernel for a pair; null if the pair does not satisfy supports(dtype, op).
namespace baseline {
CombineFn find(DType dtype, Op op);
extern const CodecKernels codec_kernels;
extern const PackKernels pack_kernels;
extern const TopkKernels topk_kernels;
}  // namespace baseline
namespace avx2 {
CombineFn find(DType dtype, Op op);
extern const CodecKernels codec_kernels;
extern const PackKernels pack_kernels;
extern const TopkKernels topk_kernels;
}  // namespace avx2
namespace avx512 {
CombineFn find(DType dtype, Op op);
extern const CodecKernels codec_kernels;
extern const PackKernels pack_kernels;
extern const TopkKernels topk_kernels;
}  // namespace avx512
namespace neon {
CombineFn find(DType dtype, Op op);
extern const CodecKernels codec_kernels;
extern const PackKernels pack_kernels;
extern const TopkKernels topk_kernels;
}  // namespace neon

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
