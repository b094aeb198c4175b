// Elements in memory as a protocol, DLPack or `__cuda_array_interface__`, describes them. They are accepted
// only if an array can have every field of the description: a guess might read other memory.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "common/dtype.h"

namespace pycomm::bindings {

struct Elements {
  void* data;
  DType dtype;
  std::span<const int64_t> shape;
  const int64_t* strides;   // null: in C order
  int64_t stride_unit = 1;  // 1 if strides count elements; if they count bytes, the bytes of an element
  int64_t count = 0;
  bool contiguous = true;  // in C order
};

// Fills in `count` and `contiguous`, and adds `offset` bytes to `data` if there are elements. Throws
// TypeError for elements without memory, ValueError for a description that no array has. `name` is the
// argument's name.
Elements checked(Elements elements, uint64_t offset, const char* name);

// Throws that ValueError; `what` is the part of the description that no array has.
[[noreturn]] void malformed(const char* name, const std::string& what);

}  // namespace pycomm::bindings
