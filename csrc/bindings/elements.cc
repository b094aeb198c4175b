#include "bindings/elements.h"

#include <string>

#include "common/error.h"

namespace pycomm::bindings {

namespace {

constexpr size_t kMaxDims = 64;  // the limit of NumPy and of torch

int64_t count_of(const Elements& elements, const char* name) {
  // The product leaves out extents of 0: other code multiplies the rest even if there are no elements.
  int64_t count = 1, bytes = 0;
  bool empty = false, too_many = false;
  for (const int64_t extent : elements.shape) {
    if (extent < 0) malformed(name, "an extent of " + std::to_string(extent) + " (extents are 0 or more)");
    empty |= extent == 0;
    too_many |= __builtin_mul_overflow(count, extent == 0 ? 1 : extent, &count);
  }
  too_many |= __builtin_mul_overflow(count, static_cast<int64_t>(size_of(elements.dtype)), &bytes);
  if (too_many) malformed(name, "2^63 bytes or more");
  return empty ? 0 : count;
}

bool is_contiguous(const Elements& elements) {
  int64_t expected = elements.stride_unit;
  for (size_t d = elements.shape.size(); d-- > 0;) {
    if (elements.shape[d] != 1 && elements.strides[d] != expected) return false;
    expected *= elements.shape[d];
  }
  return true;
}

}  // namespace

void malformed(const char* name, const std::string& what) {
  throw ValueError(std::string("`") + name + "` is described with " + what +
                   ": no array has that, pass a copy made by NumPy, CuPy or torch");
}

Elements checked(Elements elements, uint64_t offset, const char* name) {
  if (elements.shape.size() > kMaxDims) {
    malformed(name, std::to_string(elements.shape.size()) + " dimensions");
  }
  elements.count = count_of(elements, name);
  if (elements.count == 0) return elements;
  if (!elements.data) {
    throw TypeError(std::string("`") + name +
                    "` has no memory behind its elements (it may be a meta, fake or wrapper tensor, or its "
                    "storage was freed): pass a plain array or tensor");
  }
  uintptr_t address = reinterpret_cast<uintptr_t>(elements.data), end = 0;
  const auto bytes = static_cast<uint64_t>(elements.count) * size_of(elements.dtype);
  if (__builtin_add_overflow(address, offset, &address) || __builtin_add_overflow(address, bytes, &end)) {
    malformed(name, "an end beyond the last address");
  }
  elements.data = reinterpret_cast<void*>(address);
  elements.contiguous = !elements.strides || is_contiguous(elements);
  return elements;
}

}  // namespace pycomm::bindings
