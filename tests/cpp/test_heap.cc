// Symmetric memory: it has the same offset on every rank, is found by address, and is freed with its last
// owner.
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "runtime/heap.h"

using namespace pycomm;
using namespace pycomm::runtime;

namespace {

constexpr int kRanks = 3;
const std::vector<int> kNodeRanks = {0, 1, 2};

// One heap per rank thread, over one node.
struct Heaps {
  std::vector<std::shared_ptr<transport::Node>> nodes = transport::Node::local(kRanks);
  std::vector<std::shared_ptr<Heap>> heaps;
  Heaps() {
    for (const auto& node : nodes) heaps.push_back(std::make_shared<Heap>(node));
  }
  std::vector<std::shared_ptr<Allocation>> allocate(int64_t bytes) {
    const int64_t offset = nodes[0]->reserve(Heap::extent_bytes(bytes, kRanks));
    std::vector<std::shared_ptr<Allocation>> all;
    for (int rank = 0; rank < kRanks; ++rank)
      all.push_back(heaps[rank]->open(offset, bytes, kNodeRanks, rank));
    return all;
  }
};

}  // namespace

TEST(a_rank_reaches_the_others_slices) {
  Heaps heaps;
  for (const int64_t bytes : {int64_t{1}, int64_t{5000}, int64_t{3} << 20}) {
    const auto all = heaps.allocate(bytes);
    for (int rank = 0; rank < kRanks; ++rank) {
      CHECK_EQ(all[rank]->bytes(), bytes);
      std::memset(all[rank]->data(), 'a' + rank, static_cast<size_t>(bytes));
    }
    for (int rank = 0; rank < kRanks; ++rank) {
      const Heap::Place place = heaps.heaps[rank]->find(all[rank]->data(), bytes);
      CHECK(place.distance >= bytes);
      for (int peer = 0; peer < kRanks; ++peer) {
        const char* slice = all[rank]->data() + (peer - rank) * place.distance;
        CHECK_EQ(slice[0], static_cast<char>('a' + peer));
        CHECK_EQ(slice[bytes - 1], static_cast<char>('a' + peer));
      }
    }
  }
}

TEST(places_are_the_same_on_every_rank) {
  Heaps heaps;
  const auto first = heaps.allocate(1000), second = heaps.allocate(1000);
  const Heap::Place place = heaps.heaps[0]->find(second[0]->data() + 64, 100);
  for (int rank = 1; rank < kRanks; ++rank) {
    const Heap::Place other = heaps.heaps[rank]->find(second[rank]->data() + 64, 100);
    CHECK_EQ(other.offset, place.offset);
    CHECK_EQ(other.distance, place.distance);
    CHECK(heaps.heaps[rank]->find(first[rank]->data() + 64, 100).offset != place.offset);
  }
}

TEST(only_what_lies_wholly_inside_is_symmetric) {
  Heaps heaps;
  std::vector<char> plain(1000);
  CHECK_EQ(heaps.heaps[0]->find(plain.data(), 10).distance, 0);  // nothing is allocated yet
  const auto all = heaps.allocate(1000);
  const Heap& heap = *heaps.heaps[1];
  const char* data = all[1]->data();
  CHECK(heap.find(data, 1000).distance > 0);
  CHECK(heap.find(data + 999, 1).distance > 0);
  CHECK_EQ(heap.find(data + 1, 1000).distance, 0);
  CHECK_EQ(heap.find(data - 1, 10).distance, 0);
  CHECK_EQ(heap.find(plain.data(), 10).distance, 0);
  CHECK_EQ(heap.find(all[0]->data(), 10).distance, 0);  // rank 0's own mapping
}

TEST(pages_go_back_with_the_last_owner) {
  Heaps heaps;
  constexpr int64_t kBytes = 8 << 20;
  auto all = heaps.allocate(kBytes);
  const auto pages = heaps.nodes[0]->map(heaps.heaps[0]->find(all[0]->data(), kBytes).offset,
                                         kBytes);  // rank 0's slice, seen from outside
  std::memset(all[0]->data(), 7, kBytes);
  const char* mine = all[1]->data();
  all[0].reset();
  all[1].reset();
  CHECK_EQ(pages->data()[kBytes / 2], 7);  // rank 2 still has it
  CHECK_EQ(heaps.heaps[1]->find(mine, 10).distance, 0);
  all[2].reset();
  CHECK_EQ(pages->data()[kBytes / 2], 0);  // given back: reads as zeros
}

// Those that have ended do not count, whenever they end.
TEST(pages_go_back_without_the_dead) {
  for (const bool early : {true, false}) {
    Heaps heaps;
    constexpr int64_t kBytes = 8 << 20;
    auto all = heaps.allocate(kBytes);
    const auto pages = heaps.nodes[0]->map(heaps.heaps[0]->find(all[0]->data(), kBytes).offset, kBytes);
    std::memset(all[0]->data(), 7, kBytes);
    if (early) heaps.nodes[1]->mark_dead(1);
    all[0].reset();
    all[2].reset();
    if (!early) {
      CHECK_EQ(pages->data()[kBytes / 2], 7);
      heaps.nodes[1]->mark_dead(1);
      auto later = heaps.allocate(100);  // ranks look again whenever they take or give back
    }
    CHECK_EQ(pages->data()[kBytes / 2], 0);
  }
}

// A child's handles are not its own to drop.
TEST(a_forked_child_gives_nothing_back) {
  Heaps heaps;
  auto all = heaps.allocate(4096);
  std::memset(all[0]->data(), 7, 4096);
  all[1].reset();
  all[2].reset();
  const pid_t pid = fork();
  if (pid == 0) {
    all[0].reset();
    _exit(0);
  }
  int status = -1;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) continue;
  CHECK_EQ(status, 0);
  CHECK_EQ(all[0]->data()[100], 7);
}
