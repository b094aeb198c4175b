// schedule -> plan: byte ranges, windows, slots, signals, messages. The only place that inserts them.
#pragma once

#include "schedule/algorithms.h"
#include "schedule/plan.h"

namespace pycomm::schedule {

// Lowers `schedule`, as algorithm `algorithm` wrote it for call.world. Ranks of one node signal through memory
// that both map; those of different nodes send messages.
//
// Refs to `in` and `out` of a symmetric or told buffer are used in place. Those of a plain buffer go through the
// rank's window: an offered chunk that the peer reads is first copied there (or written there at once by the
// combine that produced it), a chunk that a peer wrote is copied out at the accept. The data is cut into
// trips that fit a slot.
//
// A reachable `in` is used in place as well, if all that the schedule offers is `in`, or, out of place, a
// copy of it in the image, and all that peers do with it is to copy it, bit for bit, to their own `out`.
// Otherwise it is lowered as a plain one, and Plan::call says so.
//
// `only_rank` leaves the other ranks' programs empty: what a rank runs does not depend on it.
//
// Throws ValueError if the schedule breaks the rules of schedule.h (an offer that nobody uses, ...), if `out`
// is said to be reachable, or if a slot cannot hold even the smallest trip.
Plan lower(const Schedule& schedule, const std::string& algorithm, const Call& call, const Geometry& geometry,
           int only_rank = -1);

// The same from an algorithm's name.
Plan make_plan(const std::string& algorithm, const Call& call, const Geometry& geometry, int only_rank = -1);

}  // namespace pycomm::schedule
