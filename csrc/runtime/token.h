// A mutex that costs one exchange to take and one to give back while nobody waits: hot calls take two of
// them.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>

namespace pycomm::runtime {

class Token {
 public:
  bool try_lock() {
    uint32_t free = kFree;
    if (!state_.compare_exchange_strong(free, kHeld, std::memory_order_acquire, std::memory_order_relaxed)) {
      return false;
    }
    owner_.store(pthread_self(), std::memory_order_relaxed);
    return true;
  }
  void lock() {
    if (try_lock()) return;
    while (state_.exchange(kAwaited, std::memory_order_acquire) != kFree) state_.wait(kAwaited);
    owner_.store(pthread_self(), std::memory_order_relaxed);
  }
  bool taken() const { return state_.load() != kFree; }
  // By this thread.
  bool held() const { return owner_.load(std::memory_order_relaxed) == pthread_self(); }
  void unlock() {
    owner_.store({}, std::memory_order_relaxed);
    if (state_.exchange(kFree) == kAwaited) state_.notify_one();
  }

 private:
  static constexpr uint32_t kFree = 0, kHeld = 1, kAwaited = 2;
  std::atomic<uint32_t> state_{kFree};
  std::atomic<pthread_t> owner_{};
};

}  // namespace pycomm::runtime
