#include "schedule/schedule.h"

#include <array>

#include "common/error.h"

namespace pycomm::schedule {

namespace {
constexpr std::array<const char*, kNumCollectives> kCollectiveNames = {
    "all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce",
    "gather",     "scatter",        "all_to_all", "barrier",   "send_recv"};
constexpr std::array<const char*, 4> kBufferNames = {"in", "out", "image", "scratch"};
}  // namespace

const char* name(Collective collective) { return kCollectiveNames[static_cast<size_t>(collective)]; }
const char* name(Buffer buffer) { return kBufferNames[static_cast<size_t>(buffer)]; }

bool reduces(Collective collective) {
  return collective == Collective::all_reduce || collective == Collective::reduce_scatter ||
         collective == Collective::reduce;
}

Collective parse_collective(const std::string& text) {
  std::string known;
  for (int i = 0; i < kNumCollectives; ++i) {
    if (text == kCollectiveNames[i]) return static_cast<Collective>(i);
    known += std::string(i ? ", " : "") + kCollectiveNames[i];
  }
  throw ValueError("there is no collective \"" + text + "\"; there are " + known);
}

Builder::Builder(Schedule& schedule, int rank) : schedule_(schedule), rank_(rank) {
  if (static_cast<size_t>(rank) >= schedule.ranks.size()) schedule.ranks.resize(rank + 1);
}

void Builder::stage(int stage) {
  stage_ = stage;
  schedule_.stages = std::max(schedule_.stages, stage + 1);
}

void Builder::combine(std::vector<Ref> dsts, std::vector<Ref> srcs, bool final) {
  schedule_.ranks[rank_].push_back(
      {ScheduleStep::Kind::combine, stage_, final, -1, std::move(dsts), std::move(srcs)});
}

void Builder::offer(int peer, Ref ref) {
  schedule_.ranks[rank_].push_back({ScheduleStep::Kind::offer, stage_, false, peer, {}, {ref}});
}

void Builder::accept(int peer, Ref ref) {
  schedule_.ranks[rank_].push_back({ScheduleStep::Kind::accept, stage_, false, peer, {}, {ref}});
}

}  // namespace pycomm::schedule
