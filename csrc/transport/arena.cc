#include "transport/arena.h"

#include <pthread.h>
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "common/error.h"
#include "common/log.h"
#include "transport/memory.h"

namespace pycomm::transport {

namespace {

std::atomic<Arena*> newest{nullptr};

constexpr int64_t kMostAddresses = int64_t{1} << 40;  // of which a process maps every peer's
constexpr int64_t kLeastAddresses = int64_t{64} << 20;
// A look at what the system has left reads a dozen files: it is good for so much, and for so long.
constexpr int64_t kMostCredit = int64_t{256} << 20;
constexpr int64_t kLookIsGoodMs = 1000;

int64_t now_ms() {
  using namespace std::chrono;
  return duration_cast<milliseconds>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace

// ---- free ranges ----

void FreeRanges::erase(std::map<int64_t, int64_t>::iterator range) {
  bytes_ -= range->second;
  by_bytes_.erase({range->second, range->first});
  by_offset_.erase(range);
}

void FreeRanges::add(int64_t offset, int64_t bytes) {
  if (bytes == 0) return;
  auto next = by_offset_.lower_bound(offset);
  if (next != by_offset_.end() && next->first == offset + bytes) {
    bytes += next->second;
    erase(next++);
  }
  if (next != by_offset_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == offset) {
      offset = before->first;
      bytes += before->second;
      erase(before);
    }
  }
  by_offset_[offset] = bytes;
  by_bytes_.insert({bytes, offset});
  bytes_ += bytes;
}

std::optional<int64_t> FreeRanges::take(int64_t bytes, int64_t unit) {
  auto found = by_bytes_.lower_bound({bytes, 0});
  if (found == by_bytes_.end()) return std::nullopt;
  if (round_up(found->second, unit) + bytes > found->second + found->first) {
    found = by_bytes_.lower_bound({bytes + unit, 0});  // has room wherever it begins
    if (found == by_bytes_.end()) return std::nullopt;
  }
  const auto [there, offset] = *found;
  const int64_t at = round_up(offset, unit), end = offset + there;
  erase(by_offset_.find(offset));
  add(offset, at - offset);
  add(at + bytes, end - (at + bytes));
  return at;
}

std::optional<std::pair<int64_t, int64_t>> FreeRanges::take_largest() {
  if (by_bytes_.empty()) return std::nullopt;
  const auto [bytes, offset] = *by_bytes_.rbegin();
  erase(by_offset_.find(offset));
  return std::pair(offset, bytes);
}

// ---- which arena ----

Arena::Arena(Arena* older) : older_(older), file_(create_memory()) {
  struct stat file{};
  fstat(file_.get(), &file);
  const int64_t memory = sysconf(_SC_PHYS_PAGES) * page_size();
  room_ = std::min({round_up(memory, kHugePage), kMostAddresses, static_cast<int64_t>(file.st_size)});
  if (ftruncate(file_.get(), room_)) throw CommError("pycomm cannot size its shared memory: " + reason());
}

// A child finds no mutex taken, and so can ask how large a block of its parent's is.
void Arena::lock_at_fork() {
  static constexpr auto all = [](void (std::mutex::*action)()) {
    for (Arena* arena = newest.load(); arena; arena = arena->older_) (arena->mutex_.*action)();
  };
  static const int registered = pthread_atfork(
      [] { all(&std::mutex::lock); }, [] { all(&std::mutex::unlock); }, [] { all(&std::mutex::unlock); });
  (void)registered;
}

Arena& Arena::of_process() {
  lock_at_fork();
  for (;;) {
    if (Arena* const mine = if_any()) return *mine;
    Arena* older = newest.load(std::memory_order_acquire);
    std::unique_ptr<Arena> made(new Arena(older));
    if (newest.compare_exchange_strong(older, made.get(), std::memory_order_acq_rel)) return *made.release();
  }
}

Arena* Arena::if_any() {
  Arena* const arena = newest.load(std::memory_order_acquire);
  return arena && !arena->inherited() ? arena : nullptr;
}

Arena* Arena::at(const void* address) {
  const char* const there = static_cast<const char*>(address);
  for (Arena* arena = newest.load(std::memory_order_acquire); arena; arena = arena->older_) {
    const char* const base = arena->base();
    if (base && there >= base && there < base + arena->top_.load(std::memory_order_acquire)) return arena;
  }
  return nullptr;
}

int64_t Arena::offset_of(const void* data, int64_t bytes) const {
  const char *const base = this->base(), *const there = static_cast<const char*>(data);
  if (!base || inherited() || there < base || there - base + bytes > top_.load(std::memory_order_acquire)) {
    return -1;
  }
  return there - base;
}

// ---- blocks ----

// Under the mutex.
bool Arena::map() {
  if (mapping_) return true;
  if (unmappable_) return false;
  for (int64_t bytes = room_; bytes >= kLeastAddresses; bytes /= 2) {
    try {
      room_ = bytes / kHugePage * kHugePage;
      mapping_ = std::make_shared<Mapping>(map_extent(file_.get(), 0, room_, false), room_);
      by_faults_ = huge_by_advice();
      cold_.add(0, room_);
      base_.store(mapping_->data(), std::memory_order_release);
      return true;
    } catch (const OutOfMemoryError&) {  // the address space is limited: with less of it, perhaps
    }
  }
  unmappable_ = true;
  return false;
}

// Under the mutex.
bool Arena::may_back(int64_t bytes) {
  const int64_t now = now_ms();
  if (bytes > credit_ || now - looked_ms_ > kLookIsGoodMs) {
    const int64_t spare = spare_memory();
    if (bytes > spare) return false;
    credit_ = std::min(spare / 16, kMostCredit);
    looked_ms_ = now;
  }
  credit_ -= std::min(bytes, credit_);
  return true;
}

// Without it: the range is nobody else's meanwhile.
bool Arena::back(int64_t offset, int64_t bytes) {
  if (back_extent(file_.get(), by_faults_ ? base() + offset : nullptr, offset, bytes)) return true;
  punch(file_.get(), offset, bytes);
  return false;
}

void* Arena::allocate(int64_t bytes, bool zeroed) {
  std::unique_lock lock(mutex_);
  release_held();
  bool fresh = false;
  std::optional<int64_t> offset;
  const bool fits = map() && bytes <= room_;  // so that no sum below overflows
  const int64_t unit = fits ? extent_unit(bytes) : 1;
  if (fits) {
    bytes = round_up(bytes, page_size());
    offset = warm_.take(bytes, page_size());
  }
  if (!offset && fits && may_back(bytes)) {
    offset = cold_.take(bytes, unit);
    fresh = offset.has_value();
  }
  if (fresh && *offset + bytes > top_.load(std::memory_order_relaxed)) {
    top_.store(*offset + bytes, std::memory_order_release);
    mapping_->show_to_children(file_.get(), 0, *offset + bytes);
  }
  if (fresh) {
    lock.unlock();
    const bool backed = back(*offset, bytes);
    lock.lock();
    if (!backed) {
      cold_.add(*offset, bytes);
      offset.reset();
    }
  }
  if (!offset) {
    if (!std::exchange(told_of_none_, true)) {
      log(LogLevel::warn, "no shared memory for an array of ", bytes >> 10,
          " KiB: this one, and those that find none later, lie in memory that other ranks do not share");
    }
    return nullptr;
  }
  blocks_[*offset] = {bytes, quarantined_};
  lock.unlock();
  char* const block = base() + *offset;
  if (zeroed && !fresh) std::memset(block, 0, static_cast<size_t>(bytes));
  return block;
}

void Arena::free(void* block) {
  if (inherited()) return;
  const int64_t offset = static_cast<char*>(block) - base();
  std::vector<Range> beyond;
  {
    const std::lock_guard lock(mutex_);
    const auto found = blocks_.find(offset);
    if (found == blocks_.end()) return;
    if (held(found->second)) {
      held_.emplace_back(*found);
    } else {
      warm_.add(offset, found->second.bytes);
    }
    blocks_.erase(found);
    release_held();
    while (warm_.bytes() > kKept) {
      const int64_t excess = warm_.bytes() - kKept;
      const auto [at, bytes] = *warm_.take_largest();
      const int64_t kept = std::max<int64_t>(bytes - excess, 0);
      warm_.add(at, kept);
      beyond.push_back({at + kept, bytes - kept});
    }
  }
  for (const Range& range : beyond) punch(file_.get(), range.offset, range.bytes);
  if (beyond.empty()) return;
  const std::lock_guard lock(mutex_);
  for (const Range& range : beyond) cold_.add(range.offset, range.bytes);
}

int64_t Arena::bytes_of(const void* block) const {
  const std::lock_guard lock(mutex_);
  const auto found = blocks_.find(static_cast<const char*>(block) - base());
  return found == blocks_.end() ? 0 : found->second.bytes;
}

// ---- after errors ----

void Arena::quarantine(std::function<bool()> over) {
  const std::lock_guard lock(mutex_);
  quarantines_.push_back({++quarantined_, std::move(over)});
}

bool Arena::held(const Block& block) const {
  return std::ranges::any_of(quarantines_, [&](const Quarantine& q) { return block.born < q.number; });
}

// Under the mutex.
void Arena::release_held() {
  if (quarantines_.empty()) [[likely]]
    return;
  std::erase_if(quarantines_, [](const Quarantine& quarantine) { return quarantine.over(); });
  std::erase_if(held_, [&](const auto& entry) {
    if (held(entry.second)) return false;
    warm_.add(entry.first, entry.second.bytes);
    return true;
  });
}

}  // namespace pycomm::transport
