// A small 64-bit hash for signatures and names. Not for secrets: it resists accidents, not an adversary.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <type_traits>

namespace pycomm {

// Mixes 64 bits so that every input bit reaches every output bit (the finalizer of MurmurHash3).
constexpr uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdULL;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ULL;
  return x ^ (x >> 33);
}

// Collects values in order; digest() may be read at any time.
class Hasher {
 public:
  constexpr explicit Hasher(uint64_t seed = 0) : state_(mix(seed + kStep)) {}

  template <class T>
    requires(std::integral<T> || std::is_enum_v<T>)
  constexpr Hasher& add(T value) {
    state_ = mix(std::rotl(state_, 25) ^ (static_cast<uint64_t>(value) * kStep + kStep));
    return *this;
  }
  constexpr Hasher& add(double value) { return add(std::bit_cast<uint64_t>(value)); }
  // The length goes in as well, so that ("ab", "c") and ("a", "bc") differ.
  Hasher& add_bytes(const void* data, size_t bytes) {
    const char* p = static_cast<const char*>(data);
    add(bytes);
    for (uint64_t word = 0; bytes > 0; word = 0) {
      const size_t n = bytes < sizeof word ? bytes : sizeof word;
      std::memcpy(&word, p, n);
      add(word);
      p += n;
      bytes -= n;
    }
    return *this;
  }
  Hasher& add(std::string_view text) { return add_bytes(text.data(), text.size()); }

  constexpr uint64_t digest() const { return mix(state_); }

 private:
  static constexpr uint64_t kStep = 0x9e3779b97f4a7c15ULL;  // odd, from the golden ratio
  uint64_t state_;
};

inline uint64_t hash_bytes(const void* data, size_t bytes, uint64_t seed = 0) {
  return Hasher(seed).add_bytes(data, bytes).digest();
}

}  // namespace pycomm
