// Buffers of one element type, copied side by side into memory of their own and back.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "bindings/array.h"

namespace pycomm::bindings {

class Packing {
 public:
  // `outs`: where unpack() puts the elements; empty: nowhere. Each buffer begins at a multiple of `align`
  // elements; what lies between is zero. `keep` lives as long as this.
  Packing(std::vector<Array> ins, std::vector<Array> outs, int64_t align, std::shared_ptr<void> keep);

  Array buffer() const { return packed_; }
  std::span<const int64_t> offsets() const { return offsets_; }  // of each, in elements
  void pack() const;
  void unpack() const;
  // The same, of what codecs carry; false if there is a NaN or an Inf.
  bool unpack_finite() const;

 private:
  char* at(size_t i) const;

  std::vector<Array> ins_, outs_;
  std::vector<int64_t> offsets_;
  Array packed_;
  std::shared_ptr<void> storage_, keep_;
};

}  // namespace pycomm::bindings
