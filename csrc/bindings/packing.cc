#include "bindings/packing.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "common/error.h"
#include "kernels/copy.h"

namespace pycomm::bindings {

Packing::Packing(DType dtype, std::span<const Array> arrays, int64_t align) {
  constexpr int64_t kLine = 64;
  whole_.dtype = dtype;
  for (const Array& array : arrays) {
    places_.push_back({whole_.count, array.count});
    whole_.count += (array.count + align - 1) / align * align;
  }
  const auto bytes = static_cast<size_t>((whole_.bytes() + kLine) / kLine * kLine);
  keep_ = std::shared_ptr<void>(std::aligned_alloc(kLine, bytes), std::free);
  if (!keep_) throw std::bad_alloc();
  whole_.data = keep_.get();
  if (align > 1) std::memset(whole_.data, 0, bytes);
}

Packing::Packing(Array whole, std::vector<Place> places, std::shared_ptr<void> keep)
    : whole_(std::move(whole)), places_(std::move(places)), keep_(std::move(keep)) {
  whole_.shape = {};  // it was the object's own, which may change
  for (size_t i = 0; i < places_.size(); ++i) {
    const auto [offset, count] = places_[i];
    if (offset < 0 || count < 0 || count > whole_.count - offset) {
      throw ValueError("`tensors[" + std::to_string(i) + "]` does not fit a bucket of " +
                       std::to_string(whole_.count) + " elements at " + std::to_string(offset));
    }
  }
}

char* Packing::at(size_t i) const {
  return static_cast<char*>(whole_.data) + places_[i].offset * static_cast<int64_t>(size_of(whole_.dtype));
}

void Packing::copy_in(std::span<const Array> from) const {
  for (size_t i = 0; i < from.size(); ++i) {
    kernels::copy_bytes(at(i), from[i].data, static_cast<size_t>(from[i].bytes()));
  }
}

void Packing::copy_out(std::span<const Array> to) const {
  for (size_t i = 0; i < to.size(); ++i) {
    kernels::copy_bytes(to[i].data, at(i), static_cast<size_t>(to[i].bytes()));
  }
}

std::vector<kernels::PackItem> Packing::items(std::span<const Array> arrays) const {
  std::vector<kernels::PackItem> items;
  items.reserve(arrays.size());
  for (size_t i = 0; i < arrays.size(); ++i) {
    items.push_back({arrays[i].data, arrays[i].dtype, arrays[i].count, places_[i].offset});
  }
  return items;
}

void Packing::pack(std::span<const Array> from, double scale, kernels::Stats* stats,
                   const kernels::Isa& isa) const {
  kernels::pack({items(from), whole_.data, whole_.dtype, scale}, stats, isa);
}

void Packing::unpack(std::span<const Array> to, double scale, kernels::Stats* stats,
                     const kernels::Isa& isa) const {
  kernels::unpack({items(to), whole_.data, whole_.dtype, scale}, stats, isa);
}

}  // namespace pycomm::bindings
