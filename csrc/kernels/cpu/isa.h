// Interface between the dispatcher and the builds of cpu/*_isa.cc, one for each instruction set.
//
// A build defines everything in a namespace of its own and calls no inline function or template from
// elsewhere: the linker keeps one body of such a function for the whole program, and that body might use
// AVX-512.
#pragma once

#include <cstddef>

#include "kernels/combine.h"

namespace pycomm::kernels {

struct CodecKernels;
struct PackKernels;
struct TopkKernels;
using CopyFn = void(void* dst, const void* src, size_t bytes);

// The kernels of one instruction set, as one build of the sources defines them. find() gives null if the pair
// does not satisfy supports(dtype, op). copy() and copy_past() implement copy_bytes() of kernels/copy.h.
#define PYCOMM_DECLARE_KERNELS(set)        \
  namespace set {                          \
  CombineFn find(DType dtype, Op op);      \
  CopyFn copy, copy_past;                  \
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
  CopyFn *copy, *copy_past;
  const CodecKernels* codec;
  const PackKernels* pack;
  const TopkKernels* topk;
};

}  // namespace pycomm::kernels
