// The algorithms, by name. Adding one is adding a file under algorithms/ and a line to the table in
// algorithms.cc.
#pragma once

#include <cstdint>
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
  // Whether its plans are proved with codecs; `any_once`: each rank encodes an element at most once, which
  // error feedback needs.
  enum class Codecs : uint8_t { none, any, any_once };
  Codecs codecs;
  bool wire = false;   // whether they are proved with codecs on message links only
  bool ragged = true;  // if it is for all_to_all: takes a count for each pair
};

std::span<const Algorithm> algorithms();
std::vector<std::string> algorithm_names(Collective collective);
// Those of this collective that can: "two_shot, ring".
std::string algorithms_that(Collective collective, bool (*can)(const Algorithm&));
// Throws ValueError that lists what this collective has.
const Algorithm& find_algorithm(Collective collective, const std::string& name);

}  // namespace pycomm::schedule
