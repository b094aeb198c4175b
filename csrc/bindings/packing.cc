#include "bindings/packing.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "kernels/copy.h"
#include "kernels/pack.h"

namespace pycomm::bindings {

Packing::Packing(std::vector<Array> ins, std::vector<Array> outs, int64_t align, std::shared_ptr<void> keep)
    : ins_(std::move(ins)), outs_(std::move(outs)), keep_(std::move(keep)) {
  constexpr int64_t kLine = 64;
  int64_t total = 0;
  for (const Array& in : ins_) {
    offsets_.push_back(total);
    total += (in.count + align - 1) / align * align;
  }
  packed_.dtype = ins_[0].dtype;
  packed_.count = total;
  const auto bytes = static_cast<size_t>((packed_.bytes() + kLine) / kLine * kLine);
  storage_ = std::shared_ptr<void>(std::aligned_alloc(kLine, bytes), std::free);
  if (!storage_) throw std::bad_alloc();
  packed_.data = storage_.get();
  if (align > 1) std::memset(storage_.get(), 0, bytes);
}

char* Packing::at(size_t i) const {
  return static_cast<char*>(storage_.get()) + offsets_[i] * static_cast<int64_t>(size_of(packed_.dtype));
}

void Packing::pack() const {
  for (size_t i = 0; i < ins_.size(); ++i) {
    kernels::copy_bytes(at(i), ins_[i].data, static_cast<size_t>(ins_[i].bytes()));
  }
}

void Packing::unpack() const {
  for (size_t i = 0; i < outs_.size(); ++i) {
    kernels::copy_bytes(outs_[i].data, at(i), static_cast<size_t>(outs_[i].bytes()));
  }
}

bool Packing::unpack_finite() const {
  std::vector<kernels::PackItem> items;
  for (size_t i = 0; i < outs_.size(); ++i) {
    items.push_back({outs_[i].data, outs_[i].dtype, outs_[i].count, offsets_[i]});
  }
  kernels::Stats stats;
  kernels::unpack({items, storage_.get(), packed_.dtype}, &stats);
  return stats.nans == 0 && stats.infs == 0;
}

}  // namespace pycomm::bindings
