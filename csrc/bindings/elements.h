// Elements in memory as a protocol describes them, DLPack or `__cuda_array_interface__`: taken only where
// every field is what an array can have, since to guess at one is to read another's memory.
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
  int64_t stride_unit = 1;  // what strides count: elements (1), or bytes, of which an element has so many
  int64_t count = 0;
  bool contiguous = true;  // in C order
};

// With `count` and `contiguous`; the elements begin `offset` bytes after `data`. Throws TypeError for
// elements without memory, ValueError for what no array looks like. `name` is the argument's.
Elements checked(Elements elements, uint64_t offset, const char* name);

// Throws the ValueError of `checked` for `what`, which no array has.
[[noreturn]] void malformed(const char* name, const std::string& what);

}  // namespace pycomm::bindings
