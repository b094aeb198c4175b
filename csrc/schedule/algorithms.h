// The algorithms, by name. Adding one is adding a file under algorithms/ and a line to the table in
// algorithms.cc.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "schedule/schedule.h"

namespace pycomm::schedule {

// Pure: the same world always gives the same schedule, for any size from 1 up and any root.
using AlgorithmFn = Schedule (*)(const World&);

struct Algorithm {
  const char* name;
  Collective collective;
  AlgorithmFn write;
  // Sums associate as the balanced binary tree over ranks, so `deterministic=True` may choose it.
  bool balanced;
};

std::span<const Algorithm> algorithms();
std::vector<std::string> algorithm_names(Collective collective);
// Throws ValueError that lists what this collective has.
const Algorithm& find_algorithm(Collective collective, const std::string& name);

}  // namespace pycomm::schedule
