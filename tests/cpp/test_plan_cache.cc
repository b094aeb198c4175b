// Plans are kept, and users' own algorithms are proved before they run.
#include <string>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "group_calls.h"

using namespace group_calls;

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
