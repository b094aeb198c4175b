// Groups whose ranks are on several nodes: how they start, end and share memory; and the kill suite of
// message links. There a rank thread ends at every step of a call, and its link ends and unread messages go
// with it. Each of the others must raise PeerLostError naming it within a second; or, if it has all that it
// needs, complete the call with the right result and raise the error in the next call. (Processes on one
// node: kill_harness.cc.)
#include <algorithm>
#include <atomic>
#include <iostream>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "group_calls.h"
#include "runtime/sequence.h"
#include "runtime/waiter.h"
#include "schedule/lower/lower.h"

using namespace group_calls;

namespace {

constexpr int64_t kBank = 64 << 10;
const schedule::Geometry kGeometry{.bank_bytes = kBank, .trip_bytes = 4 << 10, .payload_bytes = 48};
constexpr double kDeadline = 1.0;

struct Case {
  std::string algorithm;
  std::vector<int> nodes;
  int64_t count;
  std::optional<uint64_t> delays;
  std::vector<std::unique_ptr<Prepared>> plans = {};  // by rank

  int size() const { return static_cast<int>(nodes.size()); }
  void prepare() {
    schedule::Call call{.world = {.size = size(), .nodes = nodes}, .counts = {count}, .in_place = true};
    for (int rank = 0; rank < size(); ++rank) {
      plans.push_back(
          std::make_unique<Prepared>(schedule::make_plan(algorithm, call, kGeometry, rank), rank));
    }
  }
};

struct Ended {};  // what ends the victim's thread

struct Trial {
  const Case& c;
  int victim, at;  // the victim ends at its so many-th step of the second call
  std::vector<std::shared_ptr<transport::Node>> nodes;
  std::map<int, int64_t> offsets = {};
  std::atomic<double> ended_at{0};
  std::atomic<int> steps{0}, lost{0}, completed{0}, through{0};

  Trial(const Case& which, int who, int when)
      : c(which),
        victim(who),
        at(when),
        nodes(transport::Node::local(which.size(), {which.nodes, which.delays})) {
    for (int rank = 0; rank < c.size(); ++rank) {
      const auto local = static_cast<int>(std::count(c.nodes.begin(), c.nodes.end(), c.nodes[rank]));
      if (!offsets.contains(c.nodes[rank])) {
        offsets[c.nodes[rank]] = nodes[rank]->reserve(Domain::bytes(local, c.size(), kBank));
      }
    }
  }

  void call(Domain& domain, Sequence& calls, std::vector<float>& data, int number) {
    std::fill(data.begin(), data.end(), static_cast<float>((domain.rank() + 1) * number));
    const Prepared& prepared = *c.plans[domain.rank()];
    char* const bytes = reinterpret_cast<char*>(data.data());
    calls.start(prepared, {bytes, bytes}, prepared.record);
    Patience patience;
    Pending pending = calls.pending(30);
    Pending* const one = &pending;
    const bool dies = domain.rank() == victim && number == 2;
    bool again = false;
    int step = 0;
    const auto observe = [&](int) {
      if (std::exchange(again, false)) return;  // a step that was blocked is announced again
      if (dies && step++ == at) throw Ended();
    };
    while (!calls.run().advance(1, observe)) {
      again = domain.board().self().entered.load() == static_cast<uint64_t>(number);
      wait({&one, 1}, {.spin_us = 0, .yield = true}, patience);
    }
    if (dies) steps = step;
    calls.finish();
  }

  bool right(const std::vector<float>& data, int number) const {
    const auto sum = static_cast<float>(number * c.size() * (c.size() + 1) / 2);
    return std::ranges::all_of(data, [&](float x) { return x == sum; });
  }

  void play(int rank) {
    std::vector<int> ranks(c.size());
    std::iota(ranks.begin(), ranks.end(), 0);
    auto domain = std::make_unique<Domain>(nodes[rank], ranks, rank, offsets[c.nodes[rank]], kBank);
    Sequence calls(*domain);
    std::vector<float> data(static_cast<size_t>(c.count));
    const std::string who = c.algorithm + ": rank " + std::to_string(rank) + ", rank " +
                            std::to_string(victim) + " ends at step " + std::to_string(at) + ": ";
    int number = 1;
    try {
      for (; number <= 2; ++number) {
        call(*domain, calls, data, number);
        if (!right(data, number)) check::fail("call", number, who + "wrong result");
      }
      ++through;
      while (at >= 0 && through < c.size() - 1) std::this_thread::yield();
      if (at >= 0) call(*domain, calls, data, 3);
      if (at >= 0) check::fail("call", 3, who + "succeeded");
    } catch (const Ended&) {
      domain.reset();
      ended_at = now_s();
      nodes[rank]->mark_dead(rank);
    } catch (const PeerLostError& error) {
      if (number <= 2) ++through;
      ++(number <= 2 ? lost : completed);
      const std::string name = "rank " + std::to_string(victim) + " ";
      if (std::string(error.what()).rfind(name, 0) != 0) check::fail("call", number, who + error.what());
      if (now_s() - ended_at > kDeadline) check::fail("call", number, who + "learned of it late");
    } catch (const std::exception& error) {
      check::fail("call", number, who + error.what());
    }
    // Nobody takes its ends with it but the victim.
    ++left;
    while (left < c.size()) std::this_thread::yield();
  }
  std::atomic<int> left{0};

  void run() {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < c.size(); ++rank) threads.emplace_back([this, rank] { play(rank); });
    for (std::thread& thread : threads) thread.join();
  }
};

}  // namespace

TEST(a_rank_that_ends_between_nodes_is_named) {
  transport::register_for_fences();
  std::vector<Case> cases;
  for (const auto& nodes : {std::vector{0, 0, 1, 1}, {0, 1, 2}, {0, 1, 0}}) {
    for (const std::string algorithm : {"hierarchical", "ring", "two_shot", "tree"}) {
      for (const std::optional<uint64_t> delays : {std::optional<uint64_t>(), std::optional<uint64_t>(5)}) {
        cases.push_back({algorithm, nodes, 3000, delays});
      }
    }
  }
  int runs = 0, lost = 0, completed = 0;
  for (Case& c : cases) {
    c.prepare();
    for (int victim = 0; victim < c.size(); ++victim) {
      Trial dry(c, victim, -1);
      dry.run();
      CHECK(dry.steps > 3);
      for (int at = (runs % 3); at < dry.steps; at += 3) {  // every third, of each case others
        Trial once(c, victim, at);
        once.run();
        ++runs;
        lost += once.lost;
        completed += once.completed;
        CHECK_EQ(once.lost + once.completed, c.size() - 1);
      }
    }
  }
  std::cout << runs << " deaths; " << lost << " survivors lost the call, " << completed << " completed it\n";
  CHECK(lost > 0 && completed > 0);
}

namespace {
const transport::Node::MadeUp kTwoNodes{.nodes = {0, 1, 0, 1}, .delays = std::nullopt};
}

TEST(what_was_sent_is_received_though_its_sender_closes) {
  run_threads(2,
              [](Communicator& comm) {
                std::vector<int64_t> data(20000, comm.rank() + 1);
                if (comm.rank() == 1) sleep_ms(100);
                pass(comm, 0, 1, data);
                CHECK_EQ(data.front(), 1);
                CHECK_EQ(data.back(), 1);
                comm.close();
              },
              20, {.nodes = {0, 1}, .delays = std::nullopt});
}

TEST(a_sender_that_closes_waits_no_longer_than_its_timeout) {
  run_threads(2,
              [](Communicator& comm) {
                std::vector<int64_t> data(10, 1);
                if (comm.rank() == 0) pass(comm, 0, 1, data);
                if (comm.rank() == 0) {
                  CHECK_THROWS(CommTimeoutError, comm.close());
                  return;
                }
                sleep_ms(600);
                CHECK_THROWS(CommError, pass(comm, 0, 1, data));
              },
              0.2, {.nodes = {0, 1}, .delays = std::nullopt});
}

TEST(groups_split_across_nodes) {
  run_threads(
      4,
      [](Communicator& comm) {
        Patience patience;
        // Within a node, across nodes, and all in another order.
        for (const auto& [color, key, size] :
             {std::tuple{comm.rank() % 2, 0, 2}, {comm.rank() / 2, 0, 2}, {0, -comm.rank(), 4}}) {
          const auto group = comm.split(color, key, patience);
          CHECK_EQ(group->size(), size);
          std::vector<int64_t> data(3000, group->rank() + 1);
          all_reduce(*group, data);
          CHECK_EQ(data.back(), total(size));
          std::vector<int64_t> word(10, comm.rank());
          if (group->rank() < 2) pass(*group, 1, 0, word);
          group->close();
        }
        CHECK(comm.split(-1, 0, patience) == nullptr);
      },
      20, kTwoNodes);
}

TEST(survivors_on_several_nodes_go_on) {
  run_threads(
      4,
      [](Communicator& comm) {
        if (comm.rank() == 1) return comm.abandon();
        std::vector<int64_t> data(3000, 1);
        try {
          all_reduce(comm, data);
          check::fail("rank", comm.rank(), "a call without rank 1 succeeded");
        } catch (const CommError& error) {
          CHECK(std::string(error.what()).find("rank 1 ") != std::string::npos ||
                std::string(error.what()).find("shrink()") != std::string::npos);
        }
        Patience patience;
        const auto rest = comm.shrink(patience);
        CHECK_EQ(rest->size(), 3);
        std::fill(data.begin(), data.end(), rest->rank() + 1);
        all_reduce(*rest, data);
        CHECK_EQ(data.back(), total(3));
      },
      20, kTwoNodes);
}

TEST(symmetric_memory_is_at_one_place_for_a_node) {
  run_threads(
      4,
      [](Communicator& comm) {
        Patience patience;
        for (const int64_t count : {int64_t{1000}, int64_t{300000}}) {
          const auto a = comm.allocate(count * 8, patience), b = comm.allocate(count * 8, patience);
          auto *in = reinterpret_cast<int64_t*>(a->data()), *out = reinterpret_cast<int64_t*>(b->data());
          for (const Collective kind : {Collective::all_reduce, Collective::broadcast}) {
            std::fill(in, in + count, comm.rank() + 1);
            comm.execute(request(comm, kind, count, in, out), patience);
            const int64_t expected = kind == Collective::broadcast ? 1 : total(4);
            CHECK_EQ(out[0], expected);
            CHECK_EQ(out[count - 1], expected);
            comm.execute(request(comm, kind, count, in, in), patience);
            CHECK_EQ(in[count - 1], expected);
          }
        }
      },
      20, kTwoNodes);
}

// A message lies in its sender's memory: when its call fails it is taken back, before the caller may free or
// reuse that memory. (AddressSanitizer sees who reads it all the same.)
TEST(a_call_that_was_given_up_delivers_nothing) {
  for (const Collective kind : {Collective::broadcast, Collective::all_reduce}) {
    run_threads(2,
                [kind](Communicator& comm) {
                  Patience patience;
                  const int64_t count = kind == Collective::broadcast ? 100 : 30000;
                  auto memory = comm.allocate(count * 8, patience);
                  auto* data = reinterpret_cast<int64_t*>(memory->data());
                  std::fill(data, data + count, 5);
                  Request call = request(comm, kind, count, data, data);
                  if (comm.rank() == 0) {
                    call.timeout_s = 0.1;
                    CHECK_THROWS(CommTimeoutError, [&] {
                      comm.execute(call, patience);
                      all_reduce(comm, *std::make_unique<std::vector<int64_t>>(
                                           10, 1));  // a broadcast's root leaves it
                    }());
                    std::fill(data, data + count, -1);
                    memory.reset();
                    sleep_ms(900);
                  } else {
                    sleep_ms(600);
                    CHECK_THROWS(CommError, comm.execute(call, patience));
                  }
                },
                0.3, {.nodes = {0, 1}, .delays = std::nullopt});
  }
}

TEST(the_rank_that_is_waited_for_is_named_between_nodes) {
  for (const auto& nodes : {std::vector{0, 1, 2}, {0, 0, 1}}) {
    run_threads(3,
                [](Communicator& comm) {
                  Patience patience;
                  std::vector<int64_t> in(10, comm.rank()), out(30);
                  Request call = request(comm, Collective::gather, 10, in.data(), out.data());
                  call.call.world.root = 2;
                  if (comm.rank() == 1) {
                    sleep_ms(900);  // late
                    return;
                  }
                  if (comm.rank() == 0) {
                    comm.execute(call, patience);  // has done its part, and waits for nothing
                    sleep_ms(900);
                    return;
                  }
                  try {
                    comm.execute(call, patience);
                    check::fail("rank", 2, "a gather without rank 1 succeeded");
                  } catch (const CommTimeoutError& error) {
                    const std::string text = error.what();
                    if (text.find("for rank 1, which has not called it") == std::string::npos)
                      check::fail("rank", 2, text);
                  }
                },
                0.3, {.nodes = nodes, .delays = std::nullopt});
  }
}

TEST(a_group_shrinks_once) {
  run_threads(2, [](Communicator& comm) {
    Patience patience;
    const auto group = comm.shrink(patience);
    CHECK_EQ(group->size(), 2);
    CHECK_THROWS(CommError, comm.shrink(patience));
    std::vector<int64_t> data(10, group->rank() + 1);
    all_reduce(*group, data);
    CHECK_EQ(data[9], total(2));
  });
}
