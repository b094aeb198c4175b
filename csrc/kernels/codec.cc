#include "kernels/codec.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

#include "common/error.h"
#include "kernels/codec_tiles.h"
#include "kernels/copy.h"
#include "kernels/cpu/codec_kernels.h"
#include "kernels/cpu/isa.h"

namespace pycomm::kernels {
namespace {

constexpr int kMaxDepth = 17;  // enough for 2^16 leaves; a node has fewer ranks

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
  Transcoder(const TranscodeArgs& args, const Isa& isa)
      : args_(args),
        isa_(isa),
        kernels_(*isa.codec),
        code_(static_cast<size_t>(tile_code(*args.codec))),
        stochastic_(args.codec->rounding == Rounding::stochastic && args.codec->kind != CodecKind::sign),
        tile_bytes_(tile_bytes(args.codec->kind)),
        pieces_(args.encoding.segments),
        random_(kernels_, args.codec->seed, args.codec->kind == CodecKind::bf16 ? 16 : 8, args.encoding) {}

  void run() {
    for (begin_ = 0; begin_ < count(); begin_ += kTile) {
      n_ = std::min(count() - begin_, kTile);
      const float* v = sum(direct());
      if (args_.dst_format != Format::partial && args_.divisor != 1) {
        kernels_.divide(buffers_[0].x, v, static_cast<float>(args_.divisor));
        v = buffers_[0].x;
      }
      if (args_.dst_format == Format::wire) {
        encode(v);
      } else {
        store(v);
      }
    }
    if (args_.stream) stream_fence();
  }

 private:
  int64_t count() const { return static_cast<int64_t>(args_.count); }
  size_t elements() const { return static_cast<size_t>(n_); }
  DType type_of(Format format) const { return format == Format::partial ? DType::float32 : args_.dtype; }
  template <class Pointer>
  Pointer here(Pointer p, Format format) const {
    if (format == Format::wire) return at(p, begin_ / kTile * tile_bytes_);
    return at(p, begin_ * static_cast<int64_t>(size_of(type_of(format))));
  }

  // The destination, if the last sum can be written straight to it; else null.
  float* direct() const {
    if (args_.finite && args_.stream) return nullptr;  // finite() would read it back from memory
    const bool plain = n_ == kTile && args_.num_dsts == 1 && args_.num_srcs <= (args_.stream ? 1 : 2) &&
                       args_.src_formats[args_.num_srcs - 1] == Format::wire;
    if (!plain || args_.dst_format == Format::wire || type_of(args_.dst_format) != DType::float32)
      return nullptr;
    if (args_.dst_format == Format::final && args_.divisor != 1) return nullptr;
    void* dst = here(args_.dsts[0], args_.dst_format);
    if (args_.stream && reinterpret_cast<uintptr_t>(dst) % kernels_.stream_align != 0) return nullptr;
    return static_cast<float*>(dst);
  }

  // Sums the sources in the order of a binary counter: after leaf j as many pairs merge as j has trailing
  // ones. The first of these merges happens while the leaf is read.
  const float* sum(float* last) {
    const float* stack[kMaxDepth];
    int depth = 0;
    for (int j = 0; j < args_.num_srcs; ++j) {
      const bool root = j + 1 == args_.num_srcs;
      int merges = root ? depth : std::countr_one(static_cast<unsigned>(j));
      if (merges == 0) {
        stack[depth] = leaf(j, root && last ? last : buffers_[depth].x);
        ++depth;
        continue;
      }
      float* to = root && last ? last : buffers_[depth - 1].x;
      read(j, to, stack[depth - 1]);
      stack[depth - 1] = to;
      for (; merges > 1; --merges) {
        --depth;
        kernels_.sum(buffers_[depth - 1].x, stack[depth - 1], stack[depth]);
        stack[depth - 1] = buffers_[depth - 1].x;
      }
    }
    return stack[0];
  }

  // Returns the source's values: in place if they need no conversion, else in `to`.
  const float* leaf(int source, float* to) {
    const Format format = args_.src_formats[source];
    const bool as_is = format == Format::partial || (format == Format::raw && args_.prescale == 1);
    if (as_is && n_ == kTile && type_of(format) == DType::float32) {
      return static_cast<const float*>(here(args_.srcs[source], format));
    }
    read(source, to, nullptr);
    return to;
  }

  void read(int source, float* to, const float* from) {
    const Format format = args_.src_formats[source];
    const void* src = here(args_.srcs[source], format);
    if (format != Format::wire) {
      const float prescale = format == Format::partial ? 1 : static_cast<float>(args_.prescale);
      return kernels_.sum_load(to, from, src, type_of(format), elements(), prescale);
    }
    const auto* wire = static_cast<const uint8_t*>(src);
    if (n_ < kTile) {
      const auto bytes = static_cast<size_t>(wire_bytes(args_.codec->kind, n_));
      copy_bytes(wire_.bytes, wire, bytes, false, isa_);
      std::memset(wire_.bytes + bytes, 0, sizeof wire_.bytes - bytes);
      wire = wire_.bytes;
    }
    kernels_.sum_decode[code_](to, from, wire, args_.stream && to == direct());
  }

  void store(const float* v) {
    const DType dtype = type_of(args_.dst_format);
    for (int d = 0; d < args_.num_dsts; ++d) {
      void* dst = here(args_.dsts[d], args_.dst_format);
      const void* from = v;
      if (dst == v) {  // the last sum was written here already
      } else if (args_.stream) {
        if (dtype != DType::float32 || v != buffers_[0].x) {  // a float32 sum is stored as it is
          kernels_.store(wire_.bytes, dtype, v, elements());
          from = wire_.bytes;
        }
        copy_bytes(dst, from, elements() * size_of(dtype), true, isa_);
      } else {
        kernels_.store(dst, dtype, v, elements());
        from = dst;
      }
      if (d == 0 && args_.finite && args_.dst_format == Format::final) {
        *args_.finite &= kernels_.finite(from, dtype, elements());
      }
    }
  }

  void encode(const float* v) {
    const Encoding& encoding = args_.encoding;
    float* own = buffers_[0].x;
    if (encoding.residual) {
      kernels_.add_residual(own, v, encoding.residual + begin_, elements(), encoding.residual_scale);
      if (n_ < kTile) std::memset(own + n_, 0, static_cast<size_t>(kTile - n_) * sizeof *own);
      v = own;
    }
    pieces_.enter(encoding.index + begin_, n_);
    if (!pieces_.whole()) {
      if (v != own) copy_bytes(own, v, sizeof buffers_[0], false, isa_);
      pieces_.clear_gaps(own);
      v = own;
    }
    const uint8_t* random = stochastic_ ? random_.draw(pieces_, v) : nullptr;
    if (n_ == kTile && args_.num_dsts == 1) {
      encode_tile(v, random, static_cast<uint8_t*>(here(args_.dsts[0], Format::wire)));
      return;
    }
    encode_tile(v, random, wire_.bytes);
    const auto bytes = static_cast<size_t>(wire_bytes(args_.codec->kind, n_));
    for (int d = 0; d < args_.num_dsts; ++d)
      copy_bytes(here(args_.dsts[d], Format::wire), wire_.bytes, bytes, false, isa_);
  }

  void encode_tile(const float* v, const uint8_t* random, uint8_t* wire) {
    const Encoding& encoding = args_.encoding;
    kernels_.encode[code_][stochastic_](v, pieces_.counts, random, wire);
    if (!encoding.next_residual) return;
    float* decoded = buffers_[1].x;
    kernels_.sum_decode[code_](decoded, nullptr, wire, false);
    pieces_.clear_gaps(decoded);
    kernels_.keep_residual(encoding.next_residual + begin_, v, decoded, encoding.residual + begin_,
                           elements(), encoding.residual_scale);
  }

  const TranscodeArgs& args_;
  const Isa& isa_;
  const CodecKernels& kernels_;
  size_t code_;
  bool stochastic_;
  int64_t tile_bytes_;
  int64_t begin_ = 0, n_ = 0;
  Pieces pieces_;
  Random random_;
  WireTile wire_;
  FloatTile buffers_[kMaxDepth];
};

void copy(const TranscodeArgs& args, const Isa& isa) {
  const auto bytes = static_cast<size_t>(wire_bytes(args.codec->kind, static_cast<int64_t>(args.count)));
  for (int d = 0; d < args.num_dsts; ++d) copy_bytes(args.dsts[d], args.srcs[0], bytes, args.stream, isa);
  if (args.stream) stream_fence();
}

}  // namespace

bool add_residual(DType dtype, void* x, size_t count, const float* residual, float* next_residual,
                  float residual_scale, const Isa& isa) {
  const CodecKernels& kernels = *isa.codec;
  FloatTile value, rounded;
  bool finite = true;
  for (size_t begin = 0; begin < count; begin += kTile) {
    const size_t n = std::min(count - begin, static_cast<size_t>(kTile));
    void* here = static_cast<char*>(x) + begin * size_of(dtype);
    kernels.sum_load(value.x, nullptr, here, dtype, n, 1);
    kernels.add_residual(value.x, value.x, residual + begin, n, residual_scale);
    kernels.store(here, dtype, value.x, n);
    kernels.sum_load(rounded.x, nullptr, here, dtype, n, 1);
    kernels.keep_residual(next_residual + begin, value.x, rounded.x, residual + begin, n, residual_scale);
    finite &= kernels.finite(here, dtype, n);
  }
  return finite;
}

void transcode(const TranscodeArgs& args, const Isa& isa) {
  if (args.num_srcs == 1 && args.src_formats[0] == Format::wire && args.dst_format == Format::wire) {
    return copy(args, isa);
  }
  Transcoder(args, isa).run();
}

}  // namespace pycomm::kernels
