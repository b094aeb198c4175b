#include "runtime/select.h"

#include <algorithm>

#include "common/error.h"

namespace pycomm::runtime {

Choice select(const schedule::Call& call, const Profile& profile, bool crowded) {
  for (const Rule& rule : profile.rules) {
    if (rule.fits(call, crowded)) return {rule.algorithm, rule.reason};
  }
  throw ValueError(std::string("the profile has no rule for ") + name(call.world.collective) + " on " +
                   std::to_string(call.world.size) + " ranks: end its rules with one for any call");
}

bool single_copy_pays(const schedule::Call& call, const Profile& profile) {
  // A call with a count for each pair: ranks must decide alike, and each knows only what it exchanges itself.
  if (call.ragged) return false;
  const auto& those = profile.single_copy;
  return std::ranges::find(those, call.world.collective) != those.end() &&
         *std::max_element(call.counts.begin(), call.counts.end()) *
                 static_cast<int64_t>(size_of(call.dtype)) >=
             profile.single_copy_bytes;
}

}  // namespace pycomm::runtime
