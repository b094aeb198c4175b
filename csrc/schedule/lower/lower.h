// Lowers a schedule to a plan. Only lower() inserts byte ranges, windows, slots, signals and messages.
#pragma once

#include "schedule/algorithms.h"
#include "schedule/plan.h"

namespace pycomm::schedule {

// Lowers `schedule`, which the algorithm of this name wrote for call.world. Ranks of one node signal through
// memory that both map; ranks of different nodes send messages.
//
// Refs to `in` and `out` of a symmetric or told buffer are used in place. Those of a plain buffer go through the
// rank's window: an offered chunk that the peer reads is first copied there (or written there at once by the
// combine that produced it), a chunk that a peer wrote is copied out at the accept. The data is cut into
// trips that fit a slot.
//
// A reachable `in` is used in place if the schedule offers nothing but `in` (out of place: or copies of
// it in the image), and if peers do nothing with it but copy it, bit for bit, to their own `out`.
// Otherwise it is lowered as a plain one, and Plan::call says so.
//
// With `only_rank` the programs of all other ranks stay empty; that rank's program is the same as without it.
//
// Throws ValueError if the schedule breaks the rules of schedule.h (an offer that nobody uses, ...), if `out`
// is said to be reachable, if the collective takes no codec, if there are too few cells for the schedule's
// stages, or if a slot cannot hold even the smallest trip.
Plan lower(const Schedule& schedule, const std::string& algorithm, const Call& call, const Geometry& geometry,
           int only_rank = -1);

// The same for an algorithm of the table.
Plan make_plan(const std::string& algorithm, const Call& call, const Geometry& geometry, int only_rank = -1);

}  // namespace pycomm::schedule
