// The codecs' inner loops for one instruction set (codec_kernels.h), over the arithmetic of codecs.h. Most
// are plain loops of constant length, which the compiler vectorises. Where 8-bit codes are made or small
// floats are read, it would vectorise only in pieces, and the vectors of strips.h are used.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

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

// Over a tile: to = from + value(i), where value(i) gives the vector of elements from i on; to = value(i) if
// `from` is null.
template <class Value>
PYCOMM_INLINE void sum_vectors(float* to, const float* from, bool past, Value value) {
  constexpr int kFour = 4 * kWidth;
  if (from) {
    for (int i = 0; i < kElements; i += kFour) {
      prefetch(from + i, kFour * sizeof *from);
      for (int at = i; at < i + kFour; at += kWidth) {
        kernels::PYCOMM_ISA::encode(to + at, load<Floats>(from + at) + value(at), Wide<float>{});
      }
    }
  } else if (past) {
    for (int i = 0; i < kElements; i += kFour) {
      for (int at = i; at < i + kFour; at += kWidth) stream(to + at, encoded(value(at), Wide<float>{}));
    }
  } else {
    for (int i = 0; i < kElements; i += kFour) {
      for (int at = i; at < i + kFour; at += kWidth) {
        kernels::PYCOMM_ISA::encode(to + at, value(at), Wide<float>{});
      }
    }
  }
}

// ---- floats ----

// Calls step(to, from, i) for each kStep elements from i on, in place; the last ones, fewer than kStep, go
// through a buffer. From and To are the types in memory.
template <class From, class To, int kStep, class Step>
PYCOMM_INLINE void each_step(void* to, const void* from, size_t n, Step step) {
  const auto* x = static_cast<const char*>(from);
  auto* result = static_cast<char*>(to);
  size_t i = 0;
  for (; i + kStep <= n; i += kStep) step(result + i * sizeof(To), x + i * sizeof(From), i);
  if (i == n) return;
  char rest[kStep * sizeof(From)] = {}, results[kStep * sizeof(To)];
  std::memcpy(rest, x + i * sizeof(From), (n - i) * sizeof(From));
  step(results, rest, i);
  std::memcpy(result + i * sizeof(To), results, (n - i) * sizeof(To));
}

template <class F>
void sum_load_as(float* to, const float* from, const void* src, size_t n, float prescale) {
  using Raw = typename F::Raw;
  each_step<Raw, float, kWidth>(to, src, n, [=](char* result, const char* x, size_t i) PYCOMM_LAMBDA {
    prefetch(x, kWidth * sizeof(Raw));
    Floats value = decode_number(x, F{}) * prescale;
    if (from) value += load<Floats>(from + i);
    kernels::PYCOMM_ISA::encode(result, value, Wide<float>{});
  });
  if (n < kCount) std::memset(to + n, 0, (kCount - n) * sizeof *to);
}

void sum_load(float* to, const float* from, const void* x, DType dtype, size_t n, float prescale) {
  if (dtype == DType::float16) return sum_load_as<Float16>(to, from, x, n, prescale);
  if (dtype == DType::bfloat16) return sum_load_as<BFloat16>(to, from, x, n, prescale);
  sum_load_as<Wide<float>>(to, from, x, n, prescale);
}

void sum(float* to, const float* from, const float* x) {
  sum_vectors(to, from, false, [=](int i) PYCOMM_LAMBDA { return load<Floats>(x + i); });
}

template <class F>
void store_as(void* dst, const float* from, size_t n) {
  const auto step = [](char* result, const char* x, size_t) PYCOMM_LAMBDA {
    Floats values[kToFill<F>];
    for (int v = 0; v < kToFill<F>; ++v) values[v] = load<Floats>(x + v * sizeof(Floats));
    encode_full<false, false>(result, values, F{});
  };
  each_step<float, typename F::Raw, kToFill<F> * kWidth>(dst, from, n, step);
}

void store(void* x, DType dtype, const float* from, size_t n) {
  if (dtype == DType::float16) return store_as<Float16>(x, from, n);
  if (dtype == DType::bfloat16) return store_as<BFloat16>(x, from, n);
  store_as<Wide<float>>(x, from, n);
}

// Whether all magnitudes, as bits, are below that of infinity: then there is no Inf and no NaN.
template <class Bits>
bool all_below(const void* x, size_t n, Bits infinity) {
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  const auto* from = in<Bits>(x);
  Bits most = 0;
  for (size_t i = 0; i < n; ++i) {
    const Bits magnitude = from[i].value & kMagnitude;
    most = most < magnitude ? magnitude : most;
  }
  return most < infinity;
}

bool finite(const void* x, DType dtype, size_t n) {
  if (dtype == DType::float16) return all_below<uint16_t>(x, n, 0x7c00);
  if (dtype == DType::bfloat16) return all_below<uint16_t>(x, n, 0x7f80);
  return all_below<uint32_t>(x, n, kFloatInf);
}

void divide(float* to, const float* from, float divisor) {
  auto* result = out<float>(to);
  const auto* x = in<float>(from);
  PYCOMM_INDEPENDENT
  for (size_t i = 0; i < kCount; ++i) result[i].value = x[i].value / divisor;
}

// ---- random bits ----

void random(uint8_t* bytes, int counters, uint64_t seed, uint64_t first, uint64_t stream, const void* x,
            size_t size) {
  philox_run(bytes, counters / 16, seed, first, stream, x, size);
}

// ---- codecs without scales ----

// The codes of two vectors of numbers, without NaN and Inf.
template <class C, bool kStochastic>
PYCOMM_INLINE auto plain_codes(const Words* bits, const Words* random, C) {
  const Words codes[2] = {C::template number<kStochastic>(bits[0], random[0]),
                          C::template number<kStochastic>(bits[1], random[1])};
  return narrow_two(codes);
}
#if defined(__F16C__)
template <>
PYCOMM_INLINE auto plain_codes<Float16Code, false>(const Words* bits, const Words*, Float16Code) {
  const Words most = fill<Words>(Float16Code::Rounded::kMax);
  Floats held[2];
  for (int v = 0; v < 2; ++v) {
    const Words magnitude = smaller(bits[v] & 0x7fffffff, most);
    held[v] = Lane<Words>::to_float(magnitude | (bits[v] & 0x80000000));
  }
  return encoded_two<true>(held, Float16{});
}
#endif

// A tile that has a NaN or Inf is encoded a second time.
template <class C, bool kStochastic>
void encode_plain(const float* x, const int32_t*, const uint8_t* random, uint8_t* wire) {
  using Random = std::conditional_t<C::kRandomBits == 16, uint16_t, uint8_t>;
  Words top{};
  for (int i = 0; i < kElements; i += 2 * kWidth) {
    prefetch(x + i, 2 * kWidth * sizeof *x);
    Words bits[2], drawn[2] = {};
    for (int v = 0; v < 2; ++v) {
      const int at = i + v * kWidth;
      bits[v] = load<Words>(x + at);
      if constexpr (kStochastic) drawn[v] = widen(random + at * sizeof(Random), Random{});
      top = larger(top, bits[v] & 0x7fffffff);
    }
    kernels::PYCOMM_ISA::store(wire + 2 * i, plain_codes<C, kStochastic>(bits, drawn, C{}));
  }
  if (largest(top) < kFloatInf) return;
  const auto* from = in<float>(x);
  const auto* drawn = in<Random>(random);
  auto* to = out<uint16_t>(wire);
  PYCOMM_INDEPENDENT
  for (int i = 0; i < kElements; ++i) {
    to[i].value = C::template encode<kStochastic>(from[i].value, kStochastic ? drawn[i].value : 0);
  }
}

template <class C>
void decode_plain(float* to, const float* from, const uint8_t* wire, bool past) {
  sum_vectors(to, from, past, [=](int i) PYCOMM_LAMBDA {
    if (i % (4 * kWidth) == 0) prefetch(wire + 2 * i, 8 * kWidth);
    return decode_number(wire + 2 * i, typename C::Format{});
  });
}

// ---- codecs with scales ----

// Reduces each block over value(magnitude) of its elements, and calls each(index of the block's first
// element).
template <class O, int kBlock, class V, class Value, class Each>
PYCOMM_INLINE void reduce_blocks(void* results, const float* tile, Value value, Each each) {
  constexpr int kBlocks = kElements / kBlock, kAtOnce = kBlocks < kWidth ? kBlocks : kWidth;
  for (int b = 0; b < kBlocks; b += kWidth) {
    V lanes[kWidth] = {};
    for (int i = 0; i < kAtOnce; ++i) {
      const int begin = (b + i) * kBlock;
      prefetch<2>(tile + begin, kBlock * sizeof *tile);
      lanes[i] = over_lanes<O, kBlock / kWidth>([=](int v) PYCOMM_LAMBDA -> V {
        return value(load<Words>(tile + begin + v * kWidth) & 0x7fffffff);
      });
      each(begin);
    }
    const V reduced = reduce_each<O>(lanes);
    std::memcpy(static_cast<char*>(results) + b * sizeof(float), &reduced, kAtOnce * sizeof(float));
  }
}

template <int kBlock>
PYCOMM_INLINE void find_amax(const float* tile, uint32_t* amax) {
  reduce_blocks<Largest, kBlock, Words>(
      amax, tile, [](Words magnitude) PYCOMM_LAMBDA { return magnitude; }, [](int) {});
}

// Elements of 4 bits are converted by way of signed bytes.
PYCOMM_INLINE void pack_nibbles(uint8_t* to, const uint8_t* codes) {
  const auto* pairs = in<uint16_t>(codes);
  PYCOMM_INDEPENDENT
  for (int i = 0; i < kElements / 2; ++i) {
    const uint32_t both = pairs[i].value;
    to[i] = static_cast<uint8_t>((both & 0x0f) | (both >> 4 & 0xf0));
  }
}
PYCOMM_INLINE void unpack_nibbles(uint8_t* codes, const uint8_t* from) {
  auto* pairs = out<uint16_t>(codes);
  PYCOMM_INDEPENDENT
  for (int i = 0; i < kElements / 2; ++i) {
    const uint32_t both = from[i];
    pairs[i].value = static_cast<uint16_t>((both | both << 4) & 0x0f0f);
  }
  for (int i = 0; i < kElements; ++i) codes[i] = static_cast<uint8_t>((codes[i] ^ 8) - 8);
}

// Finds the factors and the scales of all blocks; true if every block has a scale.
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

// For blocks without a scale, whose factor is 1 / 0 or 1 / NaN: replaces their elements, in a copy of the
// tile, and their factors by zeros.
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

// C::round() for four vectors of scaled values.
template <bool kStochastic, class C>
PYCOMM_INLINE auto round_four(const Floats* x, const Words* random, C) {
  Integers q[4];
  for (int v = 0; v < 4; ++v) {
    q[v] = kStochastic ? round_stochastic<Words>(x[v], random[v]) : round_even<Words>(x[v]);
  }
  return narrow_four(q, C::kLimit);
}
template <bool kStochastic, class C>
  requires requires { typename C::Rounded; }
PYCOMM_INLINE auto round_four(const Floats* x, const Words* random, C) {
  using Rounded = typename C::Rounded;
  Words held[4], codes[4], least = fill<Words>(kFloatInf);
  for (int v = 0; v < 4; ++v) {
    held[v] = Rounded::held(Lane<Words>::to_bits(x[v]));
    if constexpr (kStochastic) least = smaller(least, held[v]);
  }
  if (kStochastic && all_reach(least, C::Format::kMinNormal)) {
    for (int v = 0; v < 4; ++v) codes[v] = Rounded::round_stochastic_normal(held[v], random[v]);
  } else {
    for (int v = 0; v < 4; ++v) {
      codes[v] = kStochastic ? Rounded::round_stochastic_magnitude(held[v], random[v])
                             : C::Format::round_magnitude(held[v]) & (C::Format::kSign - 1);
    }
  }
  return narrow_four(codes, x);
}

template <class C, bool kStochastic>
void encode_blocks(const float* tile, const int32_t*, const uint8_t* random, uint8_t* wire) {
  static_assert(C::kBits == 8 || C::kBits == 4, "pack and unpack elements of other sizes here");
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
    prefetch(tile + i, 4 * kWidth * sizeof *tile);
    Floats scaled[4];
    Words drawn[4] = {};
    for (int v = 0; v < 4; ++v) {
      const int at = i + v * kWidth;
      scaled[v] = load<Floats>(tile + at) * factors[at / C::kBlock];
      if constexpr (kStochastic) drawn[v] = widen(random + at, uint8_t{});
    }
    kernels::PYCOMM_ISA::store(codes + i, round_four<kStochastic>(scaled, drawn, C{}));
  }
  if constexpr (C::kBits == 4) pack_nibbles(elements, codes);
}

template <class C>
void decode_blocks(float* to, const float* from, const uint8_t* wire, bool past) {
  constexpr int kBlocks = kElements / C::kBlock;
  alignas(64) float scales[kBlocks];
  const auto* x = in<typename C::Scale>(wire);
  for (int b = 0; b < kBlocks; ++b) scales[b] = C::value(x[b].value);
  const uint8_t* codes = wire + kBlocks * sizeof(typename C::Scale);
  const float* s = scales;
  alignas(64) uint8_t bytes[kElements];
  if constexpr (C::kBits == 4) {
    unpack_nibbles(bytes, codes);
    codes = bytes;
  }
  sum_vectors(to, from, past, [=](int i) PYCOMM_LAMBDA {
    if (C::kBits == 8 && i % (4 * kWidth) == 0) prefetch(codes + i, 4 * kWidth);
    if constexpr (requires { typename C::Format; }) {
      return decode_number(codes + i, typename C::Format{}) * s[i / C::kBlock];
    } else {
      return __builtin_convertvector(widen(codes + i, int8_t{}), Floats) * s[i / C::kBlock];
    }
  });
}

// ---- sign ----

// The mean magnitude shows NaN and Inf in place of amax: it is finite if all elements are.
void encode_sign(const float* tile, const int32_t* counts, const uint8_t*, uint8_t* wire) {
  using C = SignCode;
  constexpr int kBlocks = kElements / C::kBlock, kBlocksOfPiece = kSegmentAlign / C::kBlock;
  constexpr int kFour = 4 * kWidth;
  alignas(64) float sums[kBlocks];
  uint8_t* bits = wire + kBlocks * sizeof(C::Scale);
  const auto share = [](Words magnitude)
                         PYCOMM_LAMBDA { return Lane<Words>::to_float(magnitude) * (1.0f / C::kBlock); };
  reduce_blocks<Total, C::kBlock, Floats>(sums, tile, share, [=](int begin) PYCOMM_LAMBDA {
    prefetch<2>(tile + begin + kLine / sizeof *tile, C::kBlock * sizeof *tile);
    for (int i = begin; i < begin + C::kBlock; i += kFour) {
      Integers negative[4];
      for (int v = 0; v < 4; ++v) negative[v] = load<Floats>(tile + i + v * kWidth) < 0;
      const uint64_t mask = mask_of_four(negative);
      std::memcpy(bits + i / 8, &mask, kFour / 8);
    }
  });
  auto* scales = out<C::Scale>(wire);
  for (int b = 0; b < kBlocks; ++b) {
    int32_t count = counts[b / kBlocksOfPiece] - b % kBlocksOfPiece * C::kBlock;
    count = count < 0 ? 0 : count > C::kBlock ? C::kBlock : count;
    const C::Scale scale = C::scale(as_bits(sums[b]), sums[b], count);
    scales[b].value = scale;
    if (!is_scale(C::value(scale))) std::memset(bits + b * C::kBlock / 8, 0, C::kBlock / 8);
  }
}

template <int... i>
PYCOMM_INLINE Words powers(std::integer_sequence<int, i...>) {
  return Words{(1u << i)...};
}
void decode_sign(float* to, const float* from, const uint8_t* wire, bool past) {
  using C = SignCode;
  constexpr int kBlocks = kElements / C::kBlock;
  const auto* scales = in<C::Scale>(wire);
  const uint8_t* bits = wire + kBlocks * sizeof(C::Scale);
  Words lanes[32 / kWidth];  // the bit of each lane, among 32
  for (int v = 0; v < 32 / kWidth; ++v) {
    lanes[v] = powers(std::make_integer_sequence<int, kWidth>()) << (v * kWidth);
  }
  sum_vectors(to, from, past, [=](int i) PYCOMM_LAMBDA {
    const Words lane = lanes[i / kWidth % (32 / kWidth)];
    const Words some = fill<Words>(load<uint32_t>(bits + i / 32 * 4)) & lane;
    const Words sign = __builtin_bit_cast(Words, some == lane) & 0x80000000;
    return Lane<Words>::to_float(sign ^ as_bits(C::value(scales[i / C::kBlock].value)));
  });
}

// ---- int4 rotated ----

template <int kHalf, int... i>
PYCOMM_INLINE Floats rotate_lanes(Floats x, std::integer_sequence<int, i...>) {
  const Words sign = {(i & kHalf ? 0x80000000u : 0)...};
  return __builtin_shufflevector(x, x, (i ^ kHalf)...) +
         Lane<Words>::to_float(Lane<Words>::to_bits(x) ^ sign);
}
template <int kHalf = Hadamard::kBlock / 2>
PYCOMM_INLINE void rotate(Floats* x) {
  constexpr int kVectors = Hadamard::kBlock / kWidth;
  if constexpr (kHalf >= kWidth) {
    constexpr int kStride = kHalf / kWidth;
    for (int v = 0; v < kVectors; ++v) {
      if (v & kStride) continue;
      const Floats a = x[v], b = x[v + kStride];
      x[v] = a + b;
      x[v + kStride] = a - b;
    }
  } else {
    for (int v = 0; v < kVectors; ++v) {
      x[v] = rotate_lanes<kHalf>(x[v], std::make_integer_sequence<int, kWidth>());
    }
  }
  if constexpr (kHalf > 1) rotate<kHalf / 2>(x);
}

// Rotates each block of 32; load_from(i) gives the vector of elements from i on.
template <class Load>
PYCOMM_INLINE void rotate_blocks(float* to, Load load_from) {
  constexpr int kVectors = Hadamard::kBlock / kWidth;
  for (int b = 0; b < kElements; b += Hadamard::kBlock) {
    Floats x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load_from(b + v * kWidth);
    rotate(x);
    for (int v = 0; v < kVectors; ++v) kernels::PYCOMM_ISA::store(to + b + v * kWidth, x[v]);
  }
}

template <bool kStochastic>
void encode_rotated(const float* tile, const int32_t* counts, const uint8_t* random, uint8_t* wire) {
  alignas(64) float rotated[kElements];
  rotate_blocks(rotated,
                [=](int i) PYCOMM_LAMBDA { return load<Floats>(tile + i) * (1.0f / Hadamard::kBlock); });
  encode_blocks<Int4Code, kStochastic>(rotated, counts, random, wire);
}

void decode_rotated(float* to, const float* from, const uint8_t* wire, bool past) {
  using C = Int4Code;
  constexpr int kBlocks = kElements / C::kBlock;
  const auto* scales = in<C::Scale>(wire);
  alignas(64) uint8_t codes[kElements];
  alignas(64) float sums[kElements];
  unpack_nibbles(codes, wire + kBlocks * sizeof(C::Scale));
  rotate_blocks(sums, [&](int i) PYCOMM_LAMBDA {  // integers, exact in float32
    return __builtin_convertvector(widen(codes + i, int8_t{}), Floats);
  });
  sum_vectors(to, from, past, [&](int i) PYCOMM_LAMBDA {  // Hadamard::decode()
    const Words bits = Lane<Words>::to_bits(load<Floats>(sums + i) * C::value(scales[i / C::kBlock].value));
    return Lane<Words>::to_float(bits + __builtin_bit_cast(Words, (bits & 0x7fffffff) == kFloatInf));
  });
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

void shared_narrow(void* to, int width, const int32_t* q, size_t n) {
  if (width == 32) {
    std::memcpy(to, q, n * sizeof *q);
  } else if (width == 16) {
    each_step<int32_t, int16_t, 2 * kWidth>(to, q, n, [](char* result, const char* x, size_t) PYCOMM_LAMBDA {
      const Words words[2] = {load<Words>(x) & 0xffff, load<Words>(x + sizeof(Words)) & 0xffff};
      kernels::PYCOMM_ISA::store(result, narrow_two(words));
    });
  } else {
    each_step<int32_t, int8_t, 4 * kWidth>(to, q, n, [](char* result, const char* x, size_t) PYCOMM_LAMBDA {
      Integers integers[4];
      for (int v = 0; v < 4; ++v) integers[v] = load<Integers>(x + v * sizeof(Integers));
      kernels::PYCOMM_ISA::store(result, narrow_four(integers, 127));
    });
  }
}

template <class T>
void widen_from(int32_t* q, const void* from, size_t n) {
  each_step<T, int32_t, kWidth>(q, from, n, [](char* result, const char* x, size_t) PYCOMM_LAMBDA {
    kernels::PYCOMM_ISA::store(result, widen(x, T{}));
  });
}
void shared_widen(int32_t* q, int width, const void* from, size_t n) {
  if (width == 8) {
    widen_from<int8_t>(q, from, n);
  } else if (width == 16) {
    widen_from<int16_t>(q, from, n);
  } else {
    std::memcpy(q, from, n * sizeof *q);
  }
  if (n < kCount) std::memset(q + n, 0, (kCount - n) * sizeof *q);
}

}  // namespace

#define PYCOMM_BLOCKS(...) {encode_blocks<__VA_ARGS__, false>, encode_blocks<__VA_ARGS__, true>}
constexpr CodecKernels codec_kernels = {
    .stream_align = kStreamAlign,
    .sum_load = sum_load,
    .sum = sum,
    .sum_decode = {decode_plain<Float16Code>, decode_plain<BFloat16Code>, decode_blocks<Float8E4M3Code>,
                   decode_blocks<Float8E5M2Code>, decode_blocks<Mxfp8Code<false>>,
                   decode_blocks<Mxfp8Code<true>>, decode_blocks<Int8Code>, decode_blocks<Int4Code>,
                   decode_rotated, decode_sign},
    .store = store,
    .finite = finite,
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
