// What pack.cc and the copies of pack_isa.cc know of each other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "kernels/pack.h"

namespace pycomm::kernels {

// Statistics on the way, see arithmetic/stats.h.
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
  bool stream;   // non-temporal stores, to be fenced
  Tally* tally;  // may be null
};
using CastFn = void (*)(const CastArgs&);

struct PackKernels {
  // as_is: of equal types, without scaling: NaNs keep their payloads, and what is in its place is only read.
  CastFn (*find)(DType from, DType to, bool as_is);
  Stats (*finish)(Tally& tally);
};

}  // namespace pycomm::kernels
