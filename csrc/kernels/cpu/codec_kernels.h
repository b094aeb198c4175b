// The codecs' inner loops, over one tile of kTile elements in the first-level cache. Float tiles and wire
// tiles are the caller's own, whole and aligned to cache lines; what is short is filled up with zeros, which
// are zeros on the wire as well. Other pointers are the user's, of any alignment.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace pycomm::kernels {

enum class TileCode : uint8_t {
  fp16,
  bf16,
  fp8_e4m3,
  fp8_e5m2,
  mxfp8,
  mxfp8_ceil,
  int8,
  int4,
  int4_rotated,
  sign
};
inline constexpr int kNumTileCodes = 10;

struct CodecKernels {
  // tile = x * prescale, or tile += x * prescale; x is float32, float16 or bfloat16
  void (*load)(float* tile, const void* x, DType dtype, size_t n, float prescale, bool add);
  void (*store)(void* x, DType dtype, const float* tile, size_t n);  // rounds once, NaN is canonical
  void (*add)(float* tile, const float* other);                      // tile += other
  void (*divide)(float* tile, float divisor);

  // 16 bytes for each counter from `first` on
  void (*random)(uint8_t* bytes, int counters, uint64_t seed, uint64_t first, uint64_t stream);
  // counts: the elements that each kSegmentAlign of the tile has
  void (*encode[kNumTileCodes][2])(const float* tile, const int32_t* counts, const uint8_t* random,
                                   uint8_t* wire);
  void (*decode[kNumTileCodes][2])(float* tile, const uint8_t* wire);  // [1]: tile +=

  void (*add_residual)(float* tile, const float* e, size_t n, float k);  // v = x + k e
  void (*keep_residual)(float* next, const float* v, const float* decoded, const float* e, size_t n, float k);

  // shared_int, in blocks of kSharedBlock
  void (*shared_amax)(const float* tile, float* amax);
  void (*shared_encode)(const float* tile, const float* amax, int32_t limit, const uint8_t* random,
                        int32_t* q);
  void (*shared_decode)(float* tile, const int32_t* q, const float* amax, int32_t limit);
  void (*shared_narrow)(void* to, int width, const int32_t* q, size_t n);
  void (*shared_widen)(int32_t* q, int width, const void* from, size_t n);
};

}  // namespace pycomm::kernels
