// The codecs' inner loops for one instruction set, see codec_kernels.h: plain loops of constant length over
// the arithmetic of codecs.h, of which the compiler makes vectors.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/arithmetic/codecs.h"
#include "kernels/arithmetic/ops.h"
#include "kernels/arithmetic/philox.h"
#include "kernels/arithmetic/small_float.h"
#include "kernels/codec.h"
#include "kernels/cpu/codec_kernels.h"
#include "kernels/cpu/isa.h"

#if defined(__clang__)
#define PYCOMM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define PYCOMM_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace pycomm::kernels::PYCOMM_ISA {
namespace {

constexpr int kElements = static_cast<int>(kTile);

// An element in memory, at any address and of any declared type.
template <class T>
struct __attribute__((packed, may_alias)) Unaligned {
  T value;
};
template <class T>
const Unaligned<T>* in(const void* p) {
  return static_cast<const Unaligned<T>*>(p);
}
template <class T>
Unaligned<T>* out(void* p) {
  return static_cast<Unaligned<T>*>(p);
}

// ---- floats ----

template <class F, bool kAdd, bool kScale>
void load_as(float* tile, const void* src, size_t n, float prescale) {
  const auto* x = in<typename F::Raw>(src);
  PYCOMM_INDEPENDENT
  for (size_t i = 0; i < n; ++i) {
    float value = F::decode(x[i].value);
    if constexpr (kScale) value *= prescale;
    tile[i] = kAdd ? tile[i] + value : value;
  }
  if (!kAdd && n < static_cast<size_t>(kElements)) std::memset(tile + n, 0, (kElements - n) * sizeof(float));
}

template <class F>
void load_from(float* tile, const void* x, size_t n, float prescale, bool add) {
  if (prescale != 1) {
    return add ? load_as<F, true, true>(tile, x, n, prescale) : load_as<F, false, true>(tile, x, n, prescale);
  }
  return add ? load_as<F, true, false>(tile, x, n, 1) : load_as<F, false, false>(tile, x, n, 1);
}

void load(float* tile, const void* x, DType dtype, size_t n, float prescale, bool add) {
  if (dtype == DType::float16) return load_from<Float16>(tile, x, n, prescale, add);
  if (dtype == DType::bfloat16) return load_from<BFloat16>(tile, x, n, prescale, add);
  load_from<Wide<float>>(tile, x, n, prescale, add);
}

template <class F>
void store_as(void* dst, const float* tile, size_t n) {
  auto* x = out<typename F::Raw>(dst);
  PYCOMM_INDEPENDENT
  for (size_t i = 0; i < n; ++i) x[i].value = F::encode(tile[i]);
}

void store(void* x, DType dtype, const float* tile, size_t n) {
  if (dtype == DType::float16) return store_as<Float16>(x, tile, n);
  if (dtype == DType::bfloat16) return store_as<BFloat16>(x, tile, n);
  store_as<Wide<float>>(x, tile, n);
}

void add(float* tile, const float* other) {
  PYCOMM_INDEPENDENT
  for (int i = 0; i < kElements; ++i) tile[i] += other[i];
}

void divide(float* tile, float divisor) {
  for (int i = 0; i < kElements; ++i) tile[i] /= divisor;
}

// ---- random bits ----

void random(uint8_t* bytes, int counters, uint64_t seed, uint64_t first, uint64_t stream) {
  for (int i = 0; i < counters; ++i) {
    const Philox bits = philox(seed, first + static_cast<uint64_t>(i), stream);
    std::memcpy(bytes + 16 * i, bits.word, 16);  // little endian
  }
}

// ---- codecs without scales ----

template <class C, bool kStochastic>
void encode_plain(const float* tile, const int32_t*, const uint8_t* random, uint8_t* wire) {
  auto* to = out<uint16_t>(wire);
  const auto* wide = in<uint16_t>(random);
  PYCOMM_INDEPENDENT
  for (int i = 0; i < kElements; ++i) {
    const uint32_t bits = !kStochastic ? 0 : C::kRandomBits == 16 ? wide[i].value : random[i];
    to[i].value = C::template encode<kStochastic>(tile[i], bits);
  }
}

template <class C, bool kAdd>
void decode_plain(float* tile, const uint8_t* wire) {
  const auto* from = in<uint16_t>(wire);
  PYCOMM_INDEPENDENT
  for (int i = 0; i < kElements; ++i) {
    const float value = C::decode(from[i].value);
    tile[i] = kAdd ? tile[i] + value : value;
  }
}

// ---- codecs with scales ----

template <int kBlock>
void find_amax(const float* tile, uint32_t* amax) {
  for (int b = 0; b < kElements / kBlock; ++b) {
    uint32_t most = 0;
    for (int i = 0; i < kBlock; ++i) {
      const uint32_t magnitude = magnitude_of(tile[b * kBlock + i]);
      most = most < magnitude ? magnitude : most;
    }
    amax[b] = most;
  }
}

// Elements of 4 bits go through bytes.
void pack_nibbles(uint8_t* to, const uint8_t* codes) {
  for (int i = 0; i < kElements / 2; ++i) {
    to[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
  }
}
void unpack_nibbles(uint8_t* codes, const uint8_t* from) {
  for (int i = 0; i < kElements / 2; ++i) {
    codes[2 * i] = from[i] & 15;
    codes[2 * i + 1] = from[i] >> 4;
  }
}

template <class C, bool kStochastic>
void encode_blocks(const float* tile, const int32_t*, const uint8_t* random, uint8_t* wire) {
  constexpr int kBlocks = kElements / C::kBlock;
  alignas(64) uint32_t amax[kBlocks];
  find_amax<C::kBlock>(tile, amax);
  auto* scales = out<typename C::Scale>(wire);
  for (int b = 0; b < kBlocks; ++b) scales[b].value = C::scale(amax[b]);
  uint8_t* elements = wire + kBlocks * sizeof(typename C::Scale);
  alignas(64) uint8_t bytes[C::kBits == 8 ? 1 : kElements];
  uint8_t* codes = C::kBits == 8 ? elements : bytes;
  for (int b = 0; b < kBlocks; ++b) {
    const float s = C::value(C::scale(amax[b]));
    const float* x = tile + b * C::kBlock;
    uint8_t* to = codes + b * C::kBlock;
    if (!is_scale(s)) {
      std::memset(to, 0, C::kBlock);
      continue;
    }
    const uint8_t* r = random + b * C::kBlock;
    PYCOMM_INDEPENDENT
    for (int i = 0; i < C::kBlock; ++i) {
      to[i] = static_cast<uint8_t>(C::template encode<kStochastic>(x[i], s, kStochastic ? r[i] : 0));
    }
  }
  if constexpr (C::kBits == 4) pack_nibbles(elements, codes);
}

template <class C, bool kAdd>
void decode_blocks(float* tile, const uint8_t* wire) {
  constexpr int kBlocks = kElements / C::kBlock;
  const auto* scales = in<typename C::Scale>(wire);
  const uint8_t* elements = wire + kBlocks * sizeof(typename C::Scale);
  alignas(64) uint8_t bytes[C::kBits == 8 ? 1 : kElements];
  if constexpr (C::kBits == 4) unpack_nibbles(bytes, elements);
  const uint8_t* codes = C::kBits == 8 ? elements : bytes;
  for (int b = 0; b < kBlocks; ++b) {
    const float s = C::value(scales[b].value);
    PYCOMM_INDEPENDENT
    for (int i = b * C::kBlock; i < (b + 1) * C::kBlock; ++i) {
      const float value = C::decode(codes[i], s);
      tile[i] = kAdd ? tile[i] + value : value;
    }
  }
}

// ---- sign ----

void encode_sign(const float* tile, const int32_t* counts, const uint8_t*, uint8_t* wire) {
  using C = SignCode;
  constexpr int kBlocks = kElements / C::kBlock, kBlocksOfPiece = kSegmentAlign / C::kBlock;
  alignas(64) uint32_t amax[kBlocks];
  find_amax<C::kBlock>(tile, amax);
  auto* scales = out<C::Scale>(wire);
  uint8_t* elements = wire + kBlocks * sizeof(C::Scale);
  for (int b = 0; b < kBlocks; ++b) {
    const float* x = tile + b * C::kBlock;
    alignas(64) float sums[C::kBlock];
    for (int i = 0; i < C::kBlock; ++i) sums[i] = C::share(x[i]);
    for (int half = C::kBlock / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    int32_t count = counts[b / kBlocksOfPiece] - b % kBlocksOfPiece * C::kBlock;
    count = count < 0 ? 0 : count > C::kBlock ? C::kBlock : count;
    const C::Scale scale = C::scale(amax[b], sums[0], count);
    scales[b].value = scale;
    uint8_t* to = elements + b * (C::kBlock / 8);
    const bool empty = !is_scale(C::value(scale));
    for (int byte = 0; byte < C::kBlock / 8; ++byte) {
      uint32_t bits = 0;
      for (int i = 0; i < 8; ++i) bits |= C::encode(x[8 * byte + i]) << i;
      to[byte] = empty ? 0 : static_cast<uint8_t>(bits);
    }
  }
}

template <bool kAdd>
void decode_sign(float* tile, const uint8_t* wire) {
  using C = SignCode;
  constexpr int kBlocks = kElements / C::kBlock;
  const auto* scales = in<C::Scale>(wire);
  const uint8_t* elements = wire + kBlocks * sizeof(C::Scale);
  for (int b = 0; b < kBlocks; ++b) {
    const float s = C::value(scales[b].value);
    for (int i = b * C::kBlock; i < (b + 1) * C::kBlock; ++i) {
      const float value = C::decode(elements[i / 8] >> i % 8 & 1, s);
      tile[i] = kAdd ? tile[i] + value : value;
    }
  }
}

// ---- int4 rotated ----

template <int kHalf, class T>
PYCOMM_INLINE void rotate_step(T* x) {
  for (int i = 0; i < Hadamard::kBlock; i += 2 * kHalf) {
    for (int j = i; j < i + kHalf; ++j) {
      const T a = x[j], b = x[j + kHalf];
      x[j] = static_cast<T>(a + b);
      x[j + kHalf] = static_cast<T>(a - b);
    }
  }
}
template <class T>
PYCOMM_INLINE void rotate(T* x) {
  rotate_step<16>(x);
  rotate_step<8>(x);
  rotate_step<4>(x);
  rotate_step<2>(x);
  rotate_step<1>(x);
}

template <bool kStochastic>
void encode_rotated(const float* tile, const int32_t* counts, const uint8_t* random, uint8_t* wire) {
  alignas(64) float rotated[kElements];
  for (int i = 0; i < kElements; ++i) rotated[i] = Hadamard::share(tile[i]);
  for (int b = 0; b < kElements; b += Hadamard::kBlock) rotate(rotated + b);
  encode_blocks<Int4Code, kStochastic>(rotated, counts, random, wire);
}

template <bool kAdd>
void decode_rotated(float* tile, const uint8_t* wire) {
  using C = Int4Code;
  constexpr int kBlocks = kElements / C::kBlock;
  const auto* scales = in<C::Scale>(wire);
  alignas(64) uint8_t codes[kElements];
  unpack_nibbles(codes, wire + kBlocks * sizeof(C::Scale));
  alignas(64) int16_t sums[kElements];
  for (int i = 0; i < kElements; ++i) sums[i] = static_cast<int16_t>(C::integer(codes[i]));
  for (int b = 0; b < kBlocks; ++b) {
    rotate(sums + b * C::kBlock);
    const float s = C::value(scales[b].value);
    for (int i = b * C::kBlock; i < (b + 1) * C::kBlock; ++i) {
      const float value = Hadamard::decode(sums[i], s);
      tile[i] = kAdd ? tile[i] + value : value;
    }
  }
}

// ---- error feedback ----

void add_residual(float* tile, const float* e, size_t n, float k) {
  const auto* from = in<float>(e);
  PYCOMM_INDEPENDENT
  for (size_t i = 0; i < n; ++i) tile[i] += k * from[i].value;
}

void keep_residual(float* next, const float* v, const float* decoded, const float* e, size_t n, float k) {
  const auto* from = in<float>(e);
  auto* to = out<float>(next);
  PYCOMM_INDEPENDENT
  for (size_t i = 0; i < n; ++i) to[i].value = next_residual(v[i], decoded[i], from[i].value, k);
}

// ---- shared_int ----

constexpr int kShared = static_cast<int>(kSharedBlock), kSharedBlocks = kElements / kShared;

void shared_amax(const float* tile, float* amax) {
  alignas(64) uint32_t most[kSharedBlocks];
  find_amax<kShared>(tile, most);
  for (int b = 0; b < kSharedBlocks; ++b) amax[b] = as_float(if_less(most[b], kFloatInf, most[b], kFloatNan));
}

void shared_encode(const float* tile, const float* amax, int32_t limit, const uint8_t* random, int32_t* q) {
  const SharedCode code(limit);
  for (int b = 0; b < kSharedBlocks; ++b) {
    const float s = code.scale(amax[b]);
    int32_t* to = q + b * kShared;
    if (!is_scale(s)) {
      std::memset(to, 0, kShared * sizeof *to);
      continue;
    }
    const float* x = tile + b * kShared;
    const uint8_t* r = random + b * kShared;
    for (int i = 0; i < kShared; ++i) to[i] = code.encode(x[i], s, r[i]);
  }
}

void shared_decode(float* tile, const int32_t* q, const float* amax, int32_t limit) {
  const SharedCode code(limit);
  for (int b = 0; b < kSharedBlocks; ++b) {
    const float s = code.scale(amax[b]);
    for (int i = b * kShared; i < (b + 1) * kShared; ++i) tile[i] = static_cast<float>(q[i]) * s;
  }
}

template <class T>
void narrow(void* to, const int32_t* q, size_t n) {
  auto* x = out<T>(to);
  PYCOMM_INDEPENDENT
  for (size_t i = 0; i < n; ++i) x[i].value = static_cast<T>(q[i]);
}
void shared_narrow(void* to, int width, const int32_t* q, size_t n) {
  if (width == 8) return narrow<int8_t>(to, q, n);
  if (width == 16) return narrow<int16_t>(to, q, n);
  narrow<int32_t>(to, q, n);
}

template <class T>
void widen_from(int32_t* q, const void* from, size_t n) {
  const auto* x = in<T>(from);
  PYCOMM_INDEPENDENT
  for (size_t i = 0; i < n; ++i) q[i] = x[i].value;
  if (n < static_cast<size_t>(kElements)) std::memset(q + n, 0, (kElements - n) * sizeof *q);
}
void shared_widen(int32_t* q, int width, const void* from, size_t n) {
  if (width == 8) return widen_from<int8_t>(q, from, n);
  if (width == 16) return widen_from<int16_t>(q, from, n);
  widen_from<int32_t>(q, from, n);
}

}  // namespace

#define PYCOMM_BLOCKS(...) {encode_blocks<__VA_ARGS__, false>, encode_blocks<__VA_ARGS__, true>}
#define PYCOMM_DECODES(...) {decode_blocks<__VA_ARGS__, false>, decode_blocks<__VA_ARGS__, true>}
const CodecKernels codec_kernels = {
    .load = load,
    .store = store,
    .add = add,
    .divide = divide,
    .random = random,
    .encode = {{encode_plain<Float16Code, false>, encode_plain<Float16Code, true>},
               {encode_plain<BFloat16Code, false>, encode_plain<BFloat16Code, true>},
               PYCOMM_BLOCKS(Float8E4M3Code),
               PYCOMM_BLOCKS(Float8E5M2Code),
               PYCOMM_BLOCKS(Mxfp8Code<false>),
               PYCOMM_BLOCKS(Mxfp8Code<true>),
               PYCOMM_BLOCKS(Int8Code),
               PYCOMM_BLOCKS(Int4Code),
               {encode_rotated<false>, encode_rotated<true>},
               {encode_sign, encode_sign}},
    .decode = {{decode_plain<Float16Code, false>, decode_plain<Float16Code, true>},
               {decode_plain<BFloat16Code, false>, decode_plain<BFloat16Code, true>},
               PYCOMM_DECODES(Float8E4M3Code),
               PYCOMM_DECODES(Float8E5M2Code),
               PYCOMM_DECODES(Mxfp8Code<false>),
               PYCOMM_DECODES(Mxfp8Code<true>),
               PYCOMM_DECODES(Int8Code),
               PYCOMM_DECODES(Int4Code),
               {decode_rotated<false>, decode_rotated<true>},
               {decode_sign<false>, decode_sign<true>}},
    .add_residual = add_residual,
    .keep_residual = keep_residual,
    .shared_amax = shared_amax,
    .shared_encode = shared_encode,
    .shared_decode = shared_decode,
    .shared_narrow = shared_narrow,
    .shared_widen = shared_widen,
};

}  // namespace pycomm::kernels::PYCOMM_ISA
