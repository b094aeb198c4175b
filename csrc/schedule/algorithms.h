// The algorithms, by name. A new one is a file in algorithms/, a line in algorithms/all.h and a row of the
// table in algorithms.cc.
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
  // The codecs that its plans are proved with. any_once: any, and each rank encodes an element at most once,
  // as error feedback needs.
  enum class Codecs : uint8_t { none, any, any_once };
  Codecs codecs;
  bool wire = false;   // whether its plans are proved with codecs on message links alone
  bool ragged = true;  // all_to_all: whether it takes a count for each pair
};

std::span<const Algorithm> algorithms();
std::vector<std::string> algorithm_names(Collective collective);
// The names of a collective's algorithms for which can() holds: "two_shot, ring".
std::string algorithms_that(Collective collective, bool (*can)(const Algorithm&));
// Throws ValueError that lists the collective's algorithms.
const Algorithm& find_algorithm(Collective collective, const std::string& name);

}  // namespace pycomm::schedule
