// A rank that is late in a call which the others have given up still reads and writes the buffers that it
// knows of: memory that they free meanwhile must go to nobody else.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "group_calls.h"
#include "transport/arena.h"

using namespace group_calls;

namespace {

constexpr int64_t kCount = 100000, kBytes = kCount * 8;

void await(const std::atomic<bool>& word) {
  while (!word) sleep_ms(1);
}

int64_t* take_shared() {
  return static_cast<int64_t*>(transport::Arena::of_process().allocate(kBytes, false));
}
void free_shared(int64_t* data) { transport::Arena::of_process().free(data); }

bool all_are(const int64_t* data, int64_t value) {
  return std::all_of(data, data + kCount, [&](int64_t v) { return v == value; });
}

// Rank 1 stops where it `is_late`, with all that the call told it, until `go_on`.
struct Moments {
  std::atomic<bool> is_late{false}, go_on{false}, all_seen{false};
  void stop() {
    is_late = true;
    await(go_on);
  }
};

}  // namespace

TEST(a_late_peer_writes_into_no_new_shared_array) {
  Moments moments;
  run_threads(2, [&](Communicator& comm) {
    Patience patience;
    int64_t* const data = take_shared();
    Request r = request(comm, Collective::all_reduce, kCount, data, data);
    Bound bound = comm.bind(r);
    for (int i = 0; i < 3; ++i) comm.run(bound, patience);  // ranks tell each other by now
    CHECK(bound.conclude(bound).record.in == schedule::Placement::told);
    std::fill_n(data, kCount, comm.rank() + 1);
    if (comm.rank() == 1) {
      bound.conclude = [&moments, choose = bound.conclude](const BoundPlan& own) -> const BoundPlan& {
        const BoundPlan& plan = choose(own);
        moments.stop();
        return plan;
      };
      CHECK_THROWS(CommTimeoutError, comm.run(bound, patience));
      await(moments.all_seen);
      free_shared(data);
      return;
    }
    bound.timeout_s = 0.5;
    CHECK_THROWS(CommTimeoutError, comm.run(bound, patience));
    CHECK(moments.is_late);
    free_shared(data);
    std::vector<int64_t*> fresh;
    for (int i = 0; i < 4; ++i) {
      fresh.push_back(take_shared());
      CHECK(fresh.back() != data);
      std::fill_n(fresh.back(), kCount, 77);
    }
    moments.go_on = true;
    while (comm.domain().board().member(1).stopped == 0) sleep_ms(1);
    CHECK(std::count(data, data + kCount, 3) > 0);  // it did come
    for (const int64_t* one : fresh) CHECK(all_are(one, 77));
    // Now nobody comes any more: the block is of use again.
    for (int i = 0; i < 4; ++i) fresh.push_back(take_shared());
    CHECK(std::ranges::find(fresh, data) != fresh.end());
    for (int64_t* const one : fresh) free_shared(one);
    moments.all_seen = true;
  });
}

// Symmetric memory stays until all ranks have let go of it, and its place in the file is never another's.
TEST(a_late_peer_writes_into_no_new_symmetric_memory) {
  Moments moments;
  run_threads(2, [&](Communicator& comm) {
    Patience patience;
    auto memory = comm.allocate(kBytes, patience);
    auto* const data = reinterpret_cast<int64_t*>(memory->data());
    Bound bound = comm.bind(request(comm, Collective::all_reduce, kCount, data, data));
    CHECK(bound.record.in == schedule::Placement::symmetric);
    for (int i = 0; i < 3; ++i) comm.run(bound, patience);
    std::fill_n(data, kCount, comm.rank() + 1);
    if (comm.rank() == 1) {
      bound.before = [&moments] { moments.stop(); };
      CHECK_THROWS(CommTimeoutError, comm.run(bound, patience));
      await(moments.all_seen);
      return;
    }
    bound.timeout_s = 0.2;
    await(moments.is_late);
    CHECK_THROWS(CommTimeoutError, comm.run(bound, patience));
    memory.reset();
    transport::Node& node = *comm.domain().group().node;
    std::vector<std::shared_ptr<transport::Mapping>> fresh;
    for (int i = 0; i < 4; ++i) {
      fresh.push_back(node.map(node.reserve(2 * kBytes), 2 * kBytes));
      std::fill_n(reinterpret_cast<int64_t*>(fresh.back()->data()), 2 * kCount, 77);
    }
    moments.go_on = true;
    while (comm.domain().board().member(1).stopped == 0) sleep_ms(1);
    CHECK(std::count(data, data + kCount, 3) > 0);  // rank 1 keeps it mapped
    for (const auto& one : fresh) {
      const auto* const words = reinterpret_cast<const int64_t*>(one->data());
      CHECK(all_are(words, 77) && all_are(words + kCount, 77));
    }
    moments.all_seen = true;
  });
}

// Whoever has given a call up may change its buffers: what late ranks made of them is no result, although
// nobody has to wait for anything.
TEST(a_late_peer_returns_nothing_that_was_read_too_late) {
  for (const bool told : {false, true}) {
    for (const Collective kind : {Collective::all_reduce, Collective::broadcast}) {
      Moments moments;
      run_threads(2, [&](Communicator& comm) {
        Patience patience;
        const auto memory = told ? nullptr : comm.allocate(kBytes, patience);
        int64_t* const data = told ? take_shared() : reinterpret_cast<int64_t*>(memory->data());
        Bound bound = comm.bind(request(comm, kind, kCount, data, data));
        for (int i = 0; i < 3; ++i) comm.run(bound, patience);
        if (comm.rank() == 1) {
          const auto stop = [&moments] { moments.stop(); };
          if (told) {
            bound.conclude = [stop, choose = bound.conclude](const BoundPlan& own) -> const BoundPlan& {
              const BoundPlan& plan = choose(own);
              stop();
              return plan;
            };
          } else {
            bound.before = stop;
          }
          CHECK_THROWS(CommTimeoutError, comm.run(bound, patience));
        } else {
          bound.timeout_s = 0.2;
          if (!told) await(moments.is_late);
          CHECK_THROWS(CommTimeoutError, comm.run(bound, patience));
          CHECK(moments.is_late);
          std::fill_n(data, kCount, 77);
          moments.go_on = true;
        }
        if (told) free_shared(data);
      });
    }
  }
}

// A rank that closes, or whose call was queued, is not waited for.
TEST(whoever_closes_or_fails_in_the_queue_has_stopped) {
  for (const bool queued : {false, true}) {
    run_threads(3, [&](Communicator& comm) {
      Patience patience;
      int64_t* const data = take_shared();
      Bound bound = comm.bind(request(comm, Collective::all_reduce, kCount, data, data));
      for (int i = 0; i < 3; ++i) comm.run(bound, patience);
      std::atomic<uint32_t>& stopped = comm.domain().board().self().stopped;
      if (comm.rank() == 2) {
        comm.close();
      } else if (queued && comm.rank() == 1) {
        // The group may have failed before the call is queued.
        CHECK_THROWS(PeerLostError, comm.submit(bound)->wait(INFINITY, patience));
        while (stopped == 0) sleep_ms(1);
      } else {
        CHECK_THROWS(PeerLostError, comm.run(bound, patience));
        CHECK_EQ(stopped.load(), 1U);
      }
      if (comm.rank() == 2) return free_shared(data);
      for (int r = 0; r < 2; ++r) {
        while (comm.domain().board().member(r).stopped == 0) sleep_ms(1);
      }
      free_shared(data);
      if (comm.rank() == 1) return;
      std::vector<int64_t*> fresh;
      while (fresh.size() < 100 && (fresh.empty() || fresh.back() != data)) fresh.push_back(take_shared());
      CHECK(fresh.back() == data);
      for (int64_t* const one : fresh) free_shared(one);
    });
  }
}
