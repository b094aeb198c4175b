// Philox 4x32-10: random bits as a pure function of a key and a counter, so that they do not depend on the
// schedule, the launch or the number of threads.
//
// Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.
#pragma once

#include <cstdint>

#include "kernels/arithmetic/ops.h"

namespace pycomm::kernels::PYCOMM_ISA {

struct Philox {
  uint32_t word[4];
};

PYCOMM_INLINE Philox philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter_low), c1 = static_cast<uint32_t>(counter_low >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter_high), c3 = static_cast<uint32_t>(counter_high >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    const uint32_t next0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    const uint32_t next2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    c0 = next0;
    c2 = next2;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// The high half of the counter, which distinguishes the encodes of all steps.
PYCOMM_INLINE uint64_t philox_stream(uint32_t step, uint32_t turn, uint32_t rank) {
  return uint64_t{step} << 32 | uint64_t{turn & 0xff} << 24 | (rank & 0xffffff);
}

// An element's 64-bit index: its tensor, and its offset in the tensor. Elements share counters. With 8 bits
// each, 16 elements share the counter whose low half is index / 16, and take its bytes in order (word 0
// first, each from the low byte up). With 16 bits each, 8 elements share index / 8, and take its halves in
// order.
PYCOMM_INLINE uint64_t philox_index(uint64_t tensor, uint64_t offset) { return tensor << 40 | offset; }

}  // namespace pycomm::kernels::PYCOMM_ISA
