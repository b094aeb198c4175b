// The order of a call's parts, whichever thread runs them.
#include <cmath>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "group_calls.h"

using namespace group_calls;

namespace {

// Runs a call as blocking calls and as asynchronous ones do.
const std::vector<std::function<void(Communicator&, Bound&)>> kWays = {
    [](Communicator& comm, Bound& bound) {
      Patience patience;
      comm.run(bound, patience);
    },
    [](Communicator& comm, Bound& bound) {
      Patience patience;
      comm.submit(bound)->wait(INFINITY, patience);
    },
};

// A sum that two preludes come before. Each part of the call notes its name.
struct Noted {
  explicit Noted(Communicator& comm)
      : values(4), bound(comm.bind(request(comm, Collective::all_reduce, 1, &values[0], &values[0]))) {
    bound.before = [this] { note("before"); };
    for (const size_t i : {1, 2}) {
      const Request agree = request(comm, Collective::all_reduce, 1, &values[i], &values[i]);
      bound.preludes.push_back({.before = [this, i] { note("prelude " + std::to_string(values[i - 1])); },
                                .plan = comm.bind(agree)});
    }
    instead = comm.bind(request(comm, Collective::all_reduce, 1, &values[3], &values[3]));
    bound.conclude = [this](const BoundPlan& own) -> const BoundPlan& {
      note("conclude " + std::to_string(values[2]));
      return choose_other ? instead : own;
    };
    bound.then = [this] { note("then"); };
  }
  Noted(const Noted&) = delete;

  void note(const std::string& what) {
    notes += what + "; ";
    if (what.starts_with(fails_in)) throw std::runtime_error(what);
  }

  std::vector<int64_t> values;
  std::string notes, fails_in = "nothing";
  bool choose_other = false;
  Bound bound;
  BoundPlan instead;
};

}  // namespace

TEST(parts_run_in_order_again_and_again) {
  run_threads(2, [](Communicator& comm) {
    for (const auto& run : kWays) {
      Noted call(comm);
      for (const bool other : {false, true, false}) {
        call.notes.clear();
        call.choose_other = other;
        call.values = {1, 10, 100, 1000};
        run(comm, call.bound);
        CHECK_EQ(call.notes, "before; prelude 1; prelude 20; conclude 200; then; ");
        CHECK_EQ(call.values[0], other ? 1 : 2);
        CHECK_EQ(call.values[3], other ? 2000 : 1000);
      }
    }
  });
}

// All ranks fail alike, as a check of what they have exchanged does: the group goes on.
TEST(a_part_that_throws_ends_the_call) {
  run_threads(2, [](Communicator& comm) {
    for (const auto& run : kWays) {
      for (const std::string part : {"before", "prelude 1", "prelude 20", "conclude", "then"}) {
        Noted call(comm);
        call.values = {1, 10, 100, 1000};
        call.fails_in = part;
        CHECK_THROWS(std::runtime_error, run(comm, call.bound));
        CHECK(call.notes.ends_with(part + "; ") || part == "conclude");
        std::vector<int64_t> data(10, 1);
        all_reduce(comm, data);
        CHECK_EQ(data[9], 2);
      }
    }
  });
}
