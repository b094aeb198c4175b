// What a collective demands: the caller's buffers and what they must hold in the end. Only the buffers' sizes
// come from the table of collectives (schedule/collective.h); all else is said here once more, so that the
// proof finds a mistake in the table. Each function switches over all collectives: a new one does not compile
// until it has a case in each.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "schedule/plan.h"

namespace pycomm::schedule {

// Where a rank's `in` and `out` lie in one range of addresses; they overlap if the call is in place.
struct CallerMemory {
  int64_t in_begin = 0, in_bytes = 0;
  int64_t out_begin = 0, out_bytes = 0;
};
CallerMemory buffers_of(const Call& call, int rank);

// Elements [begin, end) of `out`: for each i, element i + shift of every rank's input reduced, or of
// `source`'s copied.
struct Required {
  static constexpr int kReduced = -1;
  int64_t begin, end;
  int source;
  int64_t shift;
};
std::vector<Required> required_of(const Call& call, int rank);

// Whether the reduced or encoded results of all ranks must be the same expressions.
bool same_results(Collective collective);
// Whether a rank may leave only when all ranks have entered.
bool synchronises(Collective collective);
// Whether a codec may encode its data.
bool encodable(Collective collective);

// What is wrong with the call itself, whatever the plan: the number of counts, the root, the codec.
std::optional<std::string> call_fault(const Call& call);

}  // namespace pycomm::schedule
