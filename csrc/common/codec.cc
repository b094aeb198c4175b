#include "common/codec.h"

#include <array>
#include <cstddef>
#include <string>

#include "common/error.h"

namespace pycomm {

namespace {

struct Kind {
  CodecKind kind;
  const char* name;
  int64_t block;
  int64_t scale_bytes;
  int64_t bits;  // per element
};
constexpr int64_t kWireAlign = 16;
// In the order of the enumerators.
constexpr auto kKinds = std::to_array<Kind>({
    {CodecKind::none, "none", 1, 0, 0},
    {CodecKind::fp16, "fp16", 1, 0, 16},
    {CodecKind::bf16, "bf16", 1, 0, 16},
    {CodecKind::fp8_e4m3, "fp8_e4m3", 256, 4, 8},
    {CodecKind::fp8_e5m2, "fp8_e5m2", 256, 4, 8},
    {CodecKind::mxfp8, "mxfp8", 32, 1, 8},
    {CodecKind::int8, "int8", 128, 2, 8},
    {CodecKind::int4, "int4", 32, 2, 4},
    {CodecKind::sign, "sign", 128, 4, 1},
});
static_assert(kKinds.size() == kNumCodecs && [] {
  for (size_t i = 0; i < kKinds.size(); ++i) {
    const Kind& kind = kKinds[i];
    if (static_cast<size_t>(kind.kind) != i) return false;
    // A tile is whole blocks, and both of its parts are whole units of the wire.
    if (kTile % kind.block != 0 || kTile / kind.block * kind.scale_bytes % kWireAlign != 0) return false;
    if (kTile * kind.bits / 8 % kWireAlign != 0 || kSegmentAlign % kind.block != 0) return false;
  }
  return true;
}());

const Kind& kind_of(CodecKind kind) { return kKinds[static_cast<size_t>(kind)]; }

int64_t scales_bytes(CodecKind kind) { return kTile / kind_of(kind).block * kind_of(kind).scale_bytes; }

}  // namespace

const char* name(CodecKind kind) { return kind_of(kind).name; }

CodecKind parse_codec(std::string_view name) {
  std::string names;
  for (int i = 1; i < kNumCodecs; ++i) {
    if (name == kKinds[i].name) return static_cast<CodecKind>(i);
    names += std::string(i > 1 ? ", " : "") + kKinds[i].name;
  }
  throw ValueError("codec \"" + std::string(name) + "\" is unknown: use one of " + names);
}

int64_t block_of(CodecKind kind) { return kind_of(kind).block; }

int64_t tile_bytes(CodecKind kind) { return scales_bytes(kind) + kTile * kind_of(kind).bits / 8; }

int64_t wire_bytes(CodecKind kind, int64_t count) {
  const int64_t rest = count % kTile;
  const int64_t whole = count / kTile * tile_bytes(kind);
  if (rest == 0) return whole;
  const int64_t elements = (rest * kind_of(kind).bits + 7) / 8;
  return whole + scales_bytes(kind) + (elements + kWireAlign - 1) / kWireAlign * kWireAlign;
}

}  // namespace pycomm
