// Runs a plan, or several calls in a row, in every interleaving of its ranks. It decides whether the verifier
// is right.
//
// It is explicit where the verifier is symbolic: each byte of memory holds a byte of a concrete value, ranks
// move one step at a time, and the search remembers the states that it has seen. It shares nothing with the
// verifier but the plan, and can only search small plans of 2 or 3 ranks.
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
