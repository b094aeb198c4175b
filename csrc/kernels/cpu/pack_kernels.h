// Interface between pack.cc and the builds of pack_isa.cc for each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "kernels/pack.h"

namespace pycomm::kernels {

// Statistics collected so far, see arithmetic/stats.h.
struct Tally {
  double columns[1024] = {};
  int64_t chunks = 0;
  uint32_t max_magnitude = 0;  // bits of a float32
  int64_t nans = 0, infs = 0;
};

// dst[i] = cast(src[i] * scale). dst may be src.
struct CastArgs {
  const void* src;
  void* dst;
  size_t count;
  float scale;
  bool stream;   // non-temporal stores, which the caller fences
  Tally* tally;  // may be null
};
using CastFn = void (*)(const CastArgs&);

struct PackKernels {
  // as_is: the types are equal and nothing is scaled. NaNs keep their payloads, and elements in their place
  // are only read.
  CastFn (*find)(DType from, DType to, bool as_is);
  Stats (*finish)(Tally& tally);
};

}  // namespace pycomm::kernels
