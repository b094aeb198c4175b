// What a profile chooses for a call whose caller names nothing. Pure: all ranks of a group choose alike.
#pragma once

#include <string>

#include "runtime/profile.h"

namespace pycomm::runtime {

struct Choice {
  std::string algorithm;
  std::string reason;  // in words, for explain()
};

// `crowded`: the ranks have fewer cores than they are. Throws ValueError if no rule fits.
Choice select(const schedule::Call& call, const Profile& profile, bool crowded);

// Whether ranks that can should read a plain `in` of this call through the kernel, where it lies
// (Placement::reachable), if it is fit for that on all of them.
bool single_copy_pays(const schedule::Call& call, const Profile& profile);

}  // namespace pycomm::runtime
