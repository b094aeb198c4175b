#include "runtime/heap.h"

#include <algorithm>

#include "transport/memory.h"

namespace pycomm::runtime {

namespace {
using transport::kHugePage;
using transport::kSmallPage;
// Slices of huge size start on huge pages, so that they can use them.
int64_t slice_bytes(int64_t bytes) {
  return transport::round_up(std::max<int64_t>(bytes, 1), bytes >= kHugePage ? kHugePage : kSmallPage);
}
}  // namespace

int64_t Heap::extent_bytes(int64_t bytes, int ranks) { return ranks * slice_bytes(bytes) + kSmallPage; }

std::shared_ptr<Allocation> Heap::open(int64_t offset, int64_t bytes, int rank, int ranks) {
  auto allocation = std::make_shared<Allocation>();
  allocation->heap_ = shared_from_this();
  allocation->offset_ = offset;
  allocation->total_ = extent_bytes(bytes, ranks);
  allocation->mapping_ = node_->map(offset, allocation->total_);
  allocation->slice_ = slice_bytes(bytes);
  allocation->bytes_ = bytes;
  allocation->ranks_ = ranks;
  allocation->generation_ = transport::fork_generation();
  allocation->own_ = allocation->mapping_->data() + rank * allocation->slice_;
  allocation->dropped_ =
      reinterpret_cast<std::atomic<uint32_t>*>(allocation->mapping_->data() + ranks * allocation->slice_);
  const std::lock_guard lock(mutex_);
  allocations_[allocation->own_] = allocation.get();
  count_.store(allocations_.size(), std::memory_order_release);
  return allocation;
}

Allocation::~Allocation() {
  if (!heap_ || transport::forked_since(generation_)) return;
  {
    const std::lock_guard lock(heap_->mutex_);
    heap_->allocations_.erase(own_);
    heap_->count_.store(heap_->allocations_.size(), std::memory_order_release);
  }
  if (dropped_->fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(ranks_)) {
    heap_->node_->release(offset_, total_);
  }
}

Heap::Place Heap::find(const void* data, int64_t bytes, int ranks) const {
  if (empty()) return {};
  const char* at = static_cast<const char*>(data);
  const std::lock_guard lock(mutex_);
  auto next = allocations_.upper_bound(at);
  if (next == allocations_.begin()) return {};
  const Allocation& allocation = *std::prev(next)->second;
  if (allocation.ranks_ != ranks || at + bytes > allocation.own_ + allocation.bytes_) return {};
  return {allocation.slice_, allocation.offset_ + (at - allocation.own_)};
}

}  // namespace pycomm::runtime
