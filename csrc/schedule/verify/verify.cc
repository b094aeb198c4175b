#include "schedule/verify/verify.h"

#include <algorithm>

#include "common/error.h"
#include "schedule/verify/run.h"

namespace pycomm::schedule {

namespace {

// What keeps a step from being run at all: a peer, operand or link that does not exist.
std::optional<std::string> step_fault(const Plan& plan, int rank, const Step& step) {
  using enum Step::Kind;
  const Program& program = plan.programs[rank];
  const World& world = plan.call.world;
  const int n = world.size;
  const bool signals = step.kind == signal || step.kind == wait, combines = step.kind == combine;
  if (!combines) {
    if (step.peer < 0 || step.peer >= n || step.peer == rank) return "there is no such peer";
    if (world.mapped(rank, step.peer) != signals) {
      return std::string("the two ranks have a ") + (signals ? "message" : "mapped") + " link";
    }
    if (step.cell >= (signals ? plan.cells : plan.channels)) {
      return signals ? "a pair has " + std::to_string(plan.cells) + " cells"
                     : "a pair has " + std::to_string(plan.channels) + " channels";
    }
  }
  if (signals || step.kind == complete) return std::nullopt;
  if (step.count < 0) return "it has a count of " + std::to_string(step.count);
  if (combines && (step.num_dsts < 1 || step.num_srcs < 1)) return "it needs a destination and a source";
  if (!combines && (step.num_dsts != (step.kind == recv) || step.num_srcs != (step.kind == send))) {
    return "it needs one operand";
  }
  const int64_t operands = int64_t{step.num_dsts} + step.num_srcs;
  if (step.operand < 0 || step.operand + operands > static_cast<int64_t>(program.operands.size())) {
    return "its operands are not in the program";
  }
  if (step.transcode >= static_cast<int64_t>(program.transcodes.size())) {
    return "its transcode is not in the program";
  }
  for (int64_t i = 0; i < operands; ++i) {
    const int owner = program.operands[step.operand + i].rank;
    if (owner < 0 || owner >= n) return "an operand belongs to rank " + std::to_string(owner);
    if (combines ? !world.mapped(rank, owner) : owner != rank) {
      return "it cannot reach rank " + std::to_string(owner) + "'s memory";
    }
    const bool wire = program.operands[step.operand + i].format == Format::wire;
    if (!combines && wire != plan.call.coded()) {
      return wire ? "what crosses between nodes is encoded, in a call without a codec"
                  : "what crosses between nodes is not encoded";
    }
    if (combines && wire && owner != rank && plan.call.coded_on(Links::wire)) {
      return "what ranks of one node exchange is encoded, and only what crosses between nodes may be";
    }
  }
  return std::nullopt;
}

std::optional<Counterexample> malformed(const Plan& plan, int call) {
  auto fault = [&](int rank, int step, const std::string& what) {
    return Counterexample{Counterexample::Kind::malformed, rank, call, step, what};
  };
  if (auto what = call_fault(plan.call)) return fault(0, -1, *what);
  const int n = plan.call.world.size;
  if (static_cast<int>(plan.programs.size()) != n) {
    return fault(0, -1,
                 std::to_string(plan.programs.size()) + " programs for " + std::to_string(n) + " ranks");
  }
  const auto& nodes = plan.call.world.nodes;
  if (!nodes.empty() && static_cast<int>(nodes.size()) != n) {
    return fault(0, -1, std::to_string(nodes.size()) + " nodes for " + std::to_string(n) + " ranks");
  }
  if (plan.channels < 0 || plan.channels > 256) {
    return fault(0, -1, std::to_string(plan.channels) + " channels");
  }
  const auto [prescale, divisor] = factors_of(plan.call);
  if (plan.divisor != divisor || plan.prescale != prescale) {
    return fault(0, -1,
                 std::string("elements of ") + name(plan.call.op) + " are multiplied by " +
                     std::to_string(plan.prescale) + " and divided by " + std::to_string(plan.divisor) +
                     ", and not by " + std::to_string(prescale) + " and " + std::to_string(divisor));
  }
  if (plan.slots < 1 || plan.slot_bytes < 0 || plan.slots * plan.slot_bytes > plan.bank_bytes) {
    return {{Counterexample::Kind::bounds, 0, call, -1,
             std::to_string(plan.slots) + " slots of " + std::to_string(plan.slot_bytes) +
                 " bytes do not fit a bank of " + std::to_string(plan.bank_bytes)}};
  }
  for (int rank = 0; rank < n; ++rank) {
    const Program& program = plan.programs[rank];
    const std::string who = "rank " + std::to_string(rank);
    for (const Loop& loop : program.loops) {
      if (loop.first < 0 || loop.trips < 0 || loop.stages < 1) {
        return fault(rank, -1,
                     who + ": a loop of trips [" + std::to_string(loop.first) + ", " +
                         std::to_string(loop.first + loop.trips) + ") in " + std::to_string(loop.stages) +
                         " stages");
      }
      if (loop.step < 0 || loop.num_steps < 0 ||
          int64_t{loop.step} + loop.num_steps > static_cast<int64_t>(program.steps.size())) {
        return fault(rank, -1, who + ": a loop's steps are not in the program");
      }
      for (int32_t i = loop.step; i < loop.step + loop.num_steps; ++i) {
        const Step& step = program.steps[i];
        const bool counts = step.kind == Step::Kind::signal || step.kind == Step::Kind::wait;
        const int64_t most = step.value + (loop.first + std::max<int64_t>(loop.trips - 1, 0)) * step.per_trip;
        if (counts && most >> kSignalBits > 0) {
          return fault(rank, i,
                       who + " step " + std::to_string(i) + ": the value " + std::to_string(most) +
                           " does not fit a cell, which has " + std::to_string(kSignalBits) + " bits for it");
        }
      }
    }
    for (size_t i = 0; i < program.steps.size(); ++i) {
      if (auto what = step_fault(plan, rank, program.steps[i])) {
        return fault(rank, static_cast<int>(i), who + " step " + std::to_string(i) + ": " + *what);
      }
    }
  }
  return std::nullopt;
}

}  // namespace

std::optional<Counterexample> verify_sequence(std::span<const Plan* const> calls,
                                              const VerifyOptions& options) {
  if (calls.empty()) return std::nullopt;
  for (size_t i = 0; i < calls.size(); ++i) {
    if (auto found = malformed(*calls[i], static_cast<int>(i))) return found;
    const World &world = calls[i]->call.world, &first = calls[0]->call.world;
    if (world.size != first.size) {
      throw ValueError("calls 0 and " + std::to_string(i) + " of the sequence are made by " +
                       std::to_string(first.size) + " and " + std::to_string(world.size) +
                       " ranks; the calls of a sequence are made by one group");
    }
    if (world.nodes != first.nodes) {
      throw ValueError(
          "calls 0 and " + std::to_string(i) +
          " of the sequence place the ranks on different nodes; a group's ranks stay where they are");
    }
  }
  return SymbolicRun(calls, options).run();
}

std::optional<Counterexample> verify(const Plan& plan, const VerifyOptions& options) {
  const Plan* const calls[] = {&plan};
  return verify_sequence(calls, options);
}

}  // namespace pycomm::schedule
