// What a collective demands: the caller's buffers and what they must hold in the end.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "schedule/plan.h"

namespace pycomm::schedule {

// A rank's `in` and `out` in one range of addresses, where they overlap if the call is in place.
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

// Why this is no call at all: wrong number of counts, no such root.
std::optional<std::string> call_fault(const Call& call);

}  // namespace pycomm::schedule
