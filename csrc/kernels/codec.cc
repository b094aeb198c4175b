#include "kernels/codec.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

#include "common/error.h"
#include "kernels/codec_tiles.h"
#include "kernels/cpu/codec_kernels.h"
#include "kernels/cpu/isa.h"

namespace pycomm::kernels {
namespace {

struct Kind {
  const char* name;
  int64_t block;
  int64_t scale_bytes;
  int64_t bits;  // of an element
};
constexpr Kind kKinds[kNumCodecs] = {{"none", 1, 0, 0},       {"fp16", 1, 0, 16},      {"bf16", 1, 0, 16},
                                     {"fp8_e4m3", 256, 4, 8}, {"fp8_e5m2", 256, 4, 8}, {"mxfp8", 32, 1, 8},
                                     {"int8", 128, 2, 8},     {"int4", 32, 2, 4},      {"sign", 128, 4, 1}};
constexpr int64_t kWireAlign = 16;
constexpr int kMaxDepth = 33;  // a stack of 2^31 leaves
const Kind& kind_of(CodecKind kind) { return kKinds[static_cast<size_t>(kind)]; }

int64_t scales_bytes(CodecKind kind) { return kTile / kind_of(kind).block * kind_of(kind).scale_bytes; }

TileCode tile_code(const Codec& codec) {
  switch (codec.kind) {
    case CodecKind::none:
      break;
    case CodecKind::fp16:
      return TileCode::fp16;
    case CodecKind::bf16:
      return TileCode::bf16;
    case CodecKind::fp8_e4m3:
      return TileCode::fp8_e4m3;
    case CodecKind::fp8_e5m2:
      return TileCode::fp8_e5m2;
    case CodecKind::mxfp8:
      return codec.ceil_scale ? TileCode::mxfp8_ceil : TileCode::mxfp8;
    case CodecKind::int8:
      return TileCode::int8;
    case CodecKind::int4:
      return codec.hadamard ? TileCode::int4_rotated : TileCode::int4;
    case CodecKind::sign:
      return TileCode::sign;
  }
  throw ValueError("a codec is needed: \"none\" has no wire form");
}

// transcode(), tile by tile.
class Transcoder {
 public:
  Transcoder(const TranscodeArgs& args, const CodecKernels& kernels)
      : args_(args),
        kernels_(kernels),
        code_(static_cast<size_t>(tile_code(*args.codec))),
        stochastic_(args.codec->rounding == Rounding::stochastic && args.codec->kind != CodecKind::sign),
        tile_bytes_(tile_bytes(args.codec->kind)),
        pieces_(args.encoding.segments),
        random_(kernels, args.codec->seed, args.codec->kind == CodecKind::bf16 ? 16 : 8, args.encoding) {}

  void run() {
    for (begin_ = 0; begin_ < static_cast<int64_t>(args_.count); begin_ += kTile) {
      n_ = std::min(static_cast<int64_t>(args_.count) - begin_, kTile);
      sum();
      if (args_.dst_format != Format::partial && args_.divisor != 1) {
        kernels_.divide(stack_[0].x, static_cast<float>(args_.divisor));
      }
      if (args_.dst_format == Format::wire) {
        encode();
      } else {
        const DType dtype = args_.dst_format == Format::final ? args_.dtype : DType::float32;
        for (int d = 0; d < args_.num_dsts; ++d) {
          kernels_.store(at(args_.dsts[d], begin_ * static_cast<int64_t>(size_of(dtype))), dtype, stack_[0].x,
                         static_cast<size_t>(n_));
        }
      }
    }
  }

 private:
  // Of the sources, as the bits of a counter: after leaf j as many pairs merge as j has trailing ones, the
  // first of them as the leaf is read.
  void sum() {
    int depth = 0;
    for (int j = 0; j < args_.num_srcs; ++j) {
      int merges = j + 1 < args_.num_srcs ? std::countr_one(static_cast<unsigned>(j)) : depth;
      const bool add = merges > 0;
      if (!add) ++depth;
      read(j, stack_[depth - 1].x, add);
      for (; merges > 1; --merges) {
        --depth;
        kernels_.add(stack_[depth - 1].x, stack_[depth].x);
      }
    }
  }

  void read(int source, float* tile, bool add) {
    const Format format = args_.src_formats[source];
    if (format == Format::wire) {
      const auto bytes = static_cast<size_t>(wire_bytes(args_.codec->kind, n_));
      std::memcpy(wire_.bytes, at(args_.srcs[source], begin_ / kTile * tile_bytes_), bytes);
      if (n_ < kTile) std::memset(wire_.bytes + bytes, 0, sizeof wire_.bytes - bytes);
      return kernels_.decode[code_][add](tile, wire_.bytes);
    }
    const bool partial = format == Format::partial;
    const DType dtype = partial ? DType::float32 : args_.dtype;
    kernels_.load(tile, at(args_.srcs[source], begin_ * static_cast<int64_t>(size_of(dtype))), dtype,
                  static_cast<size_t>(n_), partial ? 1 : static_cast<float>(args_.prescale), add);
  }

  void encode() {
    const Encoding& encoding = args_.encoding;
    float* v = stack_[0].x;
    if (encoding.residual) {
      kernels_.add_residual(v, encoding.residual + begin_, static_cast<size_t>(n_), encoding.residual_scale);
    }
    pieces_.enter(encoding.index + begin_, n_);
    pieces_.clear_gaps(v);
    kernels_.encode[code_][stochastic_](v, pieces_.counts, stochastic_ ? random_.draw(pieces_) : nullptr,
                                        wire_.bytes);
    const auto bytes = static_cast<size_t>(wire_bytes(args_.codec->kind, n_));
    for (int d = 0; d < args_.num_dsts; ++d) {
      std::memcpy(at(args_.dsts[d], begin_ / kTile * tile_bytes_), wire_.bytes, bytes);
    }
    if (encoding.next_residual) {
      kernels_.decode[code_][false](stack_[1].x, wire_.bytes);
      pieces_.clear_gaps(stack_[1].x);
      kernels_.keep_residual(encoding.next_residual + begin_, v, stack_[1].x, encoding.residual + begin_,
                             static_cast<size_t>(n_), encoding.residual_scale);
    }
  }

  const TranscodeArgs& args_;
  const CodecKernels& kernels_;
  size_t code_;
  bool stochastic_;
  int64_t tile_bytes_;
  int64_t begin_ = 0, n_ = 0;
  Pieces pieces_;
  Random random_;
  WireTile wire_;
  FloatTile stack_[kMaxDepth];
};

void copy(const TranscodeArgs& args) {
  const auto bytes = static_cast<size_t>(wire_bytes(args.codec->kind, static_cast<int64_t>(args.count)));
  for (int d = 0; d < args.num_dsts; ++d) std::memcpy(args.dsts[d], args.srcs[0], bytes);
}

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

void transcode(const TranscodeArgs& args, const Isa& isa) {
  if (args.num_srcs == 1 && args.src_formats[0] == Format::wire && args.dst_format == Format::wire) {
    return copy(args);
  }
  Transcoder(args, *isa.codec).run();
}

}  // namespace pycomm::kernels
