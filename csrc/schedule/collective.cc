#include "schedule/collective.h"

#include <vector>

#include "common/error.h"

namespace pycomm::schedule {

Collective parse_collective(const std::string& text) {
  std::string known;
  for (size_t i = 0; i < kTraits.size(); ++i) {
    if (text == kTraits[i].name) return static_cast<Collective>(i);
    known += std::string(i ? ", " : "") + kTraits[i].name;
  }
  throw ValueError("there is no collective \"" + text + "\"; there are " + known);
}

std::string codec_collectives() {
  std::vector<std::string> names;
  for (const Traits& each : kTraits) {
    if (each.takes_codec) names.emplace_back(each.name);
  }
  std::string text;
  for (size_t i = 0; i < names.size(); ++i) {
    text += (i == 0 ? "" : i + 1 == names.size() ? " and " : ", ") + names[i];
  }
  return text;
}

}  // namespace pycomm::schedule
