// How requests are bound: inputs that peers read in place, symmetric memory, explain().
//
// Tests: runtime/agreement.cc.
#include <sys/mman.h>

#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "group_calls.h"
#include "transport/arena.h"

using namespace group_calls;

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
  constexpr int kWords = 3;  // of each rank, of which the first is about its input
  for (const int unfit : {-1, 0, 1}) {
    run_threads(2, [&](Communicator& comm) {
      Patience patience;
      for (const bool in_place : {false, true}) {
        const auto out = pages(2 * kCount, comm.rank() != unfit), apart = pages(kCount, comm.rank() != unfit);
        int64_t* in = in_place ? out.get() + comm.rank() * kCount : apart.get();
        Request r = request(comm, Collective::all_gather, kCount, in, out.get());
        r.call.in_place = in_place;
        Bound bound = comm.bind(r);
        CHECK(bound.record.in == schedule::Placement::plain);
        CHECK_EQ(bound.preludes.size(), 1U);
        for (int i = 0; i < 3; ++i) {
          std::iota(in, in + kCount, comm.rank() * 1000 + i);
          comm.run(bound, patience);
          if (!in_place) std::fill(in, in + kCount, -1);
          for (int64_t rank = 0; rank < 2; ++rank) {
            CHECK_EQ(out.get()[rank * kCount], rank * 1000 + i);
            CHECK_EQ(out.get()[rank * kCount + kCount - 1], rank * 1000 + i + kCount - 1);
          }
          // Whether reading pays depends on how the addresses lie to each other, but an unfit one forbids it.
          const auto said =
              static_cast<const int64_t*>(static_cast<const void*>(bound.preludes[0].plan.bases.out));
          const bool fit = unfit < 0 && said[0] == 1 && said[kWords] == 1;
          const auto placement = fit ? schedule::Placement::reachable : schedule::Placement::plain;
          CHECK(bound.conclude(bound).record.in == placement);
          if (unfit >= 0) CHECK_EQ(said[kWords * unfit], 0);
        }
      }
      // Small ones are not asked about; what one rank shows to all, only where there are shared arrays.
      std::vector<int64_t> data(2 * kCount);
      CHECK(comm.bind(request(comm, Collective::all_gather, 1000, data.data(), data.data() + kCount))
                .preludes.empty());
      const Bound shown = comm.bind(request(comm, Collective::broadcast, kCount, data.data(), data.data()));
      CHECK(shown.preludes.size() == 1 && !shown.preludes[0].wanted(1));
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
    Bound bound = half->bind(request(*half, Collective::all_gather, 1 << 20, in.get(), out.get()));
    CHECK_EQ(bound.preludes.size(), 1U);
    half->run(bound, patience);
    CHECK_EQ(out.get()[(1 << 20) - 1], 1);
    CHECK_EQ(out.get()[1 << 20], 2);
  });
}

TEST(symmetric_buffers_are_used_in_place) {
  run_threads(3, [](Communicator& comm) {
    Patience patience;
    constexpr int64_t kCount = 200000;
    const auto memory = comm.allocate(kCount * 8, patience);
    auto* data = reinterpret_cast<int64_t*>(memory->data());
    const Request r = request(comm, Collective::all_reduce, kCount, data, data);
    for (int i = 0; i < 3; ++i) {
      std::fill(data, data + kCount, comm.rank() + 1);
      Bound bound = comm.bind(r);
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

// ---- shared arrays ----

namespace {

std::shared_ptr<int64_t> shared_array(int64_t count) {
  auto& arena = transport::Arena::of_process();
  void* const data = arena.allocate(count * static_cast<int64_t>(sizeof(int64_t)), false);
  return {static_cast<int64_t*>(data), [&arena](int64_t* p) { arena.free(p); }};
}

// How many calls of the group a run of this one makes.
uint64_t calls_of(Communicator& comm, const Bound& bound) {
  Patience patience;
  const auto calls = [&] { return comm.domain().board().self().finished.load(); };
  const uint64_t before = calls();
  comm.run(const_cast<Bound&>(bound), patience);
  return calls() - before;
}

}  // namespace

// The first call on one asks for it, and from the second one after it on all ranks do.
TEST(ranks_ask_only_once_one_of_them_has_a_shared_array) {
  run_threads(3, [](Communicator& comm) {
    constexpr int64_t kCount = 20000;
    std::vector<int64_t> plain(kCount), few(100);
    const auto mine = shared_array(kCount);
    const auto bind = [&](int64_t* data) {
      return comm.bind(request(comm, Collective::all_reduce, kCount, data, data));
    };
    const Bound on_plain = bind(plain.data()), on_mine = bind(mine.get());
    for (int i = 0; i < 5; ++i) CHECK_EQ(calls_of(comm, on_plain), 1U);
    // Rank 1 alone has one: of no use to the others, who hear of it.
    const Bound& mixed = comm.rank() == 1 ? on_mine : on_plain;
    CHECK_EQ(calls_of(comm, mixed), 1U);
    CHECK_EQ(calls_of(comm, mixed), 1U);
    std::fill(plain.begin(), plain.end(), comm.rank() + 1);
    std::fill(mine.get(), mine.get() + kCount, comm.rank() + 1);
    CHECK_EQ(calls_of(comm, mixed), 2U);
    CHECK(mixed.conclude(mixed).record.in == schedule::Placement::plain);
    CHECK_EQ((comm.rank() == 1 ? mine.get() : plain.data())[kCount - 1], total(3));
    CHECK_EQ(calls_of(comm, comm.bind(request(comm, Collective::all_reduce, 100, few.data(), few.data()))),
             1U);
    CHECK_EQ(calls_of(comm, on_mine), 2U);
    CHECK(on_mine.conclude(on_mine).record.in == schedule::Placement::told);
  });
}

// Every collective, in place and not, where all have shared arrays, and where one side or one rank has not.
TEST(shared_arrays_are_used_where_they_lie) {
  constexpr int64_t kCount = 24000;
  for (const int size : {2, 3}) {
    run_threads(size, [](Communicator& comm) {
      const int n = comm.size(), me = comm.rank();
      const auto ins = shared_array(n * kCount + 64), outs = shared_array(n * kCount + 64);
      std::vector<int64_t> plain_in(n * kCount), plain_out(n * kCount);
      std::vector<int64_t> warm_up(kCount);
      for (int i = 0; i < 2; ++i) {  // from now on ranks ask
        Request r = request(comm, Collective::all_reduce, kCount, ins.get(), ins.get());
        Patience patience;
        comm.execute(r, patience);
      }
      for (const Collective kind :
           {Collective::all_reduce, Collective::broadcast, Collective::reduce, Collective::all_gather,
            Collective::reduce_scatter, Collective::all_to_all}) {
        const bool own_in = kind == Collective::all_gather, own_out = kind == Collective::reduce_scatter;
        for (const bool in_place : {false, true}) {
          for (const char* const who : {"all", "inputs", "outputs", "rank 0"}) {
            const bool in_place_here =
                in_place && std::string(who) != "inputs" && std::string(who) != "outputs";
            const std::string text = who;
            const bool tells_in = text == "all" || text == "inputs" || (text == "rank 0" && me == 0);
            const bool tells_out = text == "all" || text == "outputs" || (text == "rank 0" && me == 0);
            // At another place on every rank.
            int64_t* in = tells_in ? ins.get() + me : plain_in.data();
            int64_t* out = tells_out ? outs.get() + 3 * me : plain_out.data();
            if (in_place_here) {
              if (own_in) {
                in = out + me * kCount;
              } else {
                out = in + (own_out ? me * kCount : 0);
              }
            }
            const int64_t blocks_in = own_out || kind == Collective::all_to_all ? n : 1;
            const int64_t blocks_out = own_in || kind == Collective::all_to_all ? n : 1;
            for (int64_t b = 0; b < blocks_in; ++b) std::fill_n(in + b * kCount, kCount, 100 * me + b + 1);
            Request r = request(comm, kind, kCount, in, out);
            r.call.in_place = in_place_here;
            r.call.world.root = n - 1;
            const Bound bound = comm.bind(r);
            CHECK_EQ(calls_of(comm, bound), 2U);
            const auto& used = bound.conclude(bound).record;
            using schedule::Placement;
            const bool all_in = text == "all" || text == "inputs",
                       all_out = text == "all" || text == "outputs";
            const bool root_out = kind == Collective::reduce;
            CHECK(used.in == (all_in && !(in_place_here && own_in) ? Placement::told : Placement::plain));
            CHECK(used.out ==
                  (all_out && !root_out && !(in_place_here && own_out) ? Placement::told : Placement::plain));
            for (int64_t b = 0; b < blocks_out; ++b) {
              int64_t should = 0;
              switch (kind) {
                case Collective::broadcast:
                  should = 100 * (n - 1) + 1;
                  break;
                case Collective::all_gather:
                  should = 100 * b + 1;
                  break;
                case Collective::all_to_all:
                  should = 100 * b + me + 1;
                  break;
                default:
                  should = 100 * (n * (n - 1) / 2) + n * (own_out ? me + 1 : 1);
              }
              if (kind == Collective::reduce && me != n - 1) continue;
              CHECK_EQ(out[b * kCount], should);
              CHECK_EQ(out[b * kCount + kCount - 1], should);
            }
          }
        }
      }
    });
  }
}

// Plans are proved with all ranks in place or none.
TEST(ranks_that_differ_in_place_use_windows) {
  run_threads(2, [](Communicator& comm) {
    constexpr int64_t kCount = 20000;
    const auto in = shared_array(kCount), apart = shared_array(kCount);
    int64_t* const out = comm.rank() == 0 ? in.get() : apart.get();
    const Bound bound = comm.bind(request(comm, Collective::all_reduce, kCount, in.get(), out));
    for (int i = 0; i < 4; ++i) {
      std::fill_n(in.get(), kCount, comm.rank() + 1);
      calls_of(comm, bound);
      CHECK_EQ(out[kCount - 1], total(2));
    }
    CHECK(bound.conclude(bound).record.in == schedule::Placement::plain);
  });
}

// Rank 0's output is its own part of its symmetric input, rank 1's lies apart.
TEST(ranks_that_differ_in_place_ask_alike) {
  run_threads(2, [](Communicator& comm) {
    Patience patience;
    constexpr int64_t kCount = 20000;
    const auto memory = comm.allocate(2 * kCount * 8, patience);
    auto* const in = reinterpret_cast<int64_t*>(memory->data());
    const auto apart = shared_array(kCount);
    const Bound asked = comm.bind(request(comm, Collective::all_reduce, kCount, apart.get(), apart.get()));
    for (int i = 0; i < 3; ++i) calls_of(comm, asked);  // from now on ranks ask
    int64_t* const out = comm.rank() == 0 ? in : apart.get();
    for (int i = 0; i < 3; ++i) {
      std::fill_n(in, 2 * kCount, comm.rank() + 1);
      Request r = request(comm, Collective::reduce_scatter, kCount, in, out);
      r.call.in_place = comm.rank() == 0;
      const Bound bound = comm.bind(r);
      CHECK(bound.record.in == schedule::Placement::symmetric);
      CHECK_EQ(calls_of(comm, bound), 2U);
      CHECK_EQ(out[kCount - 1], total(2));
      std::vector<int64_t> meet(1);
      all_reduce(comm, meet);  // the input is refilled
    }
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
    CHECK(text.find("shared arrays") == std::string::npos);  // so few bytes are not asked about
    std::vector<int64_t> many(10000);
    const std::string of_many =
        comm.explain(request(comm, Collective::all_reduce, 10000, many.data(), many.data()));
    CHECK(of_many.find("all ranks' buffers are shared arrays: two_shot") != std::string::npos);
  });
}
