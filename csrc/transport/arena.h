// An arena: shared memory from which one process allocates blocks without a call to others, and which peers
// can map as a whole.
//
// It is an anonymous sparse file, made once and kept for the life of the process, since arrays in it outlive
// every group. Node::join() passes its descriptor to the other ranks; from then on an offset names a block
// (Node::arena_of). The process maps the whole file when it allocates the first block, at an address that
// never changes. The mapping is as large as the machine's memory, but pages that no block has used take none.
// A block is backed before it is handed out, after a look at what the machine and the control group have
// left; if that fails the caller gets null, and takes plain memory. Pages that no block has used are zero and
// are not cleared again. Freed blocks stay backed for reuse, up to kKept bytes in all; the pages of the rest
// go back.
//
// After an error, a late peer may still read or write an address that it was told: see quarantine().
//
// In a child of fork() the parent's blocks are private copies at the same addresses (Mapping says what they
// hold). They are never freed there, and the child has no arena until it makes its own.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "transport/fd.h"
#include "transport/node.h"

namespace pycomm::transport {

// Free ranges; those that touch are one.
class FreeRanges {
 public:
  void add(int64_t offset, int64_t bytes);
  // Takes `bytes`, at a multiple of `unit`, out of the smallest range that has room for them.
  std::optional<int64_t> take(int64_t bytes, int64_t unit);
  std::optional<std::pair<int64_t, int64_t>> take_largest();  // offset and bytes
  int64_t bytes() const { return bytes_; }

 private:
  void erase(std::map<int64_t, int64_t>::iterator range);
  std::map<int64_t, int64_t> by_offset_;
  std::set<std::pair<int64_t, int64_t>> by_bytes_;  // bytes, offset
  int64_t bytes_ = 0;
};

class Arena {
 public:
  static constexpr int64_t kKept = int64_t{512} << 20;

  // This process's arena, made if it has none: a child of fork() begins with none. Never destroyed. Throws
  // CommError where the system gives no file.
  static Arena& of_process();
  // The same, or null.
  static Arena* if_any();
  // The arena that the address lies in, this process's or one of its parents', or null. Reads no lock.
  static Arena* at(const void* address);

  // A block of at least `bytes` > 0, on a page; `zeroed`: all of it is zero. Null where there is no memory to
  // back it, said once in the log.
  void* allocate(int64_t bytes, bool zeroed);
  // From any thread. A parent's block stays.
  void free(void* block);
  int64_t bytes_of(const void* block) const;
  bool inherited() const { return forked_since(generation_); }

  // The offset of [data, data + bytes); -1 if that does not lie in blocks of this process's own arena.
  int64_t offset_of(const void* data, int64_t bytes) const;
  // Whether a block was ever handed out. One load.
  bool used() const { return top_.load(std::memory_order_relaxed) != 0; }
  char* base() const { return base_.load(std::memory_order_acquire); }
  int file() const { return file_.get(); }

  // Blocks that are allocated now are not handed out again before over() returns true. It is called whenever
  // blocks are allocated or freed, and must not allocate or free any itself.
  void quarantine(std::function<bool()> over);

 private:
  struct Block {
    int64_t bytes;
    uint64_t born;  // after how many quarantines had begun
  };
  struct Quarantine {
    uint64_t number;
    std::function<bool()> over;
  };
  struct Range {
    int64_t offset, bytes;
  };

  explicit Arena(Arena* older);
  static void lock_at_fork();
  bool map();
  bool may_back(int64_t bytes);
  bool back(int64_t offset, int64_t bytes);
  void release_held();
  bool held(const Block& block) const;

  Arena* const older_;  // the parent's
  const uint64_t generation_ = fork_generation();
  Fd file_;
  int64_t room_ = 0;  // of the addresses
  std::shared_ptr<Mapping> mapping_;
  std::atomic<char*> base_{nullptr};
  std::atomic<int64_t> top_{0};  // nothing beyond was ever used
  bool by_faults_ = false, unmappable_ = false, told_of_none_ = false;

  mutable std::mutex mutex_;
  std::unordered_map<int64_t, Block> blocks_;  // by offset
  FreeRanges warm_, cold_;                     // backed, and used before; not backed, and zero
  int64_t credit_ = 0;                         // may be backed without another look
  int64_t looked_ms_ = 0;
  std::vector<Quarantine> quarantines_;
  uint64_t quarantined_ = 0;  // how many have begun
  std::vector<std::pair<int64_t, Block>> held_;
};

}  // namespace pycomm::transport
