// How ranks that map each other's memory tell each other something: a cell for each pair, which one writes and
// the other reads, and a doorbell for each rank that may sleep. All of it lies in shared memory, zeroed at
// first.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace pycomm::transport {

// Lines with different readers are two apart: prefetchers fetch lines in pairs.
inline constexpr size_t kApart = 128;

inline constexpr int kValueBits = 24;  // of a cell's word: the value in the call; above it the call's number
inline uint64_t cell_word(uint64_t call, int64_t value) {
  return call << kValueBits | static_cast<uint64_t>(value);
}

// A cache line from one rank to another. Its word (call, value) only grows.
struct alignas(64) Cell {
  std::atomic<uint64_t> word;
  std::atomic<uint64_t> fingerprint;  // of the writer's call; written before word
  char payload[48];                   // the same

  void signal(uint64_t call, int64_t value, uint64_t print) {
    fingerprint.store(print, std::memory_order_relaxed);
    word.store(cell_word(call, value), std::memory_order_release);
  }
};
static_assert(sizeof(Cell) == 64);

// Lets threads that sleep at doorbells order their sleep with this process's signals (membarrier), so that a
// signal needs no fence of its own. Once a process.
void register_for_fences();

// One rank's. One of its threads at a time sleeps; any thread of any rank rings.
class Doorbell {
 public:
  // After whatever the sleeper waits for has been stored.
  void ring() {
    if (sleeping_.load(std::memory_order_relaxed) != 0) wake();
  }
  // Until it is rung, `seconds` < 1 have passed, or met() is true already: that is asked once, in an order
  // with every ring such that none is missed.
  template <class Met>
  void sleep(double seconds, const Met& met) {
    const uint32_t rung = rung_.load(std::memory_order_acquire);
    sleeping_.store(1, std::memory_order_seq_cst);
    if (!fence_all_processes()) seconds = std::min(seconds, 0.0005);  // a ring may be missed
    if (!met()) wait(rung, seconds);
    sleeping_.store(0, std::memory_order_relaxed);
  }

 private:
  static bool fence_all_processes();
  void wake();
  void wait(uint32_t rung, double seconds);

  std::atomic<uint32_t> sleeping_;
  std::atomic<uint32_t> rung_;  // how often; a futex
};

}  // namespace pycomm::transport
