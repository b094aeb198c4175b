// Cells and doorbells between threads: what is stored before a signal is seen after it, and no ring is missed.
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>

#include "check.h"
#include "transport/signals.h"

using namespace pycomm::transport;

TEST(a_signal_carries_what_was_stored_before) {
  constexpr uint64_t kCalls = 20000;
  const auto there = std::make_unique<Cell>(), back = std::make_unique<Cell>();
  std::thread writer([&] {
    for (uint64_t call = 1; call <= kCalls; ++call) {
      std::memcpy(there->payload, &call, sizeof call);
      there->signal(call, 3, 7 * call);
      while (back->word.load(std::memory_order_acquire) < cell_word(call, 1)) std::this_thread::yield();
    }
  });
  for (uint64_t call = 1; call <= kCalls; ++call) {
    while (there->word.load(std::memory_order_acquire) < cell_word(call, 3)) std::this_thread::yield();
    uint64_t found = 0;
    std::memcpy(&found, there->payload, sizeof found);
    CHECK_EQ(found, call);
    CHECK_EQ(there->fingerprint.load(), 7 * call);
    back->signal(call, 1, 0);
  }
  writer.join();
}

TEST(words_grow_with_calls_and_values) {
  CHECK(cell_word(1, 2) > cell_word(1, 1));
  CHECK(cell_word(2, 0) > cell_word(1, (int64_t{1} << kValueBits) - 1));
}

// Each sleeps until the other has rung: a ring that is missed costs most of a second, of which there is room
// for a few.
TEST(no_ring_is_missed) {
  register_for_fences();
  constexpr int kTurns = 3000;
  struct Side {
    alignas(kApart) Doorbell doorbell{};
    alignas(kApart) std::atomic<int> turns{0};
  };
  const auto sides = std::make_unique<Side[]>(2);
  int naps = 0;  // that nobody has ended
  const auto play = [&](Side& mine, Side& other, int* ended) {
    for (int turn = 1; turn <= kTurns; ++turn) {
      other.turns.store(turn, std::memory_order_release);
      other.doorbell.ring();
      while (mine.turns.load(std::memory_order_acquire) < turn) {
        const auto before = std::chrono::steady_clock::now();
        mine.doorbell.sleep(0.9, [&] { return mine.turns.load(std::memory_order_acquire) >= turn; });
        if (ended && std::chrono::steady_clock::now() - before > std::chrono::milliseconds(850)) ++*ended;
      }
    }
  };
  std::thread second([&] { play(sides[1], sides[0], nullptr); });
  play(sides[0], sides[1], &naps);
  second.join();
  CHECK_EQ(naps, 0);
}
