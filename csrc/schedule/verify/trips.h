// Which trips of a plan's loops a proof must run.
//
// A loop of T trips does the same thing T times, shifted in memory and in signal values. Its first trips
// are the least ordered ones (they wait for nothing), so once every slot, stage and signal distance is in
// use, a further trip meets nothing new: trips in the middle are left out and the signals are numbered as
// if they did not exist. What is left out is a multiple of the slots, and both ends are run.
//
// That holds for a plan in which (1) all ranks have the same loops, (2) all steps of a cell count alike,
// and every trip receives as many messages of a channel as it sends, (3) no rank waits for an iteration
// that is ahead of its own, and (4) trips touch disjoint parts of the caller's buffers. In any other plan
// every trip is run.
#pragma once

#include <vector>

#include "schedule/plan.h"
#include "schedule/verify/required.h"

namespace pycomm::schedule {

// Trips [first, first + count), renumbered; those from `first + head` on lie behind the gap.
struct LoopTrips {
  int64_t first, count, head;
  int64_t shift;  // trips left out of earlier loops
  int64_t gap;    // trips left out of this one
  // The trip's number in the plan, which its addresses depend on.
  int64_t plan_trip(int64_t trip) const { return trip + shift + (trip >= first + head ? gap : 0); }
};

struct ByteRange {
  int64_t begin, end;
};

struct TripSelection {
  std::vector<std::vector<LoopTrips>> loops;     // by rank and loop
  std::vector<std::vector<ByteRange>> left_out;  // by rank: what left-out trips write in its buffers, sorted
};

TripSelection select_trips(const Plan& plan, const std::vector<CallerMemory>& buffers, bool all_trips);

}  // namespace pycomm::schedule
