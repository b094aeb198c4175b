// Which algorithm a call gets when its caller names none, and the geometry of the host's windows.
#pragma once

#include <string>

#include "common/caches.h"
#include "schedule/plan.h"

namespace pycomm::runtime {

using schedule::Geometry;

struct Choice {
  std::string algorithm;
  std::string reason;  // in words, for explain()
};

// Pure in the call. The thresholds were measured on a node's shared memory (docs/algorithms.md).
// `crowded`: the ranks have fewer cores than they are. All ranks of a group must say the same.
Choice select(const schedule::Call& call, bool crowded);

// Whether ranks that can should read a plain `in` of this call through the kernel, where it lies
// (Placement::reachable), if it is fit for that on all of them. Pure in what all ranks know.
bool single_copy_pays(const schedule::Call& call, const Caches& found);

// How `ranks` ranks cut data, and from where on they store it past their caches. Ranks that exchange must
// find the same: `found` is what all of them have.
Geometry host_geometry(int ranks, const Caches& found = caches());

}  // namespace pycomm::runtime
