// What all encodes share: where the random bits come from, where a tensor ends, and the residuals that are
// added and kept.
#pragma once

#include <cstdint>

#include "kernels/codec.h"
#include "kernels/cuda/lanes.h"

namespace pycomm::kernels::PYCOMM_ISA {

struct EncodeCall {
  int64_t index, end;  // the call's elements are [index, end) of the data
  const float* residual;
  float* next_residual;
  bool residual_aligned, next_residual_aligned;
  float residual_scale;
  Draw draw;
  Segments segments;
};

// For elements [begin, begin + count) of the data that `encoding` describes.
inline EncodeCall make_encode_call(const Encoding& encoding, bool stochastic, uint64_t seed, int64_t begin,
                                   int64_t count, const Segments& segments) {
  EncodeCall call{};
  call.index = encoding.index + begin;
  call.end = call.index + count;
  call.residual = encoding.residual ? encoding.residual + begin : nullptr;
  call.next_residual = encoding.next_residual ? encoding.next_residual + begin : nullptr;
  call.residual_aligned = is_aligned(call.residual);
  call.next_residual_aligned = is_aligned(call.next_residual);
  call.residual_scale = encoding.residual_scale;
  call.draw = make_draw(stochastic, seed, encoding);
  call.segments = segments;
  return call;
}

// Which elements a lane has, in the call and in the tile.
struct Lane16 {
  int64_t tile, begin;  // begin: its first element in the call
  int of_tile;          // its first element in the tile
  int n;                // how many of its elements the call has
  int tile_n;           // elements of the tile that the call has
};

PYCOMM_DEVICE Lane16 lane_of(int64_t half, int lane, int64_t count) {
  Lane16 at;
  at.tile = half / 2;
  at.of_tile = static_cast<int>(half % 2) * kHalf + lane * kOfLane;
  at.begin = at.tile * kTile + at.of_tile;
  const int64_t left = count - at.begin, tile_left = count - at.tile * kTile;
  at.n = static_cast<int>(left < 0 ? 0 : left < kOfLane ? left : kOfLane);
  at.tile_n = static_cast<int>(tile_left < kTile ? tile_left : kTile);
  return at;
}

// A lane's values with their residuals added; zeros between tensors.
struct Values {
  Sixteen v;
  Piece piece;
};

PYCOMM_DEVICE Values with_residuals(const EncodeCall& call, const Lane16& at, Sixteen v) {
  if (call.residual) {
    const Sixteen e = read_lane<Wide<float>>(call.residual, at.begin, at.n, call.residual_aligned);
    PYCOMM_UNROLL
    for (int i = 0; i < kOfLane; ++i) v.x[i] = v.x[i] + call.residual_scale * e.x[i];
  }
  const Piece piece = find_piece(call.segments, call.index + at.begin, call.end);
  PYCOMM_UNROLL
  for (int i = 0; i < kOfLane; ++i) v.x[i] = i < piece.present ? v.x[i] : 0.0f;
  return {v, piece};
}

// Stores what `decoded` has lost of the values, if there is a buffer for it.
PYCOMM_DEVICE void keep_residuals(const EncodeCall& call, const Lane16& at, const Values& values,
                                  const Sixteen& decoded) {
  Sixteen e{}, next;
  if (call.residual) e = read_lane<Wide<float>>(call.residual, at.begin, at.n, call.residual_aligned);
  PYCOMM_UNROLL
  for (int i = 0; i < kOfLane; ++i) {
    const float d = i < values.piece.present ? decoded.x[i] : 0.0f;
    next.x[i] = next_residual(values.v.x[i], d, e.x[i], call.residual_scale);
  }
  write_lane<Plain<float>>(call.next_residual, at.begin, at.n, call.next_residual_aligned, next);
}

}  // namespace pycomm::kernels::PYCOMM_ISA
