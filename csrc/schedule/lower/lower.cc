#include "schedule/lower/lower.h"

#include <algorithm>
#include <optional>

#include "common/error.h"
#include "common/hash.h"
#include "schedule/lower/lowering.h"

namespace pycomm::schedule {

namespace {

using Kind = ScheduleStep::Kind;

// Whether ranks offer nothing but `in`, and do nothing with what is offered but copy it to their own `out`.
bool only_copies_in(const Schedule& schedule) {
  bool offers = false;
  for (size_t rank = 0; rank < schedule.ranks.size(); ++rank) {
    const auto own = [&](const Ref& ref) { return ref.rank == static_cast<int>(rank); };
    for (const ScheduleStep& step : schedule.ranks[rank]) {
      if (step.kind == Kind::offer) {
        if (step.srcs[0].buffer != Buffer::in) return false;
        offers = true;
      }
      if (step.kind != Kind::combine) continue;
      if (std::all_of(step.dsts.begin(), step.dsts.end(), own) &&
          std::all_of(step.srcs.begin(), step.srcs.end(), own)) {
        continue;
      }
      const bool bare = !step.final && step.dsts.size() == 1 && step.srcs.size() == 1 && own(step.dsts[0]) &&
                        step.dsts[0].buffer == Buffer::out;
      if (!bare) return false;
    }
  }
  return offers;
}

// If all that a rank writes to its image are copies of `in`, peers can as well read `in` itself, which nobody
// overwrites: the copies are left out.
Schedule show_inputs(Schedule schedule) {
  for (int rank = 0; rank < static_cast<int>(schedule.ranks.size()); ++rank) {
    const auto in_image = [&](const Ref& ref) { return ref.rank == rank && ref.buffer == Buffer::image; };
    const auto writes = [&](const ScheduleStep& step) { return std::ranges::any_of(step.dsts, in_image); };
    const auto copies = [&](const ScheduleStep& step) {
      return writes(step) && !step.final && step.dsts.size() == 1 && step.srcs.size() == 1 &&
             step.srcs[0] == Ref{rank, Buffer::in, step.dsts[0].chunk};
    };
    const bool copies_alone = std::ranges::all_of(schedule.ranks, [&](const auto& program) {
      return std::ranges::all_of(program, [&](const auto& step) { return !writes(step) || copies(step); });
    });
    if (!copies_alone) continue;
    std::erase_if(schedule.ranks[rank], copies);
    for (std::vector<ScheduleStep>& program : schedule.ranks) {
      for (ScheduleStep& step : program) {
        for (Ref& src : step.srcs) {
          if (in_image(src)) src.buffer = Buffer::in;
        }
      }
    }
  }
  return schedule;
}

uint64_t fingerprint_of(const Plan& plan, const Schedule& schedule, const Layout& layout) {
  Call agreed = plan.call;
  agreed.in_place = agreed.deterministic = false;  // ranks may differ in these
  agreed.ragged = layout.ragged;
  if (layout.ragged) agreed.counts.clear();  // a rank knows its row and its column alone
  Hasher h;
  add(h, agreed);
  h.add(plan.algorithm);
  for (int64_t v : {layout.width, int64_t{plan.slots}, plan.slot_bytes, int64_t{plan.cells}}) h.add(v);
  // The steps as well, since users may write two algorithms of one name.
  for (const std::vector<ScheduleStep>& program : schedule.ranks) {
    h.add(program.size());
    for (const ScheduleStep& step : program) {
      h.add(step.kind).add(step.stage).add(step.final).add(step.peer).add(step.dsts.size());
      for (const std::vector<Ref>* refs : {&step.dsts, &step.srcs}) {
        for (const Ref& ref : *refs) {
          h.add(ref.rank).add(ref.buffer);
          h.add(ref.chunk.block).add(ref.chunk.first).add(ref.chunk.last).add(ref.chunk.of);
        }
      }
    }
  }
  return h.digest() | 1;  // 0 means "nothing yet" in a cell
}

}  // namespace

Plan lower(const Schedule& written, const std::string& algorithm, const Call& asked, const Geometry& geometry,
           int only_rank) {
  Call call = asked;
  if (call.out == Placement::reachable) throw ValueError("`out` cannot be reachable: peers may only read it");
  if (const auto& nodes = call.world.nodes; !nodes.empty()) {
    if (static_cast<int>(nodes.size()) != call.world.size) {
      throw ValueError(std::to_string(nodes.size()) + " nodes are named for " +
                       std::to_string(call.world.size) + " ranks; name one for each rank");
    }
    if (call.ragged) call.in = call.out = Placement::plain;
  }
  std::optional<Schedule> shown;
  if (call.in == Placement::reachable) {
    if (!call.in_place) shown = show_inputs(written);
    if (!only_copies_in(shown ? *shown : written)) {
      call.in = Placement::plain;
      shown.reset();
    }
  }
  const Schedule& schedule = shown ? *shown : written;
  if (call.coded()) {
    const Traits& traits = call.world.traits();
    if (!traits.takes_codec) {
      throw ValueError(std::string(traits.name) + " takes no codec: " + codec_collectives() + " do");
    }
    call.in = call.out = Placement::plain;
    call.codec.seed = 0;
  }
  if (schedule.stages > geometry.max_cells) {
    throw ValueError("the schedule uses " + std::to_string(schedule.stages) + " stages; use at most " +
                     std::to_string(geometry.max_cells) + ", since each takes a cell of every pair");
  }
  const Lowering lowering(schedule, call, geometry);
  const Layout& layout = lowering.layout();
  if (lowering.most_signals() >> kSignalBits != 0) {
    throw ValueError("algorithm \"" + algorithm + "\" needs " + std::to_string(lowering.most_signals()) +
                     " signals from one rank to another in this call, and a cell counts to 2^" +
                     std::to_string(kSignalBits) + "; use another algorithm, or several calls");
  }
  Plan plan;
  plan.call = call;
  plan.algorithm = algorithm;
  plan.cells = lowering.cells();
  plan.channels = lowering.channels();
  plan.slots = layout.slots;
  plan.slot_bytes = layout.slot_bytes;
  plan.bank_bytes = layout.slots * layout.slot_bytes;
  const auto [prescale, divisor] = factors_of(call);
  plan.prescale = prescale;
  plan.divisor = divisor;
  plan.full_exchange = lowering.full_exchange();
  plan.encodes_once = call.coded() && lowering.encodes_once();
  plan.programs.resize(call.world.size);
  for (int rank = 0; rank < call.world.size; ++rank) {
    if (only_rank < 0 || rank == only_rank) plan.programs[rank] = lowering.emit(rank);
  }
  plan.fingerprint = fingerprint_of(plan, schedule, layout);
  return plan;
}

Plan make_plan(const std::string& algorithm, const Call& call, const Geometry& geometry, int only_rank) {
  const Algorithm& chosen = find_algorithm(call.world.collective, algorithm);
  if (!chosen.ragged && is_ragged(call)) {
    throw ValueError(
        std::string(call.world.traits().name) + " algorithm \"" + algorithm +
        "\" takes blocks of one length: for a count for each pair leave algorithm out, or name " +
        algorithms_that(call.world.collective, [](const Algorithm& other) { return other.ragged; }));
  }
  return lower(chosen.write(call.world), algorithm, call, geometry, only_rank);
}

}  // namespace pycomm::schedule
