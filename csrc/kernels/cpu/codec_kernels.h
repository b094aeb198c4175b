// The codecs' inner loops, over one tile of kTile elements in the first-level cache.
//
// Floats and wire tiles lie at any address. The caller fills a short tile up with zeros, which are zeros on
// the wire as well. `sum` kernels compute to = from + what they read, or only what they read if `from` is
// null, with canonical NaNs. `to` may be `from`.
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
  size_t stream_align;  // what `to` must be a multiple of to be stored past the cache
  // x * prescale, for n elements of float32, float16 or bfloat16; the rest of the tile is zeros.
  void (*sum_load)(float* to, const float* from, const void* x, DType dtype, size_t n, float prescale);
  void (*sum)(float* to, const float* from, const float* x);
  // `past` stores past the cache; then `to` is a multiple of stream_align, and `from` is null.
  void (*sum_decode[kNumTileCodes])(float* to, const float* from, const uint8_t* wire, bool past);

  void (*store)(void* x, DType dtype, const float* from, size_t n);  // rounds once, NaN is canonical
  bool (*finite)(const void* x, DType dtype, size_t n);              // whether x has no NaN and no Inf
  void (*divide)(float* to, const float* from, float divisor);

  // Writes 16 bytes for each counter from `first` on; `first` and `counters` are multiples of 16. Meanwhile
  // it prefetches a part of what follows the `size` bytes at x, the values that the random bits are for.
  void (*random)(uint8_t* bytes, int counters, uint64_t seed, uint64_t first, uint64_t stream, const void* x,
                 size_t size);
  // [1] is stochastic. counts: how many elements each piece of kSegmentAlign has.
  void (*encode[kNumTileCodes][2])(const float* x, const int32_t* counts, const uint8_t* random,
                                   uint8_t* wire);

  void (*add_residual)(float* to, const float* x, const float* e, size_t n, float k);  // v = x + k e
  void (*keep_residual)(float* next, const float* v, const float* decoded, const float* e, size_t n, float k);

  // shared_int, in blocks of kSharedBlock.
  void (*shared_amax)(const float* tile, float* amax);
  void (*shared_encode)(const float* tile, const float* amax, int32_t limit, const uint8_t* random,
                        int32_t* q);
  void (*shared_decode)(float* tile, const int32_t* q, const float* amax, int32_t limit);
  void (*shared_narrow)(void* to, int width, const int32_t* q, size_t n);
  void (*shared_widen)(int32_t* q, int width, const void* from, size_t n);
};

}  // namespace pycomm::kernels
