// Messages between rank threads: they keep their order, they are not buffered, and delays lose and change
// nothing.
#include <memory>
#include <numeric>
#include <optional>
#include <thread>
#include <vector>

#include "check.h"
#include "transport/loopback.h"

using namespace pycomm::transport;

namespace {

void wait_for(const std::atomic<uint64_t>& counter, uint64_t target) {
  while (counter.load(std::memory_order_acquire) < target) std::this_thread::yield();
}

}  // namespace

TEST(messages_stay_with_their_sender_until_they_are_taken) {
  Loopback loopback(std::nullopt);
  const auto a = loopback.open(1, 2, 0), b = loopback.open(1, 2, 1);
  int data = 5, found = 0;
  a->send(1, 3, {.call = 7, .fingerprint = 11}, &data, sizeof data);
  CHECK_EQ(a->sent(1, 3), 1U);
  CHECK_EQ(a->received(1, 3).load(), 0U);
  CHECK_EQ(b->arrived(0, 3).load(), 1U);
  CHECK_EQ(b->arrived(0, 2).load(), 0U);
  CHECK(*b->header(0, 3) == (Header{7, 11}));
  data = 6;  // as a sender must not, which shows that nobody has a copy
  b->receive(0, 3, &found, sizeof found);
  CHECK_EQ(found, 6);
  CHECK_EQ(a->received(1, 3).load(), 1U);
  CHECK_EQ(b->taken(0, 3), 1U);
  a->send(1, 3, {}, nullptr, 0);
  wait_for(b->arrived(0, 3), 2);
  b->receive(0, 3, nullptr, 0);
  CHECK_EQ(a->received(1, 3).load(), 2U);
}

TEST(a_slot_holds_one_message) {
  Loopback loopback(std::nullopt);
  const auto a = loopback.open(1, 2, 0), b = loopback.open(1, 2, 1);
  const int data[] = {1, 2, 3};
  for (const int& each : data) a->send(1, 0, {}, &each, sizeof each);
  for (uint64_t i = 1; i <= 3; ++i) {
    CHECK_EQ(b->arrived(0, 0).load(), i);
    int found = 0;
    b->receive(0, 0, &found, sizeof found);
    CHECK_EQ(found, static_cast<int>(i));
  }
}

TEST(groups_are_told_apart_by_their_key) {
  Loopback loopback(std::nullopt);
  const auto a = loopback.open(1, 2, 0), b = loopback.open(1, 2, 1), other = loopback.open(2, 2, 1);
  a->send(1, 0, {}, nullptr, 0);
  CHECK_EQ(b->arrived(0, 0).load(), 1U);
  CHECK_EQ(other->arrived(0, 0).load(), 0U);
}

// All ranks send to all on several channels at once; each channel keeps its order.
TEST(channels_keep_their_order_whatever_is_late) {
  constexpr int kRanks = 3, kMessages = 200;
  for (const std::optional<uint64_t> seed : {std::optional<uint64_t>(), std::optional<uint64_t>(1), {2}}) {
    Loopback loopback(seed);
    std::vector<std::unique_ptr<Messages>> ends;
    for (int rank = 0; rank < kRanks; ++rank) ends.push_back(loopback.open(1, kRanks, rank));
    std::vector<int> numbers(kMessages);
    std::iota(numbers.begin(), numbers.end(), 0);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < kRanks; ++rank) {
      threads.emplace_back([&, rank] {
        Messages& mine = *ends[rank];
        for (int i = 0; i < kMessages; ++i) {
          for (int peer = 0; peer < kRanks; ++peer) {
            if (peer != rank)
              mine.send(peer, i % 2, {.call = static_cast<uint64_t>(i)}, &numbers[i], sizeof(int));
          }
          for (int peer = 0; peer < kRanks; ++peer) {
            if (peer == rank) continue;
            wait_for(mine.arrived(peer, i % 2), mine.taken(peer, i % 2) + 1);
            int found = -1;
            CHECK_EQ(mine.header(peer, i % 2)->call, static_cast<uint64_t>(i));
            mine.receive(peer, i % 2, &found, sizeof found);
            CHECK_EQ(found, i);
          }
        }
        for (int peer = 0; peer < kRanks; ++peer) {
          for (const int channel : {0, 1}) wait_for(mine.received(peer, channel), mine.sent(peer, channel));
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

TEST(what_is_not_taken_goes_with_its_sender) {
  Loopback loopback(std::nullopt);
  auto a = loopback.open(1, 2, 0);
  const auto b = loopback.open(1, 2, 1);
  auto data = std::make_unique<int>(1);
  for (int i = 0; i < 10; ++i) a->send(1, 0, {.call = 4}, data.get(), sizeof *data);
  a.reset();
  data.reset();  // AddressSanitizer sees who reads it
  int found = 0;
  CHECK(!b->header(0, 0));
  CHECK(!b->receive(0, 0, &found, sizeof found));
  CHECK_EQ(b->taken(0, 0), 0U);
}

TEST(a_group_waits_for_those_who_open_late) {
  for (const std::optional<uint64_t> seed : {std::optional<uint64_t>(), std::optional<uint64_t>(3)}) {
    Loopback loopback(seed);
    loopback.open(1, 2, 0)->publish("gone");
    {
      const auto b = loopback.open(1, 2, 1);
      CHECK_EQ(b->status(0), "gone");
    }
    const auto again = loopback.open(1, 2, 1);  // the key is free when all have closed
    CHECK_EQ(again->status(0), "");
  }
}

TEST(of_several_statuses_the_last_is_seen_once) {
  Loopback loopback(std::nullopt);
  const auto a = loopback.open(1, 3, 0), b = loopback.open(1, 3, 1), c = loopback.open(1, 3, 2);
  CHECK_EQ(b->status(0), "");
  a->publish("one");
  a->publish("two");
  CHECK_EQ(b->status(0), "two");
  CHECK_EQ(b->status(0), "");
  CHECK_EQ(b->status(2), "");
  CHECK_EQ(c->status(0), "two");
}

TEST(arrivals_and_receipts_are_told) {
  Loopback loopback(std::nullopt);
  int to_a = 0, to_b = 0;
  const auto a = loopback.open(1, 2, 0, [&] { ++to_a; }), b = loopback.open(1, 2, 1, [&] { ++to_b; });
  a->send(1, 0, {}, nullptr, 0);
  CHECK_EQ(to_b, 1);
  CHECK_EQ(to_a, 0);
  b->receive(0, 0, nullptr, 0);
  CHECK_EQ(to_a, 1);
}
