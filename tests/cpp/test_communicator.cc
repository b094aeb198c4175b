// Groups made from other groups (split, shrink), and memory that all ranks allocate together.
//
// Tests: runtime/bootstrap.cc.
#include <cmath>
#include <latch>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "group_calls.h"

using namespace group_calls;

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

TEST(allocations_have_one_size) {
  run_threads(3, [](Communicator& comm) {
    Patience patience;
    CHECK_THROWS(ValueError, comm.allocate(comm.rank() == 2 ? 100 : 200, patience));
    CHECK_THROWS(OutOfMemoryError, comm.allocate(int64_t{1} << 50, patience));
    const auto memory = comm.allocate(100, patience);  // the group goes on
    CHECK_EQ(memory->bytes(), 100);
  });
}
