// An independent implementation of the codecs: element by element, in float64 that is rounded to float32
// where the contract says so, with small floats as tables and the wire bit by bit.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "float_table.h"
#include "kernels/codec.h"

namespace reference {

using namespace pycomm;
using namespace pycomm::kernels;
using Wire = std::vector<uint8_t>;
using Floats = std::vector<float>;

// A float64 sum, product or quotient of float32 numbers rounds to the same float32 as the exact result.
inline float narrow(double x) {
  volatile float result = static_cast<float>(x);
  return result;
}
inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline float quiet(float x) { return std::isnan(x) ? std::bit_cast<float>(0x7fc00000u) : x; }

struct Counter {
  uint32_t word[4];
};
inline Counter philox(const uint32_t (&key)[2], Counter c) {
  for (uint32_t round = 0; round < 10; ++round) {
    const uint64_t p = 0xD2511F53ull * c.word[0], q = 0xCD9E8D57ull * c.word[2];
    c = {{static_cast<uint32_t>(q >> 32) ^ c.word[1] ^ (key[0] + round * 0x9E3779B9u),
          static_cast<uint32_t>(q),
          static_cast<uint32_t>(p >> 32) ^ c.word[3] ^ (key[1] + round * 0xBB67AE85u),
          static_cast<uint32_t>(p)}};
  }
  return c;
}

struct Layout {
  int block, scale_bits, bits;
};
inline Layout layout(CodecKind kind) {
  switch (kind) {
    case CodecKind::none:
      break;
    case CodecKind::fp16:
    case CodecKind::bf16:
      return {1024, 0, 16};
    case CodecKind::fp8_e4m3:
    case CodecKind::fp8_e5m2:
      return {256, 32, 8};
    case CodecKind::mxfp8:
      return {32, 8, 8};
    case CodecKind::int8:
      return {128, 16, 8};
    case CodecKind::int4:
      return {32, 16, 4};
    case CodecKind::sign:
      return {128, 32, 1};
  }
  return {};
}
inline int64_t bytes_of_tile(CodecKind kind, int64_t n) {
  const Layout l = layout(kind);
  return n == 0 ? 0 : 1024 / l.block * l.scale_bits / 8 + (n * l.bits + 127) / 128 * 16;
}

// The tensor that an element at `position` of the data belongs to.
struct Place {
  bool inside;
  uint64_t tensor, offset;
};
inline Place place(const Encoding& e, int64_t position) {
  if (e.segments.empty()) return {true, 0, static_cast<uint64_t>(position)};
  for (const Segment& s : e.segments) {
    if (position >= s.begin && position < s.end) {
      return {true, s.id, static_cast<uint64_t>(position - s.begin)};
    }
  }
  return {false, 0, 0};
}
inline uint32_t random_bits(uint64_t seed, const Encoding& e, int64_t position, int bits) {
  const Place at = place(e, position);
  const uint64_t index = at.tensor << 40 | at.offset, per = 128 / static_cast<uint64_t>(bits);
  const uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  const Counter drawn =
      philox(key, {{static_cast<uint32_t>(index / per), static_cast<uint32_t>(index / per >> 32),
                    (e.turn & 0xff) << 24 | (e.rank & 0xffffff), e.step}});
  const uint64_t bit = index % per * static_cast<uint64_t>(bits);
  return drawn.word[bit / 32] >> bit % 32 & ((1u << bits) - 1);
}

// The code of a magnitude in a table whose largest finite value is values[overflow - 1].
inline uint32_t table_code(const Table& table, double x, const uint32_t* random, int bits) {
  const double most = table.values[table.overflow - 1], magnitude = std::min(std::fabs(x), most);
  const uint32_t sign = std::signbit(x) ? 1u << (table.bits - 1) : 0;
  if (!random) return sign | table.encode(magnitude);
  const auto after = std::upper_bound(table.values.begin(), table.values.end(), magnitude);
  const auto below = static_cast<uint32_t>(after - table.values.begin()) - 1;
  const double fraction = (magnitude - table.values[below]) / (table.values[below + 1] - table.values[below]);
  return sign | (below + (fraction + (2.0 * *random + 1) / std::ldexp(1, bits + 1) >= 1));
}

inline Floats rotated(Floats x) {
  for (int half = 16; half > 0; half /= 2) {
    Floats y = x;
    for (int i = 0; i < 32; ++i)
      y[i] = narrow(i & half ? double{x[i - half]} - x[i] : double{x[i]} + x[i + half]);
    x = y;
  }
  return x;
}

// The scale of a block as it lies on the wire, and as the float32 that multiplies the elements.
struct Scale {
  uint32_t raw = 0;
  float value = 0;
};
inline Scale scale_of(const Codec& c, const Floats& x, int64_t counted) {
  double amax = 0;
  for (const float v : x) {
    if (!std::isfinite(v)) amax = std::nan("");
    if (!(std::fabs(v) <= amax)) amax = std::isnan(amax) ? amax : std::fabs(v);
  }
  const double float_max = std::numeric_limits<float>::max(), least = std::ldexp(1, -126);
  const auto as_float32 = [&](double s) -> Scale {
    const float value = s < least ? 0 : narrow(s);
    return {bits_of(value), value};
  };
  const auto held = [&](double largest_code, double s) {  // at most the scale whose product is finite
    float most = narrow(float_max / largest_code);
    while (std::isinf(narrow(most * largest_code))) most = std::nextafter(most, 0.0f);
    return std::min<double>(s, most);
  };
  const bool bad = std::isnan(amax);
  switch (c.kind) {
    case CodecKind::none:
    case CodecKind::fp16:
    case CodecKind::bf16:
      return {0, 1};
    case CodecKind::fp8_e4m3:
    case CodecKind::fp8_e5m2: {
      const double top = c.kind == CodecKind::fp8_e4m3 ? 448 : 57344;
      return bad ? Scale{0x7fc00000, NAN} : as_float32(held(top, narrow(amax / top)));
    }
    case CodecKind::mxfp8: {
      if (bad) return {255, NAN};
      if (amax == 0) return {};
      int power = std::ilogb(amax) - 8;
      if (c.ceil_scale && amax / std::ldexp(1, power) > 448) ++power;
      power = std::min(power, 119);
      if (power < -126) return {};
      return {static_cast<uint32_t>(power + 127), static_cast<float>(std::ldexp(1, power))};
    }
    case CodecKind::int8:
    case CodecKind::int4: {
      if (bad) return {0x7fc0, NAN};
      const double top = c.kind == CodecKind::int8 ? 127 : 7;
      const float exact = narrow(amax / top);
      uint32_t up = bits_of(exact) >> 16;
      if (bits_of(exact) & 0xffff) ++up;
      while (std::isinf(narrow(std::bit_cast<float>(up << 16) * top))) --up;
      const float value = std::bit_cast<float>(up << 16);
      return value < least ? Scale{} : Scale{up, value};
    }
    case CodecKind::sign: {
      if (bad) return {0x7fc00000, NAN};
      std::vector<double> sums;
      for (const float v : x) sums.push_back(narrow(std::fabs(v) / 128.0));
      for (int half = 64; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) sums[i] = narrow(sums[i] + sums[i + half]);
      }
      return counted == 0 ? Scale{}
                          : as_float32(std::min<double>(narrow(sums[0] / (counted / 128.0)), float_max));
    }
  }
  return {};
}

inline uint32_t element(const Codec& c, float v, const Scale& s, const uint32_t* random) {
  const auto plain = [&](DType dtype, int random_bits) {
    const Table& table = *table_of(dtype);
    return std::isfinite(v) ? table_code(table, v, random, random_bits) : table.encode(v);
  };
  if (c.kind == CodecKind::fp16) return plain(DType::float16, 8);
  if (c.kind == CodecKind::bf16) return plain(DType::bfloat16, 16);
  if (!(s.value > 0)) return 0;
  const double t = narrow(double{v} * narrow(1 / double{s.value}));
  const auto integer = [&](double most, uint32_t mask) {
    const double q = random ? std::floor(t + (2.0 * *random + 1) / 512) : std::nearbyint(t);
    return static_cast<uint32_t>(static_cast<int32_t>(std::clamp(q, -most, most))) & mask;
  };
  switch (c.kind) {
    case CodecKind::none:
    case CodecKind::fp16:
    case CodecKind::bf16:
      break;
    case CodecKind::fp8_e4m3:
    case CodecKind::mxfp8:
      return table_code(*table_of(DType::float8_e4m3fn), t, random, 8);
    case CodecKind::fp8_e5m2:
      return table_code(*table_of(DType::float8_e5m2), t, random, 8);
    case CodecKind::int8:
      return integer(127, 0xff);
    case CodecKind::int4:
      return integer(7, 0xf);
    case CodecKind::sign:
      return v < 0;
  }
  return 0;
}

inline void put_bits(uint8_t* to, int64_t bit, int bits, uint32_t value) {
  for (int i = 0; i < bits; ++i) {
    if (value >> i & 1) to[(bit + i) / 8] = static_cast<uint8_t>(to[(bit + i) / 8] | 1 << (bit + i) % 8);
  }
}
inline uint32_t get_bits(const uint8_t* from, int64_t bit, int bits) {
  uint32_t value = 0;
  for (int i = 0; i < bits; ++i) value |= (uint32_t{from[(bit + i) / 8]} >> (bit + i) % 8 & 1) << i;
  return value;
}

// Encodes v, with zeros between tensors.
inline Wire encode(const Codec& c, const Floats& v, const Encoding& e) {
  const Layout l = layout(c.kind);
  const auto count = static_cast<int64_t>(v.size());
  Wire wire;
  for (int64_t tile = 0; tile < count; tile += 1024) {
    const int64_t n = std::min<int64_t>(1024, count - tile);
    Wire bytes(static_cast<size_t>(bytes_of_tile(c.kind, 1024)) + 16);
    const int64_t scales = 1024 / l.block * l.scale_bits;
    for (int64_t b = 0; b < 1024 / l.block; ++b) {
      Floats x(static_cast<size_t>(l.block));
      int64_t counted = 0;
      for (int i = 0; i < l.block; ++i) {
        const int64_t at = tile + b * l.block + i;
        if (at >= count || !place(e, e.index + at).inside) continue;
        x[i] = v[at];
        ++counted;
      }
      if (c.hadamard) {
        for (float& value : x) value = narrow(value / 32.0);
        x = rotated(x);
      }
      const Scale s = scale_of(c, x, counted);
      put_bits(bytes.data(), b * l.scale_bits, l.scale_bits, s.raw);
      for (int i = 0; i < l.block; ++i) {
        const int64_t at = b * l.block + i;
        uint32_t random = 0;
        const bool stochastic = c.rounding == Rounding::stochastic && place(e, e.index + tile + at).inside;
        if (stochastic)
          random = random_bits(c.seed, e, e.index + tile + at, c.kind == CodecKind::bf16 ? 16 : 8);
        // An element outside of all tensors is zero, whatever its random bits. A rotated block includes it
        // all the same; it then draws the bits of the place that it would have in the tensor before it.
        if (c.hadamard && c.rounding == Rounding::stochastic && !stochastic) {
          Place before = place(e, e.index + tile + at - at % 256);
          if (before.inside) {
            const Segment whole[] = {{0, INT64_MAX, before.tensor}};
            Encoding there = e;
            there.segments = whole;
            random = random_bits(c.seed, there, static_cast<int64_t>(before.offset) + at % 256, 8);
          }
        }
        put_bits(bytes.data(), scales + at * l.bits, l.bits,
                 element(c, x[i], s, c.rounding == Rounding::stochastic ? &random : nullptr));
      }
    }
    wire.insert(wire.end(), bytes.begin(), bytes.begin() + bytes_of_tile(c.kind, n));
  }
  return wire;
}

inline Floats decode(const Codec& c, const Wire& wire, int64_t count) {
  const Layout l = layout(c.kind);
  Floats out;
  for (int64_t tile = 0; tile < count; tile += 1024) {
    const uint8_t* bytes = wire.data() + tile / 1024 * bytes_of_tile(c.kind, 1024);
    const int64_t scales = 1024 / l.block * l.scale_bits;
    const int64_t n = std::min<int64_t>(1024, count - tile);
    for (int64_t b = 0; b * l.block < n; ++b) {
      const uint32_t raw = get_bits(bytes, b * l.scale_bits, l.scale_bits);
      double s = 1;
      if (l.scale_bits == 32) s = std::bit_cast<float>(raw);
      if (l.scale_bits == 16) s = std::bit_cast<float>(raw << 16);
      if (l.scale_bits == 8) s = raw == 255 ? NAN : raw == 0 ? 0 : std::ldexp(1, static_cast<int>(raw) - 127);
      std::vector<double> x;
      const int64_t there = c.hadamard ? 32 : std::min<int64_t>(l.block, n - b * l.block);
      for (int64_t i = 0; i < there; ++i) {
        const uint32_t code = get_bits(bytes, scales + (b * l.block + i) * l.bits, l.bits);
        switch (c.kind) {
          case CodecKind::none:
            break;
          case CodecKind::fp16:
            x.push_back(table_of(DType::float16)->decode(code));
            break;
          case CodecKind::bf16:
            x.push_back(table_of(DType::bfloat16)->decode(code));
            break;
          case CodecKind::fp8_e5m2:
            x.push_back(table_of(DType::float8_e5m2)->decode(code));
            break;
          case CodecKind::fp8_e4m3:
          case CodecKind::mxfp8:
            x.push_back(table_of(DType::float8_e4m3fn)->decode(code));
            break;
          case CodecKind::int8:
            x.push_back(static_cast<int8_t>(code));
            break;
          case CodecKind::int4:
            x.push_back(static_cast<int>(code) - (code < 8 ? 0 : 16));
            break;
          case CodecKind::sign:
            x.push_back(code ? -1 : 1);
            break;
        }
      }
      if (c.hadamard) {
        std::vector<double> y(32);
        for (unsigned i = 0; i < 32; ++i) {
          for (unsigned j = 0; j < 32; ++j) y[i] += std::popcount(i & j) % 2 ? -x[j] : x[j];
        }
        x = y;
      }
      for (int64_t i = 0; i < std::min<int64_t>(l.block, n - b * l.block); ++i) {
        float value = narrow(x[i] * s);
        if (c.hadamard && std::isinf(value)) value = std::copysign(std::numeric_limits<float>::max(), value);
        out.push_back(quiet(value));
      }
    }
  }
  return out;
}

}  // namespace reference
