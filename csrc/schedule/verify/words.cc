// Counterexamples in words.
#include <algorithm>

#include "schedule/verify/run.h"

namespace pycomm::schedule {

void SymbolicRun::fail(Kind kind, int rank, int step, const std::string& what) {
  if (!fault_) fault_ = {kind, rank, ranks_[rank].call, step, what};
}

void SymbolicRun::data_fault(int rank, int call, const std::string& what) {
  if (!data_fault_) data_fault_ = {Kind::data, rank, call, -1, at_end(rank, call) + what};
}

std::string SymbolicRun::call_words(int call) const {
  if (calls_.size() == 1) return {};
  const Plan& plan = *calls_[call].plan;
  return "call " + std::to_string(call) + " (" + name(plan.call.world.collective) + ", " + plan.algorithm +
         "), ";
}

std::string SymbolicRun::at_end(int rank, int call) const {
  return call_words(call) + "rank " + std::to_string(rank) + " at its end: ";
}

std::string SymbolicRun::at(int rank, const Step* step) const {
  const RankState& state = ranks_[rank];
  const Plan& plan = *calls_[state.call].plan;
  std::string text = call_words(state.call) + describe(plan, rank, *step);
  const Current now = current(rank);
  if (now.step && now.plan_trip != 0) text += ", trip " + std::to_string(now.plan_trip);
  return text;
}

std::string SymbolicRun::place(int rank, const Operand& operand) const {
  switch (operand.space) {
    case Space::window:
      return "rank " + std::to_string(operand.rank) + "'s window";
    case Space::outgoing:
      return "its cells at rank " + std::to_string(operand.rank);
    case Space::incoming:
      return "its cells from rank " + std::to_string(operand.rank);
    case Space::in:
    case Space::out:
      break;
  }
  const char* buffer = operand.space == Space::in ? "`in`" : "`out`";
  if (operand.rank == rank) return std::string("its ") + buffer;
  return "rank " + std::to_string(operand.rank) + "'s " + buffer;
}

void SymbolicRun::race(int rank, const Step* step, const std::string& where, int64_t base, bool writes,
                       const Conflict& conflict) {
  const Access& earlier = conflict.earlier;
  const std::string bytes =
      " [" + std::to_string(conflict.begin - base) + ", " + std::to_string(conflict.end - base) + ")";
  std::string text = step == nullptr ? at_end(rank, ranks_[rank].call) : at(rank, step);
  if (step == nullptr) {
    text += "the caller may write bytes" + bytes + " of " + where;
  } else {
    text +=
        std::string(": ") + (writes ? "writes" : "reads") + " bytes" + bytes + " of its operand in " + where;
  }
  text += " while ";
  const bool message = earlier.rank >= n_;
  const int owner = message ? sender_of(earlier.rank) : earlier.rank;
  const std::string other = "rank " + std::to_string(owner);
  if (earlier.step == Access::kEntry || earlier.step == Access::kEnd) {
    text += other + "'s caller may " +
            (earlier.step == Access::kEntry ? "not have finished writing them before its entry"
                                            : "already use them after its end");
  } else {
    const Plan& plan = *calls_[earlier.call].plan;
    if (earlier.call != ranks_[rank].call) text += "in call " + std::to_string(earlier.call) + " ";
    text += describe(plan, owner, plan.programs[owner].steps[earlier.step]) +
            (earlier.trip != 0 ? ", trip " + std::to_string(earlier.trip) + "," : "") + " may still be " +
            (conflict.earlier_writes ? "writing" : "reading") + " them";
  }
  const int index =
      step == nullptr ? -1
                      : static_cast<int>(step - calls_[ranks_[rank].call].plan->programs[rank].steps.data());
  fail(Kind::race, rank, index,
       text + (message ? " (nothing says that they have been received)" : " (no signal orders the two)"));
}

// What a rank that cannot move waits for, and which rank would have to move first (`on`; -1: none).
std::string SymbolicRun::blocked_words(int rank, int& on) const {
  const RankState& state = ranks_[rank];
  on = -1;
  if (state.phase == Phase::done) return "rank " + std::to_string(rank) + " has ended";
  if (state.phase == Phase::gate) {
    for (int at = 0; at < n_ * num_channels_; ++at) {
      const Channel& channel = channels_[static_cast<size_t>(rank) * n_ * num_channels_ + at];
      if (state.call < 2 || channel.received >= channel.before[state.call - 1]) continue;
      on = at / num_channels_;
      return "rank " + std::to_string(rank) + " waits to enter call " + std::to_string(state.call) +
             " until rank " + std::to_string(on) + " has received a message of call " +
             std::to_string(state.call - 2);
    }
    const std::string waits = "rank " + std::to_string(rank) + " waits to enter call " +
                              std::to_string(state.call) + " until rank ";
    for (on = 0; state.call > 0 && on < n_; ++on) {
      const CallState& previous = calls_[state.call - 1];
      if (previous.entry_epoch[on] < 0 && previous.plan->call.world.mapped(rank, on))
        return waits + std::to_string(on) + " has entered the one before";
    }
    for (on = 0; !calls_[state.call].arrival[on].empty();) ++on;
    return waits + std::to_string(on) + " has told where its buffers lie";
  }
  const Current now = current(rank);
  const Step* const step = now.step;
  const int64_t trip = now.trip;
  on = step->peer;
  if (step->kind == Step::Kind::recv) return at(rank, step) + ": waits forever, since nothing is sent";
  if (step->kind == Step::Kind::complete) {
    const Channel& channel = channels_[channel_at(rank, on, step->cell)];
    const size_t received = channel.received - std::min(channel.received, channel.before[state.call]);
    return at(rank, step) + ": waits forever until " + std::to_string(step->value + trip * step->per_trip) +
           " are received; " + std::to_string(received) + " are";
  }
  const auto& seen = cells_[(static_cast<size_t>(rank) * n_ + step->peer) * num_cells_ + step->cell];
  const int64_t held = !seen.empty() && seen.back().call == state.call ? seen.back().value : 0;
  return at(rank, step) + ": waits forever for " + std::to_string(step->value + trip * step->per_trip) +
         " in a cell that holds " + std::to_string(held);
}

std::string SymbolicRun::deadlock_words(int rank) const {
  std::string text;
  std::vector<bool> told(n_, false);
  for (int now = rank, on = -1; now >= 0; now = on) {
    if (told[now]) return text + "; and so on, in a circle";
    told[now] = true;
    text += (text.empty() ? "" : "; ") + blocked_words(now, on);
  }
  return text;
}

}  // namespace pycomm::schedule
