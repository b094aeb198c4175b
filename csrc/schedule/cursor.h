// The order in which the steps of a rank's program run, for code that walks through it: the verifier,
// explain(). The executor has a loop of its own, in the same order, since this one would add 8 ns to a call
// of 115 ns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "schedule/plan.h"

namespace pycomm::schedule {

// Trips [first, first + count) of a loop: all of its trips, or those that a proof has to run.
struct Trips {
  int64_t first, count;
};

struct Cursor {
  size_t loop = 0;
  int64_t iteration = 0;  // from the loop's first
  int32_t step = 0;       // in the loop

  // Calls visit(step, trip) for each step from here on. If it returns false, the cursor stays at that step,
  // and walk() returns false; true: the program has ended. `trips_of(loop)` says which trips of a loop run; a
  // step of a later stage has none in the first iterations, and one of an early stage none in the last.
  template <class TripsOf, class Visit>
  bool walk(const Program& program, const TripsOf& trips_of, const Visit& visit) {
    for (; loop < program.loops.size(); ++loop, iteration = 0) {
      const Loop& here = program.loops[loop];
      const Trips trips = trips_of(loop);
      const int64_t iterations = trips.count + here.stages - 1;
      for (; iteration < iterations; ++iteration, step = 0) {
        for (; step < here.num_steps; ++step) {
          const Step& found = program.steps[here.step + step];
          const int64_t index = iteration - found.stage;
          if (index < 0 || index >= trips.count) continue;
          if (!visit(found, trips.first + index)) return false;
        }
      }
    }
    return true;
  }
  template <class Visit>
  bool walk(const Program& program, const Visit& visit) {
    const auto all = [&](size_t i) { return Trips{program.loops[i].first, program.loops[i].trips}; };
    return walk(program, all, visit);
  }

  // The step to run, and its trip; null: the program has ended.
  template <class TripsOf>
  const Step* at(const Program& program, int64_t& trip, const TripsOf& trips_of) {
    const Step* found = nullptr;
    walk(program, trips_of, [&](const Step& here, int64_t its_trip) {
      found = &here;
      trip = its_trip;
      return false;
    });
    return found;
  }
  void next() { ++step; }
};

}  // namespace pycomm::schedule
