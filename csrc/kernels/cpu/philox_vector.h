// Philox for consecutive counters, as philox.h defines it, in vectors: a lane of 64 bits holds one word of a
// counter, so that a product of 32 bits by 32 stays in its lane. Lanes' upper halves are garbage between
// rounds.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels/arithmetic/ops.h"
#include "kernels/arithmetic/philox.h"

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

// Of the lower halves. The compiler does not see by itself that half a multiplication will do.
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

// Counter `i` of the vector stands in a lane where the interleaving of two vectors' even lanes, then of their
// odd ones, brings it to its place.
PYCOMM_INLINE Lanes first_counters(uint64_t first) {
  Lanes order{};
  for (int lane = 0; lane < kLanes; ++lane) {
    order[lane] = static_cast<uint64_t>(lane % 2 * (kLanes / 2) + lane / 2);
  }
  return order + first;
}

// a's and b's lanes of one parity, alternating.
template <int kParity, int... kLane>
PYCOMM_INLINE Lanes interleave(Lanes a, Lanes b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kLane % 2 * kLanes + kLane / 2 * 2 + kParity)...);
}

// 16 bytes for each of 16 * n counters from `first` on.
PYCOMM_INLINE void philox_run(uint8_t* bytes, int n, uint64_t key, uint64_t first, uint64_t counter_high) {
  constexpr int kVectors =
      kLanes == 2 ? 4 : 16 / kLanes;  // side by side: one alone would wait for its own products
  constexpr int kStep = kVectors * kLanes;
  const Lanes a = all(0xD2511F53), b = all(0xCD9E8D57);
  for (int done = 0; done < 16 * n; done += kStep) {
    Lanes c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      c0[v] = first_counters(first + static_cast<uint64_t>(done + v * kLanes));
      c1[v] = c0[v] >> 32;
      c2[v] = all(counter_high & 0xffffffff);
      c3[v] = all(counter_high >> 32);
    }
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int v = 0; v < kVectors; ++v) {
        const Lanes x = multiply(a, c0[v]), y = multiply(b, c2[v]);
        c0[v] = (y >> 32) ^ c1[v] ^ all(k0);
        c2[v] = (x >> 32) ^ c3[v] ^ all(k1);
        c1[v] = y;
        c3[v] = x;
      }
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    for (int v = 0; v < kVectors; ++v) {
      const Lanes low = (c0[v] & 0xffffffff) | c1[v] << 32, high = (c2[v] & 0xffffffff) | c3[v] << 32;
      const Lanes even = interleave<0>(low, high, std::make_integer_sequence<int, kLanes>());
      const Lanes odd = interleave<1>(low, high, std::make_integer_sequence<int, kLanes>());
      uint8_t* to = bytes + 16 * (done + v * kLanes);
      std::memcpy(to, &even, sizeof even);
      std::memcpy(to + sizeof even, &odd, sizeof odd);
    }
  }
}

}  // namespace pycomm::kernels::PYCOMM_ISA
