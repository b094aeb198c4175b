// Calls in the queue of a group, and calls that run concurrently.
#include <atomic>
#include <cmath>
#include <latch>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "group_calls.h"

using namespace group_calls;

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

// ---- callbacks ----

TEST(callbacks_run_once_in_order_and_may_call) {
  run_threads(2, [](Communicator& comm) {
    Patience patience;
    for (int i = 0; i < 50; ++i) {
      std::vector<int64_t> a(1000, 1), b(10, 1);
      std::string told;
      std::latch over(1);
      const auto work =
          comm.submit(comm.bind(request(comm, Collective::all_reduce, 1000, a.data(), a.data())));
      work->on_completion([&] { told += std::to_string(a[999]) + " "; });
      work->on_completion([&] {
        all_reduce(comm, b);
        told += std::to_string(b[0]);
        over.count_down();
      });
      if (i % 2 == 0) work->wait(INFINITY, patience);
      over.wait();
      CHECK_EQ(told, "2 2");
      work->on_completion([&] { told = "at once"; });
      CHECK_EQ(told, "at once");
    }
  });
}

TEST(callbacks_of_closed_and_failed_groups_run) {
  std::atomic<int> told{0};
  run_threads(2, [&](Communicator& comm) {
    std::vector<int64_t> data(100000, 1);
    const Request r = request(comm, Collective::all_reduce, 100000, data.data(), data.data());
    comm.submit(comm.bind(r))->on_completion([&] { ++told; });
    comm.close();
  });
  CHECK_EQ(told.load(), 2);
  run_threads(2, [&](Communicator& comm) {
    Patience patience;
    std::vector<int64_t> data(10 + comm.rank());
    const auto size = static_cast<int64_t>(data.size());
    const auto work =
        comm.submit(comm.bind(request(comm, Collective::all_reduce, size, data.data(), data.data())));
    work->on_completion([&] { ++told; });
    CHECK_THROWS(MismatchError, work->wait(INFINITY, patience));
    comm.close();  // what has completed under another thread has been told by then
  });
  CHECK_EQ(told.load(), 4);
}
