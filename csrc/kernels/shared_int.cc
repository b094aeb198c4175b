#include <string>

#include "common/error.h"
#include "kernels/codec.h"
#include "kernels/codec_tiles.h"
#include "kernels/cpu/isa.h"

namespace pycomm::kernels {
namespace {

constexpr int64_t kBlocks = kTile / kSharedBlock;

// Loads the values of one tile as they are encoded: with the residual, and zeros between tensors.
void load_tile(const CodecKernels& kernels, FloatTile& tile, Pieces& pieces, DType dtype, const void* x,
               int64_t begin, int64_t n, const Encoding& encoding) {
  const auto count = static_cast<size_t>(n);
  kernels.sum_load(tile.x, nullptr, at(x, begin * static_cast<int64_t>(size_of(dtype))), dtype, count, 1);
  if (encoding.residual) {
    kernels.add_residual(tile.x, tile.x, encoding.residual + begin, count, encoding.residual_scale);
  }
  pieces.enter(encoding.index + begin, n);
  pieces.clear_gaps(tile.x);
}

// Loads amax for the blocks of a tile; zero for blocks beyond the data.
void load_amax(float* tile, const float* amax, int64_t begin, int64_t n) {
  const int64_t blocks = (n + kSharedBlock - 1) / kSharedBlock;
  for (int64_t b = 0; b < kBlocks; ++b) tile[b] = b < blocks ? amax[begin / kSharedBlock + b] : 0;
}

}  // namespace

int64_t shared_limit(int width, int world) {
  if (width != 8 && width != 16 && width != 32) {
    throw ValueError("shared_int of " + std::to_string(width) + " bits: use 8, 16 or 32");
  }
  const int64_t limit = ((int64_t{1} << (width - 1)) - 1) / world;
  if (limit < 7) {
    throw ValueError("shared_int of " + std::to_string(width) + " bits leaves each of " +
                     std::to_string(world) + " ranks integers up to " + std::to_string(limit) +
                     ", and 7 is the least: use more bits");
  }
  return limit;
}

void shared_amax(DType dtype, const void* x, size_t count, float* amax, const Encoding& encoding,
                 const Isa& isa) {
  FloatTile tile;
  Pieces pieces(encoding.segments);
  for (int64_t begin = 0; begin < static_cast<int64_t>(count); begin += kTile) {
    const int64_t n = std::min(static_cast<int64_t>(count) - begin, kTile);
    load_tile(*isa.codec, tile, pieces, dtype, x, begin, n, encoding);
    float most[kBlocks];
    isa.codec->shared_amax(tile.x, most);
    std::memcpy(amax + begin / kSharedBlock, most,
                static_cast<size_t>((n + kSharedBlock - 1) / kSharedBlock) * sizeof *amax);
  }
}

void shared_encode(DType dtype, const void* x, size_t count, const float* amax, int width, int64_t limit,
                   uint64_t seed, const Encoding& encoding, void* q, const Isa& isa) {
  const CodecKernels& kernels = *isa.codec;
  FloatTile tile, decoded;
  alignas(kLine) int32_t integers[kTile];
  float most[kBlocks];
  Pieces pieces(encoding.segments);
  Random random(kernels, seed, 8, encoding);
  for (int64_t begin = 0; begin < static_cast<int64_t>(count); begin += kTile) {
    const int64_t n = std::min(static_cast<int64_t>(count) - begin, kTile);
    load_tile(kernels, tile, pieces, dtype, x, begin, n, encoding);
    load_amax(most, amax, begin, n);
    kernels.shared_encode(tile.x, most, static_cast<int32_t>(limit),
                          random.draw(pieces, at(x, begin * static_cast<int64_t>(size_of(dtype)))), integers);
    kernels.shared_narrow(at(q, begin * width / 8), width, integers, static_cast<size_t>(n));
    if (encoding.next_residual) {
      kernels.shared_decode(decoded.x, integers, most, static_cast<int32_t>(limit));
      pieces.clear_gaps(decoded.x);
      kernels.keep_residual(encoding.next_residual + begin, tile.x, decoded.x, encoding.residual + begin,
                            static_cast<size_t>(n), encoding.residual_scale);
    }
  }
}

void shared_decode(const void* q, size_t count, const float* amax, int width, int64_t limit, double divisor,
                   DType dtype, void* x, const Isa& isa) {
  const CodecKernels& kernels = *isa.codec;
  FloatTile tile;
  alignas(kLine) int32_t integers[kTile];
  float most[kBlocks];
  for (int64_t begin = 0; begin < static_cast<int64_t>(count); begin += kTile) {
    const int64_t n = std::min(static_cast<int64_t>(count) - begin, kTile);
    load_amax(most, amax, begin, n);
    kernels.shared_widen(integers, width, at(q, begin * width / 8), static_cast<size_t>(n));
    kernels.shared_decode(tile.x, integers, most, static_cast<int32_t>(limit));
    if (divisor != 1) kernels.divide(tile.x, tile.x, static_cast<float>(divisor));
    kernels.store(at(x, begin * static_cast<int64_t>(size_of(dtype))), dtype, tile.x, static_cast<size_t>(n));
  }
}

}  // namespace pycomm::kernels
