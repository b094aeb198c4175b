// Symmetric memory: allocations that all ranks of a group make together, those of a node's ranks at equal
// distances, and the search for them by address.
//
// Freed lazily: each rank drops its own handle at any time; the pages go back when all ranks have dropped
// theirs.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "transport/node.h"

namespace pycomm::runtime {

class Heap;

class Allocation {
 public:
  ~Allocation();
  char* data() const { return own_; }  // this rank's slice
  int64_t bytes() const { return bytes_; }

 private:
  friend class Heap;
  std::shared_ptr<Heap> heap_;
  transport::Node::Extent extent_;
  int64_t slice_ = 0, bytes_ = 0, begin_ = 0;
  uint64_t generation_ = 0;
  char* own_ = nullptr;
};

class Heap : public std::enable_shared_from_this<Heap> {
 public:
  explicit Heap(std::shared_ptr<transport::Node> node) : node_(std::move(node)) {}

  // Bytes of an extent that holds one slice for each of so many ranks of a node. One of them reserves it and
  // tells the others.
  static int64_t extent_bytes(int64_t bytes, int ranks);
  // By rank `me` of those that share it, which are `ranks` of the node. All ranks of a group open theirs in
  // the same order.
  std::shared_ptr<Allocation> open(int64_t offset, int64_t bytes, std::vector<int> ranks, int me);

  // Where a buffer lies: `distance` bytes from one rank's to the next one's on the node; 0 if it is not
  // wholly in one allocation. `offset`, the same on every rank of the group, counts the bytes of all
  // allocations ever made before it.
  struct Place {
    int64_t distance = 0, offset = -1;
  };
  bool empty() const { return count_.load(std::memory_order_acquire) == 0; }
  Place find(const void* data, int64_t bytes) const;

 private:
  friend class Allocation;
  std::shared_ptr<transport::Node> node_;
  mutable std::mutex mutex_;
  std::map<const char*, const Allocation*> allocations_;  // by own slice
  std::atomic<size_t> count_{0};
  int64_t allocated_ = 0;  // of one rank, in all
};

}  // namespace pycomm::runtime
