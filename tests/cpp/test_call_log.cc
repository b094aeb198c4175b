// The log of a group's calls: what it keeps, and in which order the times in it are.
#include <vector>

#include "check.h"
#include "group_calls.h"
#include "runtime/call_log.h"

using namespace group_calls;

TEST(calls_are_logged_from_the_next_one_on) {
  run_threads(3, [](Communicator& comm) {
    Patience patience;
    std::vector<int64_t> data(10, 1);
    all_reduce(comm, data);
    CHECK(comm.take_log().calls.empty());
    comm.log_calls(100, patience);
    const int64_t before = now_ns();
    for (int i = 0; i < 4; ++i) all_reduce(comm, data);
    const auto [calls, dropped] = comm.take_log();
    CHECK_EQ(calls.size(), 4u);
    CHECK_EQ(dropped, 0u);
    int64_t last = before;
    for (const CallTimes& call : calls) {
      CHECK_EQ(call.collective, "all_reduce");
      CHECK_EQ(call.bytes, 80);
      CHECK(!call.algorithm.empty());
      CHECK(last <= call.started && call.started <= call.finished);
      CHECK(call.first_arrival <= call.last_arrival && call.last_arrival <= call.finished);
      CHECK(call.last_rank >= 0 && call.last_rank < 3 && call.last_rank != comm.rank());
      last = call.finished;
    }
    comm.log_calls(0, patience);
    all_reduce(comm, data);
    CHECK(comm.take_log().calls.empty());
  });
}

TEST(the_latest_calls_are_kept) {
  run_threads(2, [](Communicator& comm) {
    Patience patience;
    std::vector<int64_t> data(10, 1);
    comm.log_calls(3, patience);
    for (int i = 1; i <= 5; ++i) {
      data.resize(i);
      all_reduce(comm, data);
    }
    const auto [calls, dropped] = comm.take_log();
    CHECK_EQ(dropped, 2u);
    CHECK_EQ(calls.size(), 3u);
    for (size_t i = 0; i < calls.size(); ++i) CHECK_EQ(calls[i].bytes, static_cast<int64_t>(8 * (i + 3)));
  });
}

// On another node a rank's entries are not known.
TEST(the_last_rank_is_one_of_the_node) {
  run_threads(2, [](Communicator& comm) {
    Patience patience;
    comm.log_calls(10, patience);
    std::vector<int64_t> data(10, 1);
    all_reduce(comm, data);
    const auto calls = comm.take_log().calls;
    CHECK_EQ(calls.size(), 1u);
    CHECK_EQ(calls[0].last_rank, 1 - comm.rank());
  });
  run_threads(2,
              [](Communicator& comm) {
                Patience patience;
                comm.log_calls(10, patience);
                std::vector<int64_t> data(10, 1);
                all_reduce(comm, data);
                CHECK_EQ(comm.take_log().calls.at(0).last_rank, -1);
              },
              20, {.nodes = {0, 1}, .delays = std::nullopt});
}
