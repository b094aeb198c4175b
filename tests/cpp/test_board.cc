// What ranks show each other is the same whether they share memory or only messages: every test runs on one
// node, on two, and on one for each rank.
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "transport/board.h"

using namespace pycomm;
using namespace pycomm::transport;

namespace {

constexpr int kRanks = 3;
const std::vector<std::vector<int>> kMaps = {{0, 0, 0}, {0, 1, 0}, {0, 1, 2}};

struct End {
  Group group;
  std::shared_ptr<Mapping> mapping;
  Board board;
  End(const std::shared_ptr<Node>& node, const std::vector<int>& ranks, int me, int64_t offset,
      Board* parent = nullptr)
      : group(node, ranks, me),
        mapping(node->map(offset, Board::bytes(group.local_size()))),
        board(group, parent ? 2 : 1, mapping, mapping->data(), parent) {}
};

// The boards of a group, and of a pair of its ranks if asked for.
struct Boards {
  std::vector<std::shared_ptr<Node>> nodes;
  std::vector<std::unique_ptr<End>> ends, pair;

  explicit Boards(const std::vector<int>& map) : nodes(Node::local(kRanks, {.nodes = map})) {
    std::vector<int64_t> offsets(kRanks, 0);  // by node
    for (int r = 0; r < kRanks; ++r) {
      int64_t& offset = offsets[map[r]];
      if (offset == 0) offset = nodes[r]->reserve(Board::bytes(kRanks));
      ends.push_back(std::make_unique<End>(nodes[r], std::vector<int>{0, 1, 2}, r, offset));
    }
  }
  void open_pair(int a, int b) {
    const bool together = ends[a]->group.mapped(b);
    const int64_t offset = nodes[a]->reserve(Board::bytes(2));
    const int64_t other = together ? offset : nodes[b]->reserve(Board::bytes(2));
    pair.push_back(std::make_unique<End>(nodes[a], std::vector<int>{a, b}, 0, offset, &(*this)[a]));
    pair.push_back(std::make_unique<End>(nodes[b], std::vector<int>{a, b}, 1, other, &(*this)[b]));
  }
  Board& operator[](int rank) { return ends[rank]->board; }
  // Nothing crosses between nodes but what is published and heard.
  void exchange() {
    for (const auto& end : ends) end->board.publish();
    for (const auto& end : ends) end->board.hear();
    for (const auto& end : pair) end->board.hear();
  }
};

Record record(uint64_t fingerprint, const std::string& words) {
  Record record{};
  std::memcpy(record.data(), &fingerprint, sizeof fingerprint);
  std::memcpy(record.data() + sizeof fingerprint, words.data(), words.size());
  return record;
}

template <class Test>
void on_every_map(const Test& test) {
  for (const auto& map : kMaps) {
    Boards boards(map);
    test(boards);
  }
}

}  // namespace

TEST(records_of_two_calls_can_be_read_by_all) {
  on_every_map([](Boards& boards) {
    const Record first = record(11, "first"), second = record(12, "second"), third = record(13, "third");
    boards[1].enter(1, first);
    boards[1].enter(2, second);
    boards.exchange();
    for (int r = 0; r < kRanks; ++r) {
      CHECK(boards[r].record_of(1, 1) == first);
      CHECK(boards[r].record_of(1, 2) == second);
      CHECK(!boards[r].record_of(1, 3));
      CHECK(!boards[r].record_of(2, 1));
      CHECK_EQ(boards[r].member(1).entered.load(), 2u);
      CHECK_EQ(boards[r].fingerprint_of(1, 2), 12u);
    }
    boards[1].enter(3, third);
    boards.exchange();
    for (int r = 0; r < kRanks; ++r) {
      CHECK(!boards[r].record_of(1, 1));
      CHECK(boards[r].record_of(1, 3) == third);
    }
    boards[1].enter(4, second);  // the same words as two calls ago, for another call
    boards.exchange();
    for (int r = 0; r < kRanks; ++r) {
      CHECK(!boards[r].record_of(1, 2));
      CHECK(boards[r].record_of(1, 4) == second);
    }
  });
}

TEST(the_first_rank_that_differs_is_found) {
  on_every_map([](Boards& boards) {
    boards[0].enter(1, record(5, "this"));
    boards[2].enter(1, record(6, "that"));
    boards.exchange();
    CHECK(!boards[0].first_to_differ(2, 5));
    CHECK(boards[0].first_to_differ(1, 5) == 2);
    CHECK(boards[2].first_to_differ(1, 6) == 0);
    CHECK(boards[1].first_to_differ(1, 7) == 0);
  });
}

TEST(a_rank_is_lost_that_is_gone_before_it_finished) {
  on_every_map([](Boards& boards) {
    for (int r = 0; r < kRanks; ++r) boards[r].enter(1, record(5, ""));
    boards[1].finish(1);
    boards[1].self().closed.store(1);
    boards.exchange();
    CHECK(boards[0].gone(1) && !boards[0].gone(2));
    CHECK(!boards[0].find_lost(1));
    CHECK(boards[0].find_lost(2) == 1);
    boards.nodes[2]->mark_dead(2);
    CHECK(boards[0].gone(2) && !boards[0].closed(2));
    CHECK(boards[0].find_lost(1) == 2);
    CHECK(!boards[2].find_lost(1));  // not itself
  });
}

TEST(the_rank_furthest_behind_is_late_unless_it_waits) {
  on_every_map([](Boards& boards) {
    boards[0].enter(1, record(5, ""));
    boards[1].enter(1, record(5, ""));
    boards.exchange();
    const auto late = boards[0].find_late(1, 2);
    CHECK_EQ(late.rank, 2);
    CHECK(!late.waits);

    std::atomic<bool> done{false};
    std::thread waiting([&] {
      while (!done) {
        boards[2].waker().heartbeat.fetch_add(1);
        boards[2].publish();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    });
    const auto other = boards[0].find_late(1, 2);
    done = true;
    waiting.join();
    CHECK_EQ(other.rank, 1);
    CHECK(!other.waits);
  });
}

TEST(the_first_failure_is_everybodys) {
  on_every_map([](Boards& boards) {
    boards.open_pair(0, 1);
    CHECK(!boards[2].failed());
    boards.pair[0]->board.fail(FailureKind::mismatch, "rank 0 called another thing");
    boards.exchange();
    boards[2].fail(FailureKind::timeout, "too late to be the reason");
    boards.exchange();
    for (int r = 0; r < kRanks; ++r) {
      CHECK(boards[r].failed());
      std::string text;
      try {
        boards[r].raise_failure(Board::Caller::under_way);
      } catch (const MismatchError& error) {
        text = error.what();
      }
      CHECK_EQ(text, "rank 0 called another thing");
      CHECK_THROWS(AbortedError, boards[r].raise_failure(Board::Caller::starting));
    }
    CHECK(boards.pair[1]->board.failed());
  });
}

TEST(a_pair_closes_and_speaks_as_its_group_does) {
  on_every_map([](Boards& boards) {
    boards.open_pair(1, 2);
    Board &one = boards.pair[0]->board, &two = boards.pair[1]->board;
    CHECK_EQ(two.name_of(0), "rank 1");
    CHECK_EQ(two.name(), "rank 2");
    boards[1].leave_words("it could not go on");
    boards[1].self().closed.store(1);
    boards.exchange();
    CHECK(two.closed(0) && !one.closed(1));
    CHECK_EQ(two.last_words_of(0), "it could not go on");
    CHECK_EQ(&two.waker(1), &boards[2].self());
  });
}

TEST(what_was_sent_is_awaited_while_the_receiver_is_there) {
  on_every_map([](Boards& boards) {
    CHECK(boards[0].all_received());
    if (!boards[0].messages()) return;
    const int64_t data = 7;
    boards[0].messages()->send(1, 0, {1, 5}, &data, sizeof data);
    CHECK(!boards[0].all_received());
    boards[1].self().closed.store(1);
    boards.exchange();
    CHECK(boards[0].all_received());
    boards[0].withdraw_messages();
    CHECK(!boards[1].messages()->header(0, 0));
  });
}
