// Reading and writing memory in accesses of up to 16 bytes, and single elements at any address.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/arithmetic/ops.h"
#include "kernels/cuda/grid.h"

#if !defined(__CUDACC__)
#include "common/error.h"
#endif

namespace pycomm::kernels::PYCOMM_ISA {

inline constexpr int kAccess = 16;  // bytes of a full access, whose address must be a multiple of it

// The type that an access of 1, 2, 4, 8 or 16 bytes moves.
template <int kBytes>
struct Word;
template <>
struct Word<1> {
  uint8_t bits;
};
template <>
struct Word<2> {
  uint16_t bits;
};
template <>
struct Word<4> {
  uint32_t bits;
};
template <>
struct alignas(8) Word<8> {
  uint32_t bits[2];
};
template <>
struct alignas(16) Word<16> {
  uint32_t bits[4];
};

#if defined(__CUDACC__)
template <class W>
PYCOMM_DEVICE W read_word(const void* p) {
  return *static_cast<const W*>(p);
}
template <class W>
PYCOMM_DEVICE void write_word(void* p, W word) {
  *static_cast<W*>(p) = word;
}
#else
// The GPU faults if an address is not a multiple of the access's size; the emulation throws.
inline void require_aligned(const void* p, size_t size) {
  if (reinterpret_cast<uintptr_t>(p) % size != 0) throw ValueError("a misaligned access");
}
template <class W>
PYCOMM_DEVICE W read_word(const void* p) {
  require_aligned(p, sizeof(W));
  W word;
  std::memcpy(&word, p, sizeof word);
  return word;
}
template <class W>
PYCOMM_DEVICE void write_word(void* p, W word) {
  require_aligned(p, sizeof(W));
  std::memcpy(p, &word, sizeof word);
}
#endif

// kN elements of T in a row: registers, once loops over them are unrolled.
template <class T, int kN>
struct Run {
  T x[kN];
};

constexpr int access_bytes(size_t bytes) { return bytes < kAccess ? static_cast<int>(bytes) : kAccess; }

// Reads kN elements from `p` on in as few accesses as possible; p must be a multiple of an access.
template <class T, int kN>
PYCOMM_DEVICE Run<T, kN> read_run(const void* p) {
  using Result = Run<T, kN>;
  constexpr int kBytes = access_bytes(sizeof(T) * kN);
  constexpr int kWords = static_cast<int>(sizeof(T) * kN) / kBytes;
  static_assert(kWords * kBytes == static_cast<int>(sizeof(T) * kN));
  struct Words {
    Word<kBytes> word[kWords];
  } words;
  PYCOMM_UNROLL
  for (int w = 0; w < kWords; ++w) {
    words.word[w] = read_word<Word<kBytes>>(static_cast<const char*>(p) + w * kBytes);
  }
  return __builtin_bit_cast(Result, words);
}

template <class T, int kN>
PYCOMM_DEVICE void write_run(void* p, const Run<T, kN>& run) {
  constexpr int kBytes = access_bytes(sizeof(T) * kN);
  constexpr int kWords = static_cast<int>(sizeof(T) * kN) / kBytes;
  struct Words {
    Word<kBytes> word[kWords];
  };
  const Words words = __builtin_bit_cast(Words, run);
  PYCOMM_UNROLL
  for (int w = 0; w < kWords; ++w) {
    write_word<Word<kBytes>>(static_cast<char*>(p) + w * kBytes, words.word[w]);
  }
}

PYCOMM_DEVICE bool divides(size_t size, const void* p) { return reinterpret_cast<uintptr_t>(p) % size == 0; }

// Reads one element at any address.
template <class T>
PYCOMM_DEVICE T read_element(const void* p) {
  if (divides(access_bytes(sizeof(T)), p)) return read_run<T, 1>(p).x[0];
  struct Bytes {
    uint8_t byte[sizeof(T)];
  } bytes;
  PYCOMM_UNROLL
  for (size_t b = 0; b < sizeof(T); ++b) bytes.byte[b] = static_cast<const uint8_t*>(p)[b];
  return __builtin_bit_cast(T, bytes);
}

template <class T>
PYCOMM_DEVICE void write_element(void* p, T x) {
  if (divides(access_bytes(sizeof(T)), p)) return write_run<T, 1>(p, {{x}});
  struct Bytes {
    uint8_t byte[sizeof(T)];
  };
  const Bytes bytes = __builtin_bit_cast(Bytes, x);
  PYCOMM_UNROLL
  for (size_t b = 0; b < sizeof(T); ++b) static_cast<uint8_t*>(p)[b] = bytes.byte[b];
}

}  // namespace pycomm::kernels::PYCOMM_ISA
