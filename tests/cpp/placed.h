// Memory at a chosen distance from the start of a cache line, with guards before and after it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

struct Placed {
  static constexpr size_t kGuard = 80;
  std::vector<unsigned char> memory;
  unsigned char* data;
  size_t size;

  Placed(size_t bytes, size_t misplaced) : memory(bytes + 64 + misplaced + kGuard, 0xa5), size(bytes) {
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    data = memory.data() + (64 - address % 64) % 64 + misplaced;
  }
  bool guarded(size_t used) const {
    const auto untouched = [](unsigned char b) { return b == 0xa5; };
    return std::all_of(const_cast<const unsigned char*>(memory.data()),
                       const_cast<const unsigned char*>(data), untouched) &&
           std::all_of(data + used, data + used + kGuard, untouched);
  }
};
