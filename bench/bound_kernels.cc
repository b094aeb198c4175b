// How fast encodes and packs are, on one core, compared with loops that move the same bytes and compute next
// to nothing.
//
//   build/bench_bound_kernels [MIB]         reads MIB (default: 100) MiB of float32; one JSON line per wire
// width
//
// A bound reads float32 tile by tile, narrows them by the cheapest instruction and stores as many bytes as
// the wire would hold. With `scaled` it reads the tile once more before, for its largest magnitude, as the
// scale of a block requires. A share is relative to a copy of as many bytes, read and written together, in
// the same run; the least time of all turns counts.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "kernels/codec.h"
#include "kernels/copy.h"

using namespace pycomm;
using namespace pycomm::kernels;

namespace {

double now_us() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

__m256i at(const float* x, int v) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x) + v); }

// Reads 32 elements and writes 32 * kBits / 8 bytes.
template <int kBits>
void narrow(const float* x, unsigned char* to) {
  _mm_prefetch(reinterpret_cast<const char*>(x) + 4096, _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(x) + 4160, _MM_HINT_T0);
  const __m256i a = _mm256_packs_epi32(at(x, 0), at(x, 1)), b = _mm256_packs_epi32(at(x, 2), at(x, 3));
  auto* out = reinterpret_cast<__m256i*>(to);
  if constexpr (kBits == 16) {
    _mm256_storeu_si256(out, a);
    _mm256_storeu_si256(out + 1, b);
  } else if constexpr (kBits == 8) {
    _mm256_storeu_si256(out, _mm256_packs_epi16(a, b));
  } else if constexpr (kBits == 4) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(_mm256_packs_epi16(a, b)));
  } else {
    const int signs = _mm256_movemask_epi8(_mm256_packs_epi16(a, b));
    __builtin_memcpy(to, &signs, sizeof signs);
  }
}

volatile int sink = 0;

template <int kBits, bool kScaled>
void bound(const float* x, unsigned char* to, size_t count) {
  int total = 0;
  for (size_t tile = 0; tile < count; tile += kTile) {
    if (kScaled) {
      __m256i largest[4] = {};
      for (int i = 0; i < kTile; i += 32) {
        _mm_prefetch(reinterpret_cast<const char*>(x + tile + i) + 4096, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(x + tile + i) + 4160, _MM_HINT_T0);
        for (int v = 0; v < 4; ++v) largest[v] = _mm256_max_epu32(largest[v], at(x + tile + i, v));
      }
      total += _mm256_extract_epi32(
          _mm256_or_si256(_mm256_or_si256(largest[0], largest[1]), _mm256_or_si256(largest[2], largest[3])),
          0);
    }
    for (int i = 0; i < kTile; i += 32) narrow<kBits>(x + tile + i, to + (tile + i) * kBits / 8);
  }
  sink = sink + total;
}

struct Turn {
  std::string name;
  size_t bytes;
  std::function<void()> run;
  double least_us = 1e30;
};

}  // namespace

int main(int argc, char** argv) {
  const size_t count = (argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 100) * (1 << 20) / 4 / kTile * kTile;
  auto* x = static_cast<float*>(std::aligned_alloc(4096, count * 4));
  auto* copied = static_cast<float*>(std::aligned_alloc(4096, count * 4));
  auto* wire = static_cast<unsigned char*>(std::aligned_alloc(4096, count * 4));
  for (size_t i = 0; i < count; ++i) x[i] = static_cast<float>(std::rand() / (RAND_MAX + 1.0) - 0.5);
  std::fill(copied, copied + count, 0.f);
  std::fill(wire, wire + count * 4, static_cast<unsigned char>(0));

  const auto encode = [&](CodecKind kind) {
    const Codec codec{.kind = kind};
    const Format raw = Format::raw;
    void* dst = wire;
    const void* src = x;
    transcode({.codec = &codec,
               .dtype = DType::float32,
               .dsts = &dst,
               .srcs = &src,
               .src_formats = &raw,
               .num_dsts = 1,
               .num_srcs = 1,
               .dst_format = Format::wire,
               .count = count});
  };
  struct Width {
    int bits;
    std::function<void()> plain, scaled;
    std::vector<CodecKind> codecs;
  };
  const std::vector<Width> widths = {
      {16, [&] { bound<16, false>(x, wire, count); }, nullptr, {CodecKind::fp16, CodecKind::bf16}},
      {8,
       [&] { bound<8, false>(x, wire, count); },
       [&] { bound<8, true>(x, wire, count); },
       {CodecKind::fp8_e4m3, CodecKind::fp8_e5m2, CodecKind::mxfp8, CodecKind::int8}},
      {4,
       [&] { bound<4, false>(x, wire, count); },
       [&] { bound<4, true>(x, wire, count); },
       {CodecKind::int4}},
      {1,
       [&] { bound<1, false>(x, wire, count); },
       [&] { bound<1, true>(x, wire, count); },
       {CodecKind::sign}}};
  for (const Width& width : widths) {
    const size_t bytes = count * 4 + count * static_cast<size_t>(width.bits) / 8;
    std::vector<Turn> turns = {
        {"copy", bytes, [&] { copy_bytes(copied, x, bytes / 2, true); }},
        {"bound", bytes, width.plain},
    };
    if (width.scaled) turns.push_back({"bound_scaled", bytes, width.scaled});
    for (const CodecKind kind : width.codecs)
      turns.push_back({name(kind), bytes, [&, kind] { encode(kind); }});
    for (int repeat = 0; repeat < 15; ++repeat) {
      for (Turn& turn : turns) {
        const double start = now_us();
        turn.run();
        turn.least_us = std::min(turn.least_us, now_us() - start);
      }
    }
    std::printf("{\"bits\": %d, \"copy_gb_s\": %.1f", width.bits,
                static_cast<double>(bytes) / turns[0].least_us / 1e3);
    for (size_t t = 1; t < turns.size(); ++t) {
      std::printf(", \"%s\": %.2f", turns[t].name.c_str(), turns[0].least_us / turns[t].least_us);
    }
    std::printf("}\n");
  }
}
