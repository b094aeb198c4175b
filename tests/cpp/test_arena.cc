// A process's own shared memory: blocks, what is kept of it, children of fork(), peers, and what errors hold.
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "transport/arena.h"
#include "transport/memory.h"
#include "transport/node.h"

using namespace pycomm;
using namespace pycomm::transport;

namespace {

constexpr int64_t kPage = 4096;

// What the file holds for real.
int64_t backed(const Arena& arena) {
  struct stat file{};
  fstat(arena.file(), &file);
  return file.st_blocks * 512;
}

bool all_are(const void* data, int64_t bytes, char value) {
  const char* const first = static_cast<const char*>(data);
  return std::all_of(first, first + bytes, [&](char c) { return c == value; });
}

// Runs in a child, which says with its exit code whether all checks held.
void in_child(const std::function<void()>& body) {
  const pid_t pid = fork();
  if (pid == 0) {
    check::failures = 0;
    body();
    _exit(check::failures != 0);
  }
  int status = -1;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) continue;
  CHECK_EQ(status, 0);
}

}  // namespace

// Beside a map of every unit.
TEST(free_ranges_are_one_where_they_touch) {
  constexpr int kUnits = 400;
  std::mt19937 random(7);
  FreeRanges ranges;
  std::vector<bool> is_free(kUnits, false);
  ranges.add(0, kUnits);
  is_free.assign(kUnits, true);
  const auto longest = [&] {
    int most = 0, now = 0;
    for (const bool one : is_free) most = std::max(most, now = one ? now + 1 : 0);
    return most;
  };
  std::vector<std::pair<int64_t, int64_t>> taken;
  for (int i = 0; i < 20000; ++i) {
    if (random() % 2 == 0 && !taken.empty()) {
      const size_t which = random() % taken.size();
      const auto [offset, bytes] = taken[which];
      taken.erase(taken.begin() + static_cast<std::ptrdiff_t>(which));
      std::fill_n(is_free.begin() + offset, bytes, true);
      ranges.add(offset, bytes);
    } else {
      const int64_t bytes = 1 + random() % 20;
      const auto offset = ranges.take(bytes, 1);
      CHECK_EQ(offset.has_value(), bytes <= longest());
      if (!offset) continue;
      CHECK(std::all_of(is_free.begin() + *offset, is_free.begin() + *offset + bytes,
                        [](bool b) { return b; }));
      std::fill_n(is_free.begin() + *offset, bytes, false);
      taken.emplace_back(*offset, bytes);
    }
    CHECK_EQ(ranges.bytes(), std::count(is_free.begin(), is_free.end(), true));
  }
  const auto largest = ranges.take_largest();
  CHECK(largest.has_value() && largest->second == longest());
}

TEST(ranges_begin_where_they_are_asked_to) {
  FreeRanges ranges;
  ranges.add(3, 10);
  CHECK_EQ(ranges.take(4, 8).value_or(-1), 8);
  CHECK_EQ(ranges.take(5, 1).value_or(-1), 3);
  CHECK_EQ(ranges.take(1, 8).value_or(-1), -1);  // 12 is left, and no multiple of 8
  CHECK_EQ(ranges.bytes(), 1);
}

TEST(blocks_are_apart_and_zero_where_that_is_asked) {
  Arena& arena = Arena::of_process();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<unsigned>(t));
      struct Mine {
        char* data;
        int64_t bytes;
        char value;
      };
      std::vector<Mine> mine;
      for (int i = 0; i < 300; ++i) {
        if (mine.size() > 8) {
          const size_t which = random() % mine.size();
          const Mine one = mine[which];
          CHECK(all_are(one.data, one.bytes, one.value));
          arena.free(one.data);
          mine.erase(mine.begin() + static_cast<std::ptrdiff_t>(which));
        }
        const int64_t bytes = 1 + random() % 300000;
        const bool zeroed = random() % 2 == 0;
        auto* const data = static_cast<char*>(arena.allocate(bytes, zeroed));
        CHECK(data != nullptr);
        CHECK_EQ(reinterpret_cast<uintptr_t>(data) % kPage, 0U);
        CHECK(arena.bytes_of(data) >= bytes);
        CHECK_EQ(arena.offset_of(data, bytes), data - arena.base());
        CHECK(Arena::at(data + bytes - 1) == &arena);
        if (zeroed) CHECK(all_are(data, bytes, 0));
        const char value = static_cast<char>('a' + t);
        std::memset(data, value, static_cast<size_t>(bytes));
        mine.push_back({data, bytes, value});
      }
      for (const Mine& one : mine) arena.free(one.data);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(what_lies_elsewhere_is_not_the_arenas) {
  Arena& arena = Arena::of_process();
  auto* const block = static_cast<char*>(arena.allocate(100000, false));
  std::vector<char> plain(100000);
  CHECK(Arena::at(plain.data()) == nullptr);
  CHECK(Arena::at(nullptr) == nullptr);
  CHECK_EQ(arena.offset_of(plain.data(), 10), -1);
  CHECK_EQ(arena.offset_of(block - 1 - (block - arena.base()), 10), -1);
  arena.free(block);
}

TEST(so_much_is_kept_and_no_more) {
  Arena& arena = Arena::of_process();
  constexpr int64_t kBlock = 96 << 20;
  const int64_t blocks = Arena::kKept / kBlock + 3;
  std::vector<void*> all;
  for (int64_t i = 0; i < blocks; ++i) all.push_back(arena.allocate(kBlock, false));
  for (void* const block : all) CHECK(block != nullptr);
  CHECK(backed(arena) >= blocks * kBlock);
  for (void* const block : all) arena.free(block);
  CHECK(backed(arena) <= Arena::kKept);
  CHECK(backed(arena) > Arena::kKept - kBlock);
  // And is used again: nothing more is backed for what fits.
  const int64_t before = backed(arena);
  void* const again = arena.allocate(kBlock, false);
  CHECK_EQ(backed(arena), before);
  arena.free(again);
}

// The child has its own copies, frees nothing, and makes an arena of its own.
TEST(children_write_to_copies) {
  Arena& arena = Arena::of_process();
  constexpr int64_t kBytes = 1 << 20;
  auto* const block = static_cast<char*>(arena.allocate(kBytes, true));
  std::memset(block, 7, kBytes / 2);
  in_child([&] {
    CHECK(Arena::if_any() == nullptr);
    CHECK(Arena::at(block) == &arena);
    CHECK(arena.inherited());
    CHECK_EQ(arena.offset_of(block, kBytes), -1);
    CHECK(all_are(block, kBytes / 2, 7));
    CHECK(all_are(block + kBytes / 2, kBytes / 2, 0));
    std::memset(block, 9, kBytes);
    CHECK_EQ(arena.bytes_of(block), kBytes);
    arena.free(block);
    CHECK(all_are(block, kBytes, 9));
    Arena& own = Arena::of_process();
    CHECK(&own != &arena);
    auto* const other = static_cast<char*>(own.allocate(kBytes, true));
    std::memset(other, 5, kBytes);
    CHECK(Arena::at(other) == &own && Arena::at(block) == &arena);
    in_child([&] {  // and its children theirs
      CHECK(all_are(block, kBytes, 9));
      CHECK(all_are(other, kBytes, 5));
      std::memset(block, 1, kBytes);
      std::memset(other, 1, kBytes);
    });
    CHECK(all_are(block, kBytes, 9));
    CHECK(all_are(other, kBytes, 5));
    own.free(other);
  });
  CHECK(all_are(block, kBytes / 2, 7));
  CHECK(all_are(block + kBytes / 2, kBytes / 2, 0));
  arena.free(block);
}

// While other threads take and free blocks.
TEST(forks_may_come_from_any_thread) {
  Arena& arena = Arena::of_process();
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) arena.free(arena.allocate(200000, false));
  });
  auto* const block = static_cast<char*>(arena.allocate(100000, false));
  std::memset(block, 3, 100000);
  std::thread forks([&] {
    for (int i = 0; i < 20; ++i) {
      in_child([&] {
        CHECK(all_are(block, 100000, 3));
        CHECK(arena.bytes_of(block) >= 100000);
        arena.free(block);
      });
    }
  });
  forks.join();
  stop = true;
  busy.join();
  arena.free(block);
}

// Sanitizers need addresses themselves.
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
TEST(where_addresses_are_short_there_is_no_block) {
  in_child([] {
    Arena& arena = Arena::of_process();
    const rlimit little{int64_t{16} << 20, int64_t{16} << 20};
    setrlimit(RLIMIT_AS, &little);
    for (int i = 0; i < 3; ++i) CHECK(arena.allocate(100000, false) == nullptr);
    CHECK(!arena.used());
  });
}
#endif

TEST(what_the_machine_has_not_is_refused) {
  CHECK(Arena::of_process().allocate(int64_t{1} << 50, false) == nullptr);
  const int64_t all = sysconf(_SC_PHYS_PAGES) * page_size();
  const int64_t before = backed(Arena::of_process());
  CHECK(Arena::of_process().allocate(all - all / 64, false) == nullptr);
  CHECK_EQ(backed(Arena::of_process()), before);
}

// Ranks are processes that have their arenas mapped when the others ask.
TEST(peers_map_each_others_arenas) {
  constexpr int kRanks = 3;
  constexpr int64_t kBytes = 300000;
  const std::string address = "arena-" + std::to_string(getpid());
  std::vector<pid_t> pids;
  for (int rank = 0; rank < kRanks; ++rank) {
    const pid_t pid = fork();
    if (pid) {
      pids.push_back(pid);
      continue;
    }
    check::failures = 0;
    try {
      const auto node = Node::join({.rank = rank, .size = kRanks, .address = address, .timeout_s = 30});
      auto* const words = reinterpret_cast<std::atomic<int64_t>*>(node->root_page() + 64);
      auto* const done = words + kRanks;
      for (int i = 0; i < rank; ++i) Arena::of_process().allocate(100000, false);  // another place on each
      auto* const block = static_cast<char*>(Arena::of_process().allocate(kBytes, false));
      std::memset(block, 'a' + rank, kBytes);
      words[rank] = 1 + Arena::of_process().offset_of(block, kBytes);
      for (int peer = 0; peer < kRanks; ++peer) {
        while (words[peer] == 0) usleep(100);
        char* const there = node->arena_of(peer) + (words[peer] - 1);
        CHECK(peer != rank || there == block);
        CHECK_EQ(there[kBytes - 1], static_cast<char>('a' + peer));
        there[rank] = static_cast<char>('A' + rank);
      }
      done->fetch_add(1);
      while (*done < kRanks) usleep(100);
      for (int peer = 0; peer < kRanks; ++peer) CHECK_EQ(block[peer], static_cast<char>('A' + peer));
    } catch (const std::exception& error) {
      check::fail("rank", rank, error.what());
    }
    _exit(check::failures != 0);
  }
  for (const pid_t pid : pids) {
    int status = -1;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) continue;
    CHECK_EQ(status, 0);
  }
}

TEST(what_was_told_before_an_error_goes_to_nobody_else) {
  Arena& arena = Arena::of_process();
  constexpr int64_t kBytes = 777 * kPage;
  const auto take = [&] { return static_cast<char*>(arena.allocate(kBytes, false)); };
  char* const old = take();
  bool first_over = false, second_over = false;
  arena.quarantine([&] { return first_over; });
  char* const later = take();
  arena.quarantine([&] { return second_over; });
  arena.free(old);
  arena.free(later);
  std::vector<char*> others;
  const auto reused = [&](char* block) {
    for (int i = 0; i < 8; ++i) others.push_back(take());
    return std::ranges::find(others, block) != others.end();
  };
  CHECK(!reused(old) && !reused(later));
  second_over = true;
  CHECK(reused(later) && !reused(old));
  first_over = true;
  CHECK(reused(old));
  for (char* const block : others) arena.free(block);
}

TEST(sizes_that_no_memory_has_are_refused_and_cost_nothing) {
  Arena& arena = Arena::of_process();
  void* const first = arena.allocate(1 << 20, false);
  arena.free(first);
  for (const int64_t bytes : {INT64_MAX, INT64_MAX - 4095, INT64_MAX / 2}) {
    CHECK(arena.allocate(bytes, true) == nullptr);
  }
  void* const next = arena.allocate(1 << 20, true);
  CHECK(next != nullptr);
  arena.free(next);
}
