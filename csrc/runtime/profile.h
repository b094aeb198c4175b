// The library's choices for calls that name no algorithm, as data: rules and sizes. There is a built-in
// profile; a tuner can replace it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/caches.h"
#include "schedule/plan.h"

namespace pycomm::runtime {

using schedule::Geometry;

// The calls that an algorithm is chosen for: a field that is empty matches all.
struct Rule {
  std::optional<schedule::Collective> collective = std::nullopt;
  std::optional<bool> nodes = std::nullopt;   // several of them
  std::optional<bool> ragged = std::nullopt;  // an all_to_all with a count for each pair
  std::optional<bool> coded = std::nullopt;
  std::optional<Links> links = std::nullopt;     // where a codec encodes
  std::optional<bool> crowded = std::nullopt;    // the ranks have fewer cores than they are
  std::optional<bool> symmetric = std::nullopt;  // both buffers, or told
  int min_ranks = 1;
  int64_t max_bytes = INT64_MAX;            // that a rank reads if it reads all that the others have
  bool deterministic = true;                // also for calls that must sum in the balanced order
  std::string algorithm = {}, reason = {};  // the reason in words, for explain()

  bool fits(const schedule::Call& call, bool is_crowded) const;
};

struct Profile {
  std::vector<Rule> rules;  // the first that fits a call counts
  // These collectives read plain inputs through the kernel (Placement::reachable) from blocks of so many bytes
  // on, by algorithms that only copy them.
  std::vector<schedule::Collective> single_copy;
  int64_t single_copy_bytes = INT64_MAX;
  // Once one rank uses shared arrays, calls whose larger buffer has at least so many bytes begin with the
  // question whether all ranks' buffers are such (Placement::told).
  int64_t told_bytes = INT64_MAX;
  int64_t trip_bytes = 0;  // Geometry's
  Caches caches{};         // what outputs must be larger than to be stored past them
};

// The profile for a processor with these caches, and a function of nothing else: ranks of a group must use
// the same caches.
Profile built_in_profile(const Caches& found);

// How `ranks` ranks cut data, and from where on they store it past their caches.
Geometry host_geometry(int ranks, const Profile& profile);

}  // namespace pycomm::runtime
