// The codecs' inner loops for one instruction set, see codec_kernels.h, over the arithmetic of codecs.h:
// plain loops of constant length, of which the compiler makes vectors, and those of strips.h where codes of 8
// bits are made or small floats read, which it does in pieces.
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
#include "kernels/cpu/philox_vector.h"
#include "kernels/cpu/reduce_vector.h"
#include "kernels/cpu/strips.h"

#if defined(__clang__)
#define PYCOMM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define PYCOMM_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace pycomm::kernels::PYCOMM_ISA {
namespace {

constexpr int kElements = static_cast<int>(kTile);
constexpr size_t kCount = kElements;

// to = from + value(i); without `from` where that is null
template <class Value>
PYCOMM_INLINE void sum_each(float* to, const float* from, size_t n, Value value) {
  auto* result = out<float>(to);
  const auto* before = in<float>(from);
  if (from) {
    PYCOMM_INDEPENDENT
    for (size_t i = 0; i < n; ++i) result[i].value = canonical(before[i].value + value(i));
  } else {
    PYCOMM_INDEPENDENT
    for (size_t i = 0; i < n; ++i) result[i].value = canonical(value(i));
  }
}

// The same for a tile, a vector at a time: value(i) of elements from i on.
template <class Value>
PYCOMM_INLINE void sum_vectors(float* to, const float* from, Value value) {
  if (from) {
    for (int i = 0; i < kElements; i += kWidth) {
      kernels::PYCOMM_ISA::encode(to + i, load<Floats>(from + i) + value(i), Wide<float>{});
    }
  } else {
    for (int i = 0; i < kElements; i += kWidth) {
      kernels::PYCOMM_ISA::encode(to + i, value(i), Wide<float>{});
    }
  }
}

// ---- floats ----

template <class F>
void sum_load_as(float* to, const float* from, const void* src, size_t n, float prescale) {
  const auto* x = in<typename F::Raw>(src);
  if (prescale == 1) {
    sum_each(to, from, n, [=](size_t i) PYCOMM_LAMBDA { return F::decode(x[i].value); });
  } else {
    sum_each(to, from, n, [=](size_t i) PYCOMM_LAMBDA { return F::decode(x[i].value) * prescale; });
  }
  if (n < kCount) std::memset(to + n, 0, (kCount - n) * sizeof *to);
}

void sum_load(float* to, const float* from, const void* x, DType dtype, size_t n, float prescale) {
  if (dtype == DType::float16) return sum_load_as<Float16>(to, from, x, n, prescale);
  if (dtype == DType::bfloat16) return sum_load_as<BFloat16>(to, from, x, n, prescale);
  sum_load_as<Wide<float>>(to, from, x, n, prescale);
}

void sum(float* to, const float* from, const float* x) {
  const auto* other = in<float>(x);
  sum_each(to, from, kCount, [=](size_t i) PYCOMM_LAMBDA { return other[i].value; });
}

template <class F>
void store_as(void* dst, const float* from, size_t n) {
  auto* x = out<typename F::Raw>(dst);
  const auto* value = in<float>(from);
  PYCOMM_INDEPENDENT
  for (size_t i = 0; i < n; ++i) x[i].value = F::encode(value[i].value);
}

void store(void* x, DType dtype, const float* from, size_t n) {
  if (dtype == DType::float16) return store_as<Float16>(x, from, n);
  if (dtype == DType::bfloat16) return store_as<BFloat16>(x, from, n);
  store_as<Wide<float>>(x, from, n);
}

void divide(float* to, const float* from, float divisor) {
  auto* result = out<float>(to);
  const auto* x = in<float>(from);
  PYCOMM_INDEPENDENT
  for (size_t i = 0; i < kCount; ++i) result[i].value = x[i].value / divisor;
}

// ---- random bits ----

void random(uint8_t* bytes, int counters, uint64_t seed, uint64_t first, uint64_t stream) {
  philox_run(bytes, counters / 16, seed, first, stream);
}

// ---- codecs without scales ----

template <class C, bool kStochastic>
void encode_plain(const float* x, const int32_t*, const uint8_t* random, uint8_t* wire) {
  const auto* from = in<float>(x);
  auto* to = out<uint16_t>(wire);
  const auto* wide = in<uint16_t>(random);
  PYCOMM_INDEPENDENT
  for (int i = 0; i < kElements; ++i) {
    const uint32_t bits = !kStochastic ? 0 : C::kRandomBits == 16 ? wide[i].value : random[i];
    to[i].value = C::template encode<kStochastic>(from[i].value, bits);
  }
}

template <class C>
void decode_plain(float* to, const float* from, const uint8_t* wire) {
  sum_vectors(to, from, [=](int i) PYCOMM_LAMBDA { return decode(wire + 2 * i, typename C::Format{}); });
}

// ---- codecs with scales ----

// A block's elements over each lane.
template <class O, int kBlock, class V, class Load>
PYCOMM_INLINE V over_lanes(Load load) {
  V of_half[kBlock / kWidth];
  for (int i = 0; i < kBlock / kWidth; ++i) of_half[i] = load(i * kWidth);
  for (int half = kBlock / kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) of_half[i] = O::apply(of_half[i], of_half[i + half]);
  }
  return of_half[0];
}

template <int kBlock>
void find_amax(const float* tile, uint32_t* amax) {
  constexpr int kBlocks = kElements / kBlock;
  if constexpr (kBlocks < kWidth) {
    const auto* x = in<float>(tile);
    for (int b = 0; b < kBlocks; ++b) {
      uint32_t most = 0;
      for (int i = 0; i < kBlock; ++i) {
        const uint32_t magnitude = magnitude_of(x[b * kBlock + i].value);
        most = most < magnitude ? magnitude : most;
      }
      amax[b] = most;
    }
  } else {
    for (int b = 0; b < kBlocks; b += kWidth) {
      Words lanes[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const float* x = tile + (b + i) * kBlock;
        lanes[i] = over_lanes<Largest, kBlock, Words>([=](int at) PYCOMM_LAMBDA {
          Words bits;
          std::memcpy(&bits, x + at, sizeof bits);
          return bits & 0x7fffffff;
        });
      }
      const Words most = reduce_each<Largest>(lanes);
      std::memcpy(amax + b, &most, sizeof most);
    }
  }
}

void find_sums(const float* tile, float* sums) {
  constexpr int kBlock = SignCode::kBlock, kBlocks = kElements / kBlock;
  for (int b = 0; b < kBlocks; b += kWidth) {
    Floats lanes[kWidth] = {};
    for (int i = 0; i < kWidth && b + i < kBlocks; ++i) {
      const float* x = tile + (b + i) * kBlock;
      lanes[i] = over_lanes<Total, kBlock, Floats>([=](int at) PYCOMM_LAMBDA {
        Words bits;
        std::memcpy(&bits, x + at, sizeof bits);
        return reinterpret_cast<Floats>(bits & 0x7fffffff) * (1.0f / kBlock);
      });
    }
    const Floats total = reduce_each<Total>(lanes);
    std::memcpy(sums + b, &total, sizeof(float) * (kBlocks < kWidth ? kBlocks : kWidth));
  }
}

// Each block's value for each of its elements.
template <int kBlock>
void spread(const float* of_blocks, float* of_elements) {
  for (int b = 0; b < kElements / kBlock; ++b) {
    for (int i = 0; i < kBlock; ++i) of_elements[b * kBlock + i] = of_blocks[b];
  }
}

// Elements of 4 bits go through bytes.
void pack_nibbles(uint8_t* to, const uint8_t* codes) {
  const auto* pairs = in<uint16_t>(codes);
  PYCOMM_INDEPENDENT
  for (int i = 0; i < kElements / 2; ++i) to[i] = static_cast<uint8_t>(pairs[i].value | pairs[i].value >> 4);
}
void unpack_nibbles(uint8_t* codes, const uint8_t* from) {
  auto* pairs = out<uint16_t>(codes);
  PYCOMM_INDEPENDENT
  for (int i = 0; i < kElements / 2; ++i) {
    const uint32_t both = from[i];
    pairs[i].value = static_cast<uint16_t>((both | both << 4) & 0x0f0f);
  }
}

// What a block's elements are multiplied by; true if all have a scale.
template <class C>
PYCOMM_INLINE bool find_factors(const uint32_t* amax, float* factors, uint8_t* scales) {
  constexpr int kBlocks = kElements / C::kBlock;
  alignas(64) uint32_t wide[kBlocks];
  alignas(64) float values[kBlocks];
  for (int b = 0; b < kBlocks; ++b) wide[b] = C::wide_scale(amax[b]);
  auto* to = out<typename C::Scale>(scales);
  for (int b = 0; b < kBlocks; ++b) to[b].value = static_cast<typename C::Scale>(wide[b]);
  for (int b = 0; b < kBlocks; ++b) values[b] = C::value(wide[b]);
  for (int b = 0; b < kBlocks; ++b) factors[b] = inverse(values[b]);
  uint32_t unusual = 0;
  for (int b = 0; b < kBlocks; ++b) unusual |= not_scale(values[b]);
  return unusual >> 31 == 0;
}

// The tile with zeros, and a factor of zero, for blocks without a scale: factors 1 / 0 and 1 / NaN.
template <int kBlock>
const float* without_unusual(const float* tile, float* factors, float* numbers) {
  std::memcpy(numbers, tile, kElements * sizeof *tile);
  for (int b = 0; b < kElements / kBlock; ++b) {
    if (magnitude_of(factors[b]) < kFloatInf) continue;
    factors[b] = 0;
    std::memset(numbers + b * kBlock, 0, kBlock * sizeof *numbers);
  }
  return numbers;
}

template <class C, bool kStochastic>
void encode_blocks(const float* tile, const int32_t*, const uint8_t* random, uint8_t* wire) {
  constexpr int kBlocks = kElements / C::kBlock;
  alignas(64) uint32_t amax[kBlocks];
  alignas(64) float factors[kBlocks];
  alignas(64) uint8_t bytes[kElements];
  uint8_t* elements = wire + kBlocks * sizeof(typename C::Scale);
  uint8_t* codes = C::kBits == 8 ? elements : bytes;
  find_amax<C::kBlock>(tile, amax);
  alignas(64) float numbers[kElements];
  if (!find_factors<C>(amax, factors, wire)) {
    tile = without_unusual<C::kBlock>(tile, factors, numbers);
  }
  for (int i = 0; i < kElements; i += 4 * kWidth) {
    Words four[4];
    for (int j = 0; j < 4; ++j) {
      const int at = i + j * kWidth;
      const Words bits = kStochastic ? widen(random + at, uint8_t{}) : Words{};
      four[j] =
          C::template round<kStochastic, Words>(load<Floats>(tile + at) * factors[at / C::kBlock], bits);
    }
    kernels::PYCOMM_ISA::store(codes + i, narrow_four(four));
  }
  if constexpr (C::kBits == 4) pack_nibbles(elements, codes);
}

// The sums of a tile whose elements are bytes: decode(code, the block's scale).
template <int kBlock, class Decode>
PYCOMM_INLINE void sum_blocks(float* to, const float* from, const uint8_t* codes, const float* scales,
                              Decode decode) {
  if constexpr (kBlock >= 128) {
    for (int b = 0; b < kElements / kBlock; ++b) {
      const float s = scales[b];
      const uint8_t* x = codes + b * kBlock;
      sum_each(to + b * kBlock, from ? from + b * kBlock : nullptr, kBlock,
               [=](size_t i) PYCOMM_LAMBDA { return decode(x[i], s); });
    }
  } else {
    alignas(64) float spread_out[kElements];
    spread<kBlock>(scales, spread_out);
    const float* s = spread_out;
    sum_each(to, from, kCount, [=](size_t i) PYCOMM_LAMBDA { return decode(codes[i], s[i]); });
  }
}

template <class C>
void decode_blocks(float* to, const float* from, const uint8_t* wire) {
  constexpr int kBlocks = kElements / C::kBlock;
  alignas(64) float scales[kBlocks];
  const auto* x = in<typename C::Scale>(wire);
  for (int b = 0; b < kBlocks; ++b) scales[b] = C::value(x[b].value);
  const uint8_t* codes = wire + kBlocks * sizeof(typename C::Scale);
  if constexpr (requires { typename C::Format; }) {
    const float* s = scales;
    return sum_vectors(to, from, [=](int i) PYCOMM_LAMBDA {
      return decode(codes + i, typename C::Format{}) * s[i / C::kBlock];
    });
  }
  alignas(64) uint8_t bytes[kElements];
  if constexpr (C::kBits == 4) {
    unpack_nibbles(bytes, codes);
    codes = bytes;
  }
  sum_blocks<C::kBlock>(to, from, codes, scales,
                        [](uint8_t code, float s) PYCOMM_LAMBDA { return C::decode(code, s); });
}

// ---- sign ----

// Elements of a bit go through bytes that are 0 or 1, eight of them at once.
void pack_bits(uint8_t* to, const uint8_t* codes) {
  const auto* eights = in<uint64_t>(codes);
  PYCOMM_INDEPENDENT
  for (int i = 0; i < kElements / 8; ++i) {
    to[i] = static_cast<uint8_t>(eights[i].value * 0x0102040810204080 >> 56);  // byte j goes to bit 56 + j
  }
}
void unpack_bits(uint8_t* codes, const uint8_t* from) {
  auto* eights = out<uint64_t>(codes);
  PYCOMM_INDEPENDENT
  for (int i = 0; i < kElements / 8; ++i) {
    // Bit j alone in byte j; it carries into the highest bit.
    const uint64_t bits = (uint64_t{from[i]} * 0x0101010101010101) & 0x8040201008040201;
    eights[i].value = ((bits + 0x7f7f7f7f7f7f7f7f) | bits) >> 7 & 0x0101010101010101;
  }
}

void encode_sign(const float* tile, const int32_t* counts, const uint8_t*, uint8_t* wire) {
  using C = SignCode;
  constexpr int kBlocks = kElements / C::kBlock, kBlocksOfPiece = kSegmentAlign / C::kBlock;
  const auto* x = in<float>(tile);
  alignas(64) uint32_t amax[kBlocks];
  alignas(64) float sums[kBlocks];
  alignas(64) uint8_t negative[kElements];
  find_amax<C::kBlock>(tile, amax);
  find_sums(tile, sums);
  for (int i = 0; i < kElements; ++i) negative[i] = static_cast<uint8_t>(C::encode(x[i].value));
  auto* scales = out<C::Scale>(wire);
  for (int b = 0; b < kBlocks; ++b) {
    int32_t count = counts[b / kBlocksOfPiece] - b % kBlocksOfPiece * C::kBlock;
    count = count < 0 ? 0 : count > C::kBlock ? C::kBlock : count;
    const C::Scale scale = C::scale(amax[b], sums[b], count);
    scales[b].value = scale;
    if (!is_scale(C::value(scale))) std::memset(negative + b * C::kBlock, 0, C::kBlock);
  }
  pack_bits(wire + kBlocks * sizeof(C::Scale), negative);
}

void decode_sign(float* to, const float* from, const uint8_t* wire) {
  using C = SignCode;
  constexpr int kBlocks = kElements / C::kBlock;
  alignas(64) uint8_t negative[kElements];
  alignas(64) float scales[kBlocks];
  const auto* x = in<C::Scale>(wire);
  for (int b = 0; b < kBlocks; ++b) scales[b] = C::value(x[b].value);
  unpack_bits(negative, wire + kBlocks * sizeof(C::Scale));
  sum_blocks<C::kBlock>(to, from, negative, scales,
                        [](uint8_t bit, float s) PYCOMM_LAMBDA { return C::decode(bit, s); });
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
  const auto* x = in<float>(tile);
  alignas(64) float rotated[kElements];
  for (int i = 0; i < kElements; ++i) rotated[i] = Hadamard::share(x[i].value);
  for (int b = 0; b < kElements; b += Hadamard::kBlock) rotate(rotated + b);
  encode_blocks<Int4Code, kStochastic>(rotated, counts, random, wire);
}

void decode_rotated(float* to, const float* from, const uint8_t* wire) {
  using C = Int4Code;
  constexpr int kBlocks = kElements / C::kBlock;
  const auto* scales = in<C::Scale>(wire);
  alignas(64) uint8_t codes[kElements];
  unpack_nibbles(codes, wire + kBlocks * sizeof(C::Scale));
  alignas(64) int16_t sums[kElements];
  for (int i = 0; i < kElements; ++i) sums[i] = static_cast<int16_t>(C::integer(codes[i]));
  for (int b = 0; b < kBlocks; ++b) rotate(sums + b * C::kBlock);
  for (int b = 0; b < kBlocks; ++b) {
    const float s = C::value(scales[b].value);
    const int16_t* x = sums + b * C::kBlock;
    sum_each(to + b * C::kBlock, from ? from + b * C::kBlock : nullptr, C::kBlock,
             [=](size_t i) PYCOMM_LAMBDA { return Hadamard::decode(x[i], s); });
  }
}

// ---- error feedback ----

void add_residual(float* to, const float* x, const float* e, size_t n, float k) {
  auto* v = out<float>(to);
  const auto* value = in<float>(x);
  const auto* residual = in<float>(e);
  PYCOMM_INDEPENDENT
  for (size_t i = 0; i < n; ++i) v[i].value = value[i].value + k * residual[i].value;
}

template <bool kDivide>
void keep_residual_of(float* next, const float* v, const float* decoded, const float* e, size_t n, float k) {
  auto* to = out<float>(next);
  const auto* value = in<float>(v);
  const auto* sent = in<float>(decoded);
  const auto* before = in<float>(e);
  PYCOMM_INDEPENDENT
  for (size_t i = 0; i < n; ++i) {
    to[i].value = next_residual(value[i].value, sent[i].value, before[i].value, kDivide ? k : 1);
  }
}

void keep_residual(float* next, const float* v, const float* decoded, const float* e, size_t n, float k) {
  if (k == 1) return keep_residual_of<false>(next, v, decoded, e, n, k);
  keep_residual_of<true>(next, v, decoded, e, n, k);
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
const CodecKernels codec_kernels = {
    .sum_load = sum_load,
    .sum = sum,
    .sum_decode = {decode_plain<Float16Code>, decode_plain<BFloat16Code>, decode_blocks<Float8E4M3Code>,
                   decode_blocks<Float8E5M2Code>, decode_blocks<Mxfp8Code<false>>,
                   decode_blocks<Mxfp8Code<true>>, decode_blocks<Int8Code>, decode_blocks<Int4Code>,
                   decode_rotated, decode_sign},
    .store = store,
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
    .add_residual = add_residual,
    .keep_residual = keep_residual,
    .shared_amax = shared_amax,
    .shared_encode = shared_encode,
    .shared_decode = shared_decode,
    .shared_narrow = shared_narrow,
    .shared_widen = shared_widen,
};

}  // namespace pycomm::kernels::PYCOMM_ISA
