#include "runtime/heap.h"

#include <algorithm>
#include <utility>

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

// The slices, then a page that says which ranks have let go.
std::shared_ptr<Allocation> Heap::open(int64_t offset, int64_t bytes, std::vector<int> ranks, int me) {
  const auto n = static_cast<int>(ranks.size());
  const int64_t total = extent_bytes(bytes, n);
  auto mapping = node_->map(offset, total, true);
  char* const data = mapping->data();
  auto allocation = std::make_shared<Allocation>();
  allocation->slice_ = slice_bytes(bytes);
  allocation->bytes_ = bytes;
  allocation->generation_ = transport::fork_generation();
  allocation->own_ = data + me * allocation->slice_;
  allocation->extent_ = {.mapping = std::move(mapping),
                         .offset = offset,
                         .bytes = total,
                         .let_go = reinterpret_cast<std::atomic<uint64_t>*>(data + n * allocation->slice_),
                         .ranks = std::move(ranks),
                         .me = me};
  allocation->heap_ = shared_from_this();
  const std::lock_guard lock(mutex_);
  allocation->begin_ = std::exchange(allocated_, allocated_ + allocation->slice_);
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
  heap_->node_->let_go(std::move(extent_));
}

Heap::Place Heap::find(const void* data, int64_t bytes) const {
  if (empty()) return {};
  const char* at = static_cast<const char*>(data);
  const std::lock_guard lock(mutex_);
  auto next = allocations_.upper_bound(at);
  if (next == allocations_.begin()) return {};
  const Allocation& allocation = *std::prev(next)->second;
  if (at + bytes > allocation.own_ + allocation.bytes_) return {};
  return {allocation.slice_, allocation.begin_ + (at - allocation.own_)};
}

}  // namespace pycomm::runtime
