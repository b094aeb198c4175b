// An arena: shared memory from which one process serves itself, one block at a time and with no call to
// others, and which peers can map as a whole.
//
// It is an anonymous sparse file, made once and kept for the life of the process, since arrays that lie in
// it outlive every group. Node::join() gives its descriptor to the other ranks, so that later a block is
// named by its offset alone (Node::arena_of). The process itself maps all of it at the first block, at one
// address for good: as many addresses as the machine has memory, which take none. A block is backed before
// it is handed out, after a look at what the machine and the control group have left; where that fails,
// there is none, and the caller takes its memory elsewhere. Pages that nobody has used are zero, and are not
// cleared again. Freed blocks are kept backed for the next ones up to kKept bytes in all; beyond, their
// pages go back.
//
// After an error, a peer that is late may still read or write what it was told: quarantine().
//
// In a child of fork() the parent's blocks stay where they were, as private copies (Mapping says how far):
// they are never freed, and the child has no arena until it makes one.
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

  // Where [data, data + bytes) begins; -1 if it does not lie in blocks of this process's own arena.
  int64_t offset_of(const void* data, int64_t bytes) const;
  // Whether a block was ever handed out: until then nothing lies here. One load.
  bool used() const { return top_.load(std::memory_order_relaxed) != 0; }
  char* base() const { return base_.load(std::memory_order_acquire); }
  int file() const { return file_.get(); }

  // The blocks of this moment are not handed out again before `over` says true: it is asked, again and again,
  // when blocks are taken and freed, and must not take or free any itself.
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
