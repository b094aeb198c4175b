// Philox (philox.h) for consecutive counters, in vectors. A 64-bit lane holds one word of a counter, so that
// a product of 32 by 32 bits stays in its lane. The upper halves of lanes are garbage between rounds.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels/arithmetic/ops.h"
#include "kernels/arithmetic/philox.h"
#include "kernels/cpu/vectors.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pycomm::kernels::PYCOMM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
using Lanes = uint64_t __attribute__((vector_size(kVectorBytes)));
constexpr int kLanes = kVectorBytes / 8;

PYCOMM_INLINE Lanes all(uint64_t x) { return Lanes{} + x; }

// Multiplies the lower halves. The compiler does not find this half multiplication by itself.
PYCOMM_INLINE Lanes multiply(Lanes a, Lanes b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Lanes>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Lanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// Which lane each counter takes: the one from which interleaving the even lanes of two vectors, then the odd
// ones, brings it into order.
PYCOMM_INLINE Lanes in_order() {
  Lanes order{};
  for (int lane = 0; lane < kLanes; ++lane) {
    order[lane] = static_cast<uint64_t>(lane % 2 * (kLanes / 2) + lane / 2);
  }
  return order;
}

// The lanes of a and b of one parity, alternating.
template <int kParity, int... kLane>
PYCOMM_INLINE Lanes interleave(Lanes a, Lanes b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kLane % 2 * kLanes + kLane / 2 * 2 + kParity)...);
}

constexpr uint64_t kPhiloxA = 0xD2511F53, kPhiloxB = 0xCD9E8D57;
constexpr uint64_t kLowHalf = 0xffffffff;
constexpr int kPhiloxRounds = 10;

PYCOMM_INLINE Lanes rotated(Lanes x) { return x << 32 | x >> 32; }

// Writes 16 bytes for each of kCounters counters from `first` on, a multiple of 16. The upper halves of 16
// such counters are equal, so the half of each of the first two rounds that depends only on them is computed
// once. The vectors are computed side by side, since each alone would wait for its own products.
template <int kCounters>
PYCOMM_INLINE void philox_group(uint8_t* bytes, uint64_t key, uint64_t first, uint64_t counter_high) {
  constexpr int kVectors = kCounters / kLanes;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  const auto next_key = [&] {
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  };
  const uint64_t y = kPhiloxB * (counter_high & kLowHalf);
  Lanes c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const uint64_t at = first + static_cast<uint64_t>(v * kLanes);
    const uint64_t x = kPhiloxA * ((y >> 32) ^ (at >> 32) ^ k0);  // product of the second round
    c3[v] = multiply(all(kPhiloxA), all(at) + in_order());
    c2[v] = (c3[v] >> 32) ^ all((counter_high >> 32) ^ k1);
    c1[v] = multiply(all(kPhiloxB), c2[v]);
    c0[v] = (c1[v] >> 32) ^ all(y ^ (k0 + 0x9E3779B9));
    c2[v] = c3[v] ^ all((x >> 32) ^ (k1 + 0xBB67AE85));
    c3[v] = all(x);
  }
  next_key();
  for (int round = 2; round < kPhiloxRounds - 1; ++round) {
    next_key();
    for (int v = 0; v < kVectors; ++v) {
      const Lanes x = multiply(all(kPhiloxA), c0[v]), z = multiply(all(kPhiloxB), c2[v]);
      c0[v] = (z >> 32) ^ c1[v] ^ all(k0);
      c2[v] = (x >> 32) ^ c3[v] ^ all(k1);
      c1[v] = z;
      c3[v] = x;
    }
  }
  next_key();
  for (int v = 0; v < kVectors; ++v) {
    const Lanes x = multiply(all(kPhiloxA), c0[v]), z = multiply(all(kPhiloxB), c2[v]);
    const Lanes low = rotated(z) ^ (c1[v] & kLowHalf) ^ all(k0),
                high = rotated(x) ^ (c3[v] & kLowHalf) ^ all(k1);
    const Lanes even = interleave<0>(low, high, std::make_integer_sequence<int, kLanes>());
    const Lanes odd = interleave<1>(low, high, std::make_integer_sequence<int, kLanes>());
    uint8_t* to = bytes + 16 * v * kLanes;
    std::memcpy(to, &even, sizeof even);
    std::memcpy(to + sizeof even, &odd, sizeof odd);
  }
}

// Writes 16 bytes for each of 16 * n counters from `first` on, a multiple of 16. Meanwhile it prefetches half
// of the lines that follow the `size` bytes at x.
PYCOMM_INLINE void philox_run(uint8_t* bytes, int n, uint64_t key, uint64_t first, uint64_t counter_high,
                              const void* x, size_t size) {
  const size_t each = size / (16 * static_cast<size_t>(n));
  const auto fetch = [&](int counter, size_t counters) PYCOMM_LAMBDA {
    prefetch<2>(static_cast<const char*>(x) + each * static_cast<size_t>(counter), each * counters);
  };
  constexpr int kGroup = kLanes == 8 ? 64 : 16;
  int done = 0;
  for (; done + kGroup <= 16 * n; done += kGroup) {
    fetch(done, kGroup);
    philox_group<kGroup>(bytes + 16 * done, key, first + static_cast<uint64_t>(done), counter_high);
  }
  for (; done < 16 * n; done += 16) {
    fetch(done, 16);
    philox_group<16>(bytes + 16 * done, key, first + static_cast<uint64_t>(done), counter_high);
  }
}

}  // namespace pycomm::kernels::PYCOMM_ISA
