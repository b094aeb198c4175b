// Gradient codecs: their names and the sizes of their wire form. kernels/codec.h defines what they do to
// values.
//
// A *tile* is kTile elements that start at a multiple of kTile in the data of a call; a *block* is the part
// of a tile whose elements share a scale. On the wire a tile is the scales of its blocks, then its elements,
// both in order and packed low bits first; kTile makes both parts multiples of 16 bytes for every codec. The
// last tile of the data may be short: it has all its scales, and its elements end where the data ends
// (rounded up to 16 bytes, the rest zero). So any run of whole tiles is one run of bytes, and plans cut
// between tiles.
#pragma once

#include <cstdint>
#include <string_view>

namespace pycomm {

// A new one is a row of the table in codec.cc as well, in the same place.
enum class CodecKind : uint8_t { none, fp16, bf16, fp8_e4m3, fp8_e5m2, mxfp8, int8, int4, sign };
inline constexpr int kNumCodecs = 9;
enum class Rounding : uint8_t { nearest, stochastic };
// Where a call encodes: on all links, or on message links alone, so that ranks of one node exchange exact
// values.
enum class Links : uint8_t { all, wire };

struct Codec {
  CodecKind kind = CodecKind::none;
  Rounding rounding = Rounding::nearest;  // sign does not round: nearest
  bool ceil_scale = false;                // mxfp8
  bool hadamard = false;                  // int4: blocks are rotated before and after
  uint64_t seed = 0;
  Links links = Links::all;  // of no meaning to the kernels
  bool operator==(const Codec&) const = default;
};

inline constexpr int64_t kTile = 1024, kSegmentAlign = 256;

const char* name(CodecKind kind);
CodecKind parse_codec(std::string_view name);  // throws ValueError listing the names
int64_t block_of(CodecKind kind);              // elements that share a scale; fp16, bf16: 1
int64_t tile_bytes(CodecKind kind);
int64_t wire_bytes(CodecKind kind, int64_t count);  // `count` elements that start at a tile

}  // namespace pycomm
