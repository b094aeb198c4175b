// What a group can do, by rank threads: queues, pairs, splits, symmetric memory, plans kept, algorithms of
// one's own.
#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <latch>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "rank_threads.h"
#include "runtime/communicator.h"
#include "schedule/layout.h"

using namespace pycomm;
using namespace pycomm::runtime;

namespace {

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

Request request(Communicator& comm, Collective kind, int64_t count, const int64_t* in, int64_t* out) {
  Request request;
  request.call.world = {.collective = kind, .size = comm.size()};
  request.call.dtype = DType::int64;
  request.call.counts = schedule::uniform_counts(request.call.world, count);
  request.call.in_place = in == out;
  request.in = in;
  request.out = out;
  return request;
}

void all_reduce(Communicator& comm, std::vector<int64_t>& data) {
  Patience patience;
  comm.execute(
      request(comm, Collective::all_reduce, static_cast<int64_t>(data.size()), data.data(), data.data()),
      patience);
}

void pass(Communicator& comm, int src, int dst, std::vector<int64_t>& data, const std::string& tag = "",
          double timeout_s = -1) {
  Patience patience;
  Request r =
      request(comm, Collective::send_recv, static_cast<int64_t>(data.size()), data.data(), data.data());
  r.call.in_place = false;
  r.call.world.root = src;
  r.call.world.peer = dst;
  r.tag = tag;
  r.timeout_s = timeout_s;
  comm.execute(r, patience);
}

// The sum over the group of (rank + 1).
int64_t total(int size) { return int64_t{size} * (size + 1) / 2; }

}  // namespace

// ---- asynchronous calls ----

// Each call doubles what the one before left: any other order gives another number.
TEST(queued_calls_run_in_order) {
  for (const int size : {1, 2, 3}) {
    run_threads(size, [](Communicator& comm) {
      Patience patience;
      const int n = comm.size();
      std::vector<int64_t> data(1000, comm.rank() + 1);
      std::vector<std::shared_ptr<Work>> works;
      for (int i = 0; i < 20; ++i) {
        works.push_back(
            comm.submit(comm.bind(request(comm, Collective::all_reduce, 1000, data.data(), data.data()))));
      }
      all_reduce(comm, data);  // a synchronous call stands behind what is queued
      for (const auto& work : works) CHECK(work->is_completed());
      int64_t want = total(n);
      for (int i = 0; i < 20; ++i) want *= n;
      CHECK_EQ(data[0], want);
      CHECK_EQ(data[999], want);
      for (auto work = works.rbegin(); work != works.rend(); ++work) (*work)->wait(INFINITY, patience);
    });
  }
}

TEST(last_work_waited_for_first) {
  run_threads(3, [](Communicator& comm) {
    Patience patience;
    std::vector<std::vector<int64_t>> data(10, std::vector<int64_t>(50000, comm.rank() + 1));
    std::vector<std::shared_ptr<Work>> works;
    for (auto& d : data) {
      works.push_back(
          comm.submit(comm.bind(request(comm, Collective::all_reduce, 50000, d.data(), d.data()))));
    }
    works.back()->wait(INFINITY, patience);
    for (size_t i = 0; i < works.size(); ++i) {
      CHECK(works[i]->is_completed());
      CHECK(works[i]->exception() == nullptr);
      CHECK_EQ(data[i][49999], total(3));
    }
  });
}

// Nobody waits: the progress thread does it.
TEST(queued_calls_need_no_waiter) {
  run_threads(2, [](Communicator& comm) {
    std::vector<int64_t> data(10, comm.rank() + 1);
    const auto work =
        comm.submit(comm.bind(request(comm, Collective::all_reduce, 10, data.data(), data.data())));
    for (int i = 0; i < 5000 && !work->is_completed(); ++i) sleep_ms(1);
    CHECK(work->is_completed());
    CHECK_EQ(data[5], total(2));
  });
}

TEST(wait_with_a_timeout_leaves_the_call_going) {
  run_threads(2, [](Communicator& comm) {
    Patience patience;
    std::vector<int64_t> data(10, comm.rank() + 1);
    if (comm.rank() == 1) sleep_ms(300);
    const auto work =
        comm.submit(comm.bind(request(comm, Collective::all_reduce, 10, data.data(), data.data())));
    if (comm.rank() == 0) CHECK_THROWS(CommTimeoutError, work->wait(0.05, patience));
    work->wait(10, patience);
    CHECK_EQ(data[5], total(2));
    all_reduce(comm, data);
  });
}

TEST(closing_completes_what_is_queued) {
  run_threads(2, [](Communicator& comm) {
    std::vector<int64_t> data(1000, comm.rank() + 1);
    std::shared_ptr<Work> work;
    for (int i = 0; i < 5; ++i) {
      work = comm.submit(comm.bind(request(comm, Collective::all_reduce, 1000, data.data(), data.data())));
    }
    comm.close();
    CHECK(work->is_completed());
    CHECK(work->exception() == nullptr);
    CHECK_EQ(data[7], total(2) * 16);
    CHECK_THROWS(AbortedError, all_reduce(comm, data));
  });
}

// `then` has run, and the caller's buffers are let go, by the time that the call counts as completed.
TEST(completion_comes_last) {
  run_threads(2, [](Communicator& comm) {
    Patience patience;
    std::vector<int64_t> data(10, 1);
    const auto owner = std::make_shared<int>(1);
    std::atomic<bool> then{false};
    Bound bound = comm.bind(request(comm, Collective::all_reduce, 10, data.data(), data.data()));
    bound.then = [&] { then = true; };
    bound.keeps_alive = owner;
    const auto work = comm.submit(std::move(bound));
    work->wait(INFINITY, patience);
    CHECK(then.load());
    CHECK_EQ(owner.use_count(), 1);
  });
}

// Threads of one rank share its communicator; calls of one kind and size, since their order is nobody's
// promise.
TEST(several_threads_share_a_rank) {
  run_threads(2, [](Communicator& comm) {
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&] {
        for (int i = 0; i < 50; ++i) {
          std::vector<int64_t> data(100, comm.rank() + 1);
          all_reduce(comm, data);
          CHECK_EQ(data[99], total(2));
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  });
}

// ---- pairs ----

TEST(messages_arrive_in_order) {
  run_threads(3, [](Communicator& comm) {
    for (const int64_t count : {1, 1000, 300000}) {
      for (int i = 0; i < 5; ++i) {
        std::vector<int64_t> data(count);
        if (comm.rank() == 0) std::iota(data.begin(), data.end(), i);
        if (comm.rank() < 2) pass(comm, 0, 1, data);
        if (comm.rank() > 0) pass(comm, 1, 2, data);
        CHECK_EQ(data[0], i);
        CHECK_EQ(data[count - 1], i + count - 1);
      }
    }
    std::vector<int64_t> data(10, comm.rank() + 1);
    all_reduce(comm, data);  // the group's own calls are not disturbed
    CHECK_EQ(data[9], total(3));
  });
}

// Threads of each rank, with collectives, blocking messages and queued ones: each of these blocks now and
// then for something that another thread's call must bring first.
TEST(sequences_run_beside_each_other) {
  run_threads(3, [](Communicator& comm) {
    const int n = comm.size(), next = (comm.rank() + 1) % n, before = (comm.rank() + n - 1) % n;
    constexpr int kRounds = 12;
    const auto count_of = [](int i) { return int64_t{i % 3 == 0 ? 70000 : 10 + i}; };
    std::thread collectives([&] {
      for (int i = 0; i < 8 * kRounds; ++i) {
        std::vector<int64_t> data(i % 5 == 0 ? 90000 : 100, comm.rank() + 1);
        all_reduce(comm, data);
        CHECK_EQ(data.back(), total(n));
      }
    });
    std::thread ring([&] {  // a token that goes round: to receive comes first on all ranks but one
      for (int i = 0; i < kRounds; ++i) {
        std::vector<int64_t> token(count_of(i), 0);
        if (comm.rank() != 0) pass(comm, before, comm.rank(), token);
        for (int64_t& t : token) ++t;
        pass(comm, comm.rank(), next, token);
        if (comm.rank() == 0) {
          pass(comm, before, comm.rank(), token);
          CHECK_EQ(token.back(), n);
        }
      }
    });
    Patience patience;
    for (int i = 0; i < kRounds; ++i) {  // backwards, all at once
      std::vector<int64_t> out(count_of(i + 1), comm.rank() * 100 + i), in(out.size());
      const auto submit = [&](int src, int dst, std::vector<int64_t>& data) {
        Request r =
            request(comm, Collective::send_recv, static_cast<int64_t>(data.size()), data.data(), data.data());
        r.call.world.root = src;
        r.call.world.peer = dst;
        return comm.submit(comm.bind(r));
      };
      const auto received = submit(next, comm.rank(), in), sent = submit(comm.rank(), before, out);
      received->wait(INFINITY, patience);
      sent->wait(INFINITY, patience);
      CHECK_EQ(in.back(), next * 100 + i);
    }
    collectives.join();
    ring.join();
  });
}

// A rank that is no part of a pair never hears of it.
// Around a ring, while another thread of each rank reduces: an exchange that began alone joins the queue.
TEST(exchanges_beside_other_threads) {
  run_threads(3, [](Communicator& comm) {
    const int n = comm.size(), me = comm.rank(), next = (me + 1) % n, before = (me + n - 1) % n;
    std::thread other([&] {
      for (int i = 0; i < 50; ++i) {
        std::vector<int64_t> data(10, me + 1);
        all_reduce(comm, data);
        CHECK(data[9] == total(n));
      }
    });
    for (const int64_t count : {1, 1000, 200000}) {
      for (int i = 0; i < 20; ++i) {
        std::vector<int64_t> out(count, 100 * me + i), in(count, -1);
        const auto message = [&](int src, int dst, std::vector<int64_t>& data) {
          Request r = request(comm, Collective::send_recv, count, data.data(), data.data());
          r.call.in_place = false;
          r.call.world.root = src;
          r.call.world.peer = dst;
          return comm.bind(r);
        };
        Patience patience;
        comm.run_both(message(me, next, out), message(before, me, in), patience);
        CHECK(in.front() == 100 * before + i && in.back() == in.front());
      }
    }
    other.join();
  });
}

TEST(pairs_run_beside_the_rest) {
  run_threads(4, [](Communicator& comm) {
    const int peer = comm.rank() ^ 1;
    for (int i = 0; i < 30; ++i) {
      std::vector<int64_t> out(500, comm.rank() * 100 + i), in(500);
      if (comm.rank() < peer) {
        pass(comm, comm.rank(), peer, out, "a");
        pass(comm, peer, comm.rank(), in, "b");
      } else {
        pass(comm, peer, comm.rank(), in, "a");
        pass(comm, comm.rank(), peer, out, "b");
      }
      CHECK_EQ(in[499], peer * 100 + i);
    }
  });
}

TEST(messages_of_different_sizes_do_not_match) {
  run_threads(3, [](Communicator& comm) {
    if (comm.rank() == 2) return;
    std::vector<int64_t> data(comm.rank() == 0 ? 100 : 101);
    try {
      pass(comm, 0, 1, data);
      pass(comm, 0, 1, data);
      check::fail(__FILE__, __LINE__, "different sizes pass");
    } catch (const MismatchError& error) {
      const std::string text = error.what();
      CHECK(text.find("count=100,") != std::string::npos);
      CHECK(text.find("count=101,") != std::string::npos);
      CHECK(text.find("rank 0") != std::string::npos);
      CHECK(text.find("rank 1") != std::string::npos);
    }
  });
}

TEST(messages_of_different_tags_do_not_match) {
  run_threads(2, [](Communicator& comm) {
    std::vector<int64_t> data(10);
    CHECK_THROWS(MismatchError,
                 (pass(comm, 0, 1, data, comm.rank() ? "weights" : "bias"), pass(comm, 0, 1, data)));
  });
}

TEST(pairs_of_a_split_group_are_named_in_it) {
  run_threads(4, [](Communicator& comm) {
    Patience patience;
    const auto half = comm.split(comm.rank() / 2, 0, patience);
    std::vector<int64_t> data(10, comm.rank());
    pass(*half, 1, 0, data);
    CHECK_EQ(data[3], comm.rank() / 2 * 2 + 1);
    if (half->rank() == 1) {
      sleep_ms(100);
      half->close();
      return;
    }
    try {
      pass(*half, 1, 0, data);
      check::fail(__FILE__, __LINE__, "a message from a closed rank");
    } catch (const PeerLostError& error) {
      CHECK(std::string(error.what()).find("rank 1") == 0);
    }
  });
}

// ---- split ----

TEST(split_orders_by_key_and_rank) {
  run_threads(5, [](Communicator& comm) {
    Patience patience;
    const int rank = comm.rank();
    // Colors: 0 for even ranks in reverse, 1 for odd ones by rank; rank 4 stays out.
    const auto part = comm.split(rank == 4 ? -1 : rank % 2, rank % 2 ? 7 : -rank, patience);
    if (rank == 4) {
      CHECK(part == nullptr);
    } else {
      CHECK_EQ(part->size(), 2);
      CHECK_EQ(part->rank(), rank % 2 ? rank / 2 : 1 - rank / 2);
      std::vector<int64_t> data(100, rank + 1);
      all_reduce(*part, data);
      CHECK_EQ(data[50], rank % 2 ? 2 + 4 : 1 + 3);
    }
    std::vector<int64_t> data(10, rank + 1);
    all_reduce(comm, data);
    CHECK_EQ(data[0], total(5));
  });
}

TEST(split_groups_run_side_by_side) {
  run_threads(4, [](Communicator& comm) {
    Patience patience;
    const auto row = comm.split(comm.rank() / 2, 0, patience);
    const auto column = comm.split(comm.rank() % 2, 0, patience);
    const auto whole = comm.split(0, -comm.rank(), patience);
    CHECK_EQ(whole->rank(), 3 - comm.rank());
    for (int i = 0; i < 100; ++i) {
      // One row makes many more calls than the other.
      for (int k = 0; k < (comm.rank() < 2 ? 5 : 1); ++k) {
        std::vector<int64_t> data(300, comm.rank() + 1);
        all_reduce(*row, data);
        CHECK_EQ(data[299], comm.rank() < 2 ? 1 + 2 : 3 + 4);
      }
      std::vector<int64_t> data(300, comm.rank() + 1);
      const auto work = column->submit(
          column->bind(request(*column, Collective::all_reduce, 300, data.data(), data.data())));
      std::vector<int64_t> other(30, comm.rank() + 1);
      all_reduce(*whole, other);
      work->wait(INFINITY, patience);
      CHECK_EQ(other[29], total(4));
      CHECK_EQ(data[299], comm.rank() % 2 ? 2 + 4 : 1 + 3);
    }
  });
}

TEST(failure_of_a_split_group_is_its_own) {
  run_threads(4, [](Communicator& comm) {
    Patience patience;
    const auto half = comm.split(comm.rank() / 2, 0, patience);
    std::vector<int64_t> data(comm.rank() == 1 ? 11 : 10, comm.rank() + 1);
    if (comm.rank() < 2) {
      CHECK_THROWS(MismatchError, all_reduce(*half, data));
      CHECK_THROWS(AbortedError, all_reduce(*half, data));
    } else {
      all_reduce(*half, data);
      CHECK_EQ(data[0], 3 + 4);
    }
    std::vector<int64_t> rest(10, comm.rank() + 1);
    all_reduce(comm, rest);
    CHECK_EQ(rest[0], total(4));
  });
}

TEST(shrink_leaves_the_survivors) {
  std::latch through(4);  // a call that is still under way elsewhere would fail as well
  run_threads(4, [&](Communicator& comm) {
    Patience patience;
    std::vector<int64_t> data(10, comm.rank() + 1);
    all_reduce(comm, data);
    through.arrive_and_wait();
    if (comm.rank() == 1) return comm.abandon();
    CHECK_THROWS(PeerLostError, all_reduce(comm, data));
    const auto rest = comm.shrink(patience);
    CHECK_EQ(rest->size(), 3);
    CHECK_EQ(rest->rank(), comm.rank() == 0 ? 0 : comm.rank() - 1);
    data.assign(10, comm.rank() + 1);
    all_reduce(*rest, data);
    CHECK_EQ(data[0], 1 + 3 + 4);
    CHECK_THROWS(AbortedError, all_reduce(comm, data));
  });
}

// ---- single copy ----

namespace {

// In small pages, or in huge ones where the system has them.
std::shared_ptr<int64_t> pages(int64_t count, bool huge) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(int64_t);
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  madvise(data, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  std::memset(data, 0, bytes);
  return {static_cast<int64_t*>(data), [bytes](int64_t* p) { munmap(p, bytes); }};
}

}  // namespace

// All ranks choose alike: if one's input is not fit, none is read where it lies.
TEST(large_inputs_are_read_where_they_lie_if_all_are_fit) {
  constexpr int64_t kCount = 1 << 20;
  for (const int unfit : {-1, 0, 1}) {
    run_threads(2, [&](Communicator& comm) {
      Patience patience;
      for (const bool in_place : {false, true}) {
        const auto out = pages(2 * kCount, comm.rank() != unfit), apart = pages(kCount, comm.rank() != unfit);
        int64_t* in = in_place ? out.get() + comm.rank() * kCount : apart.get();
        Request r = request(comm, Collective::all_gather, kCount, in, out.get());
        r.call.in_place = in_place;
        const Bound bound = comm.bind(r);
        CHECK(bound.record.in == schedule::Placement::plain);
        CHECK(bound.agreement != nullptr);
        for (int i = 0; i < 3; ++i) {
          std::iota(in, in + kCount, comm.rank() * 1000 + i);
          comm.run(bound, patience);
          if (!in_place) std::fill(in, in + kCount, -1);
          for (int64_t rank = 0; rank < 2; ++rank) {
            CHECK_EQ(out.get()[rank * kCount], rank * 1000 + i);
            CHECK_EQ(out.get()[rank * kCount + kCount - 1], rank * 1000 + i + kCount - 1);
          }
          const auto placement = unfit < 0 && bound.agreement->all == std::vector<int64_t>{1, 1}
                                     ? schedule::Placement::reachable
                                     : schedule::Placement::plain;
          CHECK(bound.agreement->conclude(bound).record.in == placement);
          if (unfit >= 0) CHECK_EQ(bound.agreement->all[unfit], 0);
        }
      }
      // Small ones, and what one rank shows to all, are not asked about.
      std::vector<int64_t> data(2 * kCount);
      CHECK(comm.bind(request(comm, Collective::all_gather, 1000, data.data(), data.data() + kCount))
                .agreement == nullptr);
      CHECK(comm.bind(request(comm, Collective::broadcast, kCount, data.data(), data.data())).agreement ==
            nullptr);
    });
  }
}

TEST(groups_inherit_whether_inputs_can_be_read) {
  run_threads(3, [](Communicator& comm) {
    Patience patience;
    const auto half = comm.split(comm.rank() < 2 ? 0 : 1, 0, patience);
    if (comm.rank() == 2) return;
    const auto out = pages(2 << 20, true), in = pages(1 << 20, true);
    std::fill(in.get(), in.get() + (1 << 20), comm.rank() + 1);
    const Bound bound = half->bind(request(*half, Collective::all_gather, 1 << 20, in.get(), out.get()));
    CHECK(bound.agreement != nullptr);
    half->run(bound, patience);
    CHECK_EQ(out.get()[(1 << 20) - 1], 1);
    CHECK_EQ(out.get()[1 << 20], 2);
  });
}

// ---- symmetric memory ----

TEST(symmetric_buffers_are_used_in_place) {
  run_threads(3, [](Communicator& comm) {
    Patience patience;
    constexpr int64_t kCount = 200000;
    const auto memory = comm.allocate(kCount * 8, patience);
    auto* data = reinterpret_cast<int64_t*>(memory->data());
    const Request r = request(comm, Collective::all_reduce, kCount, data, data);
    for (int i = 0; i < 3; ++i) {
      std::fill(data, data + kCount, comm.rank() + 1);
      const Bound bound = comm.bind(r);
      CHECK(bound.record.in == schedule::Placement::symmetric);
      CHECK(bound.prepared->plan.bank_bytes == 0);  // nothing is staged
      comm.run(bound, patience);
      CHECK_EQ(data[0], total(3));
      CHECK_EQ(data[kCount - 1], total(3));
      std::vector<int64_t> meet(1);
      all_reduce(comm, meet);  // the buffers are refilled: nobody may still read
    }
  });
}

TEST(symmetric_buffers_at_different_places_do_not_match) {
  run_threads(2, [](Communicator& comm) {
    Patience patience;
    const auto memory = comm.allocate(4096, patience);
    auto* data = reinterpret_cast<int64_t*>(memory->data()) + comm.rank();
    CHECK_THROWS(MismatchError, comm.execute(request(comm, Collective::all_reduce, 8, data, data), patience));
  });
}

TEST(own_slot_of_a_symmetric_buffer_is_in_place) {
  for (const int size : {2, 3}) {
    run_threads(size, [](Communicator& comm) {
      Patience patience;
      constexpr int64_t kCount = 1000;
      const int n = comm.size(), me = comm.rank();
      const auto memory = comm.allocate(n * kCount * 8, patience);
      auto* whole = reinterpret_cast<int64_t*>(memory->data());
      int64_t* own = whole + me * kCount;
      std::vector<int64_t> meet(1);
      for (const Collective kind : {Collective::all_gather, Collective::gather}) {
        all_reduce(comm, meet);
        std::fill(whole, whole + n * kCount, -1);
        std::fill(own, own + kCount, me + 1);
        Request r = request(comm, kind, kCount, own, whole);
        r.call.in_place = kind == Collective::all_gather || me == 0;
        comm.execute(r, patience);
        for (int p = 0; p < n; ++p) {
          if (kind == Collective::all_gather || me == 0) CHECK_EQ(whole[p * kCount + 999], p + 1);
        }
      }
      for (const Collective kind : {Collective::reduce_scatter, Collective::scatter}) {
        all_reduce(comm, meet);
        for (int64_t i = 0; i < n * kCount; ++i) whole[i] = i / kCount + 1;
        Request r = request(comm, kind, kCount, whole, own);
        r.call.in_place = kind == Collective::reduce_scatter || me == 0;
        comm.execute(r, patience);
        CHECK_EQ(own[0], (me + 1) * (kind == Collective::scatter ? 1 : n));
        CHECK_EQ(own[kCount - 1], (me + 1) * (kind == Collective::scatter ? 1 : n));
      }
    });
  }
}

TEST(allocations_have_one_size) {
  run_threads(3, [](Communicator& comm) {
    Patience patience;
    CHECK_THROWS(ValueError, comm.allocate(comm.rank() == 2 ? 100 : 200, patience));
    CHECK_THROWS(OutOfMemoryError, comm.allocate(int64_t{1} << 50, patience));
    const auto memory = comm.allocate(100, patience);  // the group goes on
    CHECK_EQ(memory->bytes(), 100);
  });
}

// ---- plans ----

TEST(plans_are_kept) {
  run_threads(2, [](Communicator& comm) {
    std::vector<int64_t> a(100), b(100);
    const auto plan = [&](int64_t count, int64_t* in, int64_t* out, const std::string& algorithm = "") {
      Request r = request(comm, Collective::all_reduce, count, in, out);
      r.algorithm = algorithm;
      return comm.bind(r).prepared;
    };
    const auto first = plan(100, a.data(), a.data());
    CHECK(first == plan(100, b.data(), b.data()));  // buffers are no part of a plan
    CHECK(first != plan(99, a.data(), a.data()));
    CHECK(first != plan(100, a.data(), b.data()));
    CHECK(first != plan(100, a.data(), a.data(), "ring"));
    for (int64_t count = 1; count < 99; ++count) plan(count, a.data(), a.data());
    CHECK(first == plan(100, a.data(), a.data()));
  });
}

TEST(explain_tells_what_would_run) {
  run_threads(2, [](Communicator& comm) {
    std::vector<int64_t> a(100);
    Request r = request(comm, Collective::all_reduce, 100, a.data(), a.data());
    r.algorithm = "ring";
    const std::string text = comm.explain(r);
    CHECK(text.find("algorithm  ring") != std::string::npos);
    CHECK(text.find("combine") != std::string::npos);
  });
}

// ---- algorithms of one's own ----

namespace {

// Everybody shows a copy of its input to everybody and sums up what it sees; `forgets` leaves out the last
// rank's.
schedule::Schedule everybody_reads(const schedule::World& world, bool forgets) {
  schedule::Schedule schedule;
  schedule.ranks.resize(world.size);
  const int last = forgets ? world.size - 1 : world.size;
  for (int rank = 0; rank < world.size; ++rank) {
    schedule::Builder b(schedule, rank);
    std::vector<int> peers;
    for (int peer = 0; peer < world.size; ++peer) {
      if (peer != rank && rank < last) peers.push_back(peer);
    }
    if (!peers.empty()) b.copy(b.image(), b.in());
    for (const int peer : peers) b.offer(peer, b.image());
    std::vector<schedule::Ref> seen;
    for (int r = 0; r < last; ++r) seen.push_back(r == rank ? b.in() : schedule::Builder::image_of(r));
    b.combine({b.out()}, seen, true);
    for (const int peer : peers) b.accept(peer, b.image());
  }
  return schedule;
}

}  // namespace

TEST(own_algorithm_runs) {
  for (const int size : {1, 2, 3}) {
    run_threads(size, [](Communicator& comm) {
      Patience patience;
      comm.add_algorithm(Collective::all_reduce, "everybody_reads",
                         [](const schedule::World& world) { return everybody_reads(world, false); });
      std::vector<int64_t> data(100000, comm.rank() + 1);
      Request r = request(comm, Collective::all_reduce, 100000, data.data(), data.data());
      r.algorithm = "everybody_reads";
      comm.execute(r, patience);
      CHECK_EQ(data[0], total(comm.size()));
      CHECK_EQ(data[99999], total(comm.size()));
    });
  }
}

TEST(wrong_algorithm_never_runs) {
  run_threads(3, [](Communicator& comm) {
    Patience patience;
    comm.add_algorithm(Collective::all_reduce, "forgets",
                       [](const schedule::World& world) { return everybody_reads(world, true); });
    std::vector<int64_t> data(100, comm.rank() + 1);
    Request r = request(comm, Collective::all_reduce, 100, data.data(), data.data());
    r.algorithm = "forgets";
    try {
      comm.execute(r, patience);
      check::fail(__FILE__, __LINE__, "a wrong algorithm has run");
    } catch (const ValueError& error) {
      const std::string text = error.what();
      CHECK(text.find("\"forgets\" is wrong: ") != std::string::npos);
      CHECK(text.find("rank 2") != std::string::npos);  // the counterexample names whose input is missing
    }
    all_reduce(comm, data);  // nothing had moved
    CHECK_EQ(data[99], total(3));
  });
}

TEST(names_of_own_algorithms) {
  run_threads(1, [](Communicator& comm) {
    const auto write = [](const schedule::World& world) { return everybody_reads(world, false); };
    CHECK_THROWS(ValueError, comm.add_algorithm(Collective::all_reduce, "ring", write));
    CHECK_THROWS(ValueError, comm.add_algorithm(Collective::all_reduce, "", write));
    comm.add_algorithm(Collective::all_reduce, "mine", write);
    comm.add_algorithm(Collective::all_reduce, "mine", write);  // the newer one holds
  });
}
