#include "schedule/schedule.h"

#include <algorithm>
#include <array>

namespace pycomm::schedule {

namespace {
constexpr std::array<const char*, 4> kBufferNames = {"in", "out", "image", "scratch"};
}  // namespace

const char* name(Buffer buffer) { return kBufferNames[static_cast<size_t>(buffer)]; }

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
