// What requests are bound to: inputs that are read where they lie, symmetric memory, explain().
#include <sys/mman.h>

#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "group_calls.h"

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
              static_cast<const int64_t*>(static_cast<const void*>(bound.preludes[0].plan.buffers.out));
          const bool fit = unfit < 0 && said[0] == 1 && said[1] == 1;
          const auto placement = fit ? schedule::Placement::reachable : schedule::Placement::plain;
          CHECK(bound.conclude(bound).record.in == placement);
          if (unfit >= 0) CHECK_EQ(said[unfit], 0);
        }
      }
      // Small ones, and what one rank shows to all, are not asked about.
      std::vector<int64_t> data(2 * kCount);
      CHECK(comm.bind(request(comm, Collective::all_gather, 1000, data.data(), data.data() + kCount))
                .preludes.empty());
      CHECK(
          comm.bind(request(comm, Collective::broadcast, kCount, data.data(), data.data())).preludes.empty());
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
