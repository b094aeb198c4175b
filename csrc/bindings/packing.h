// Places for arrays, side by side in one piece of memory. They are made once, and arrays come with each
// call. A Bucket packs into its own buffer, a list of buffers into memory that the Packing owns.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "bindings/array.h"
#include "kernels/pack.h"

namespace pycomm::bindings {

class Packing {
 public:
  struct Place {  // in elements
    int64_t offset, count;
  };
  // In memory of its own, with each place at a multiple of `align` elements and zeros in the gaps.
  Packing(DType dtype, std::span<const Array> arrays, int64_t align);
  // In the memory of `whole`, which `keep` keeps alive. Throws ValueError for a place beyond its end.
  Packing(Array whole, std::vector<Place> places, std::shared_ptr<void> keep);

  const Array& whole() const { return whole_; }
  std::span<const Place> places() const { return places_; }

  // Bit for bit, for arrays of the same type; without arrays nothing is copied.
  void copy_in(std::span<const Array> from) const;
  void copy_out(std::span<const Array> to) const;
  // As kernels/pack.h says, for float types.
  void pack(std::span<const Array> from, double scale, kernels::Stats* stats, const kernels::Isa& isa) const;
  void unpack(std::span<const Array> to, double scale, kernels::Stats* stats, const kernels::Isa& isa) const;

 private:
  char* at(size_t i) const;
  std::vector<kernels::PackItem> items(std::span<const Array> arrays) const;

  Array whole_;
  std::vector<Place> places_;
  std::shared_ptr<void> keep_;
};

}  // namespace pycomm::bindings
