// The order in which a rank's program runs, for everybody who walks through one: the executor, the verifier,
// explain().
#pragma once

#include <cstddef>
#include <cstdint>

#include "schedule/plan.h"

namespace pycomm::schedule {

// Trips [first, first + count) of a loop: all of them, or those that a proof has to run.
struct Trips {
  int64_t first, count;
};

struct Cursor {
  size_t loop = 0;
  int64_t iteration = 0;  // from the loop's first
  int32_t step = 0;       // in the loop

  // The step to run, and its trip; null: the program has ended. Steps whose trips are none of the loop's are
  // passed over. `trips_of(loop)` says which trips of that loop run.
  template <class TripsOf>
  const Step* at(const Program& program, int64_t& trip, const TripsOf& trips_of) {
    for (; loop < program.loops.size(); ++loop, iteration = 0) {
      const Loop& here = program.loops[loop];
      const Trips trips = trips_of(loop);
      const int64_t iterations = trips.count + here.stages - 1;
      for (; iteration < iterations; ++iteration, step = 0) {
        for (; step < here.num_steps; ++step) {
          const Step& found = program.steps[here.step + step];
          const int64_t index = iteration - found.stage;
          if (index < 0 || index >= trips.count) continue;
          trip = trips.first + index;
          return &found;
        }
      }
    }
    return nullptr;
  }
  const Step* at(const Program& program, int64_t& trip) {
    return at(program, trip, [&](size_t i) { return Trips{program.loops[i].first, program.loops[i].trips}; });
  }
  void next() { ++step; }
};

}  // namespace pycomm::schedule
