// Runs a plan, or calls after each other, in every interleaving of its ranks: the judge of the verifier.
//
// Explicit where the verifier is symbolic: each byte of memory holds a byte of a concrete value, ranks move
// one step at a time, and the search remembers the states it has seen. Nothing is shared with the verifier
// but the plan. Small plans of 2 or 3 ranks only.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "schedule/plan.h"

namespace explore {

struct Verdict {
  bool wrong = false;    // some interleaving fails
  bool complete = true;  // false: gave up after max_states
  std::string why;
  size_t states = 0;
};

// `balanced`: sums must associate as the balanced tree over ranks.
Verdict explore(const std::vector<const pycomm::schedule::Plan*>& calls, bool balanced,
                size_t max_states = 200'000);

}  // namespace explore
