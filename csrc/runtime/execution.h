// One execution of a bound call: a state machine that never blocks, so that blocking, asynchronous,
// persistent and composite calls run in one order (call.h) whoever drives them.
#pragma once

#include <cstddef>
#include <utility>

#include "runtime/call.h"
#include "runtime/sequence.h"
#include "runtime/waiter.h"

namespace pycomm::runtime {

class Execution {
 public:
  Execution() = default;
  // Both must outlive it. Nothing has begun.
  Execution(const Bound& bound, Sequence& sequence) : bound_(&bound), sequence_(&sequence) {}

  // The host work up to the first plan, and that plan. Once, when the calls before it in the sequence have
  // ended.
  void start();
  // As far as it goes; true: the call has succeeded. Throws what the call's own functions throw, which ends
  // it.
  bool advance(int polls);
  // While advance() says false: what to wait for.
  Pending& pending() { return pending_; }
  std::pair<int, int> sequence() const { return bound_->sequence(); }

 private:
  void start_plan();

  const Bound* bound_ = nullptr;
  Sequence* sequence_ = nullptr;
  size_t plan_ = 0;      // which one runs: the preludes come first
  int64_t started_ = 0;  // where calls are logged
  Pending pending_;
};

inline void Execution::start_plan() {
  const BoundPlan* plan = bound_;
  if (plan_ < bound_->preludes.size()) {
    const Prelude& prelude = bound_->preludes[plan_];
    const BoundPlan* const first = prelude.wanted ? prelude.wanted(sequence_->calls() + 1) : &prelude.plan;
    if (first) {
      if (prelude.before) prelude.before();
      plan = first;
    } else {
      plan_ = bound_->preludes.size();
    }
  } else if (bound_->conclude) {
    plan = &bound_->conclude(*bound_);
  }
  sequence_->start(*plan->prepared, plan->bases, plan->record);
  pending_ = sequence_->pending(bound_->timeout_s);
}

inline void Execution::start() {
  if (sequence_->log()) [[unlikely]]
    started_ = now_ns();
  if (bound_->before) bound_->before();
  start_plan();
}

inline bool Execution::advance(int polls) {
  Run& run = sequence_->run();
  for (;;) {
    if (run.mismatched() >= 0 || !run.advance(polls)) return false;
    transport::Board& board = sequence_->domain().board();
    if (run.shares_buffers() && board.given_up(run.call())) {
      board.raise_failure(transport::Board::Caller::under_way);  // the result may be made of anything
    }
    sequence_->finish();
    if (plan_++ == bound_->preludes.size()) break;
    start_plan();
  }
  if (bound_->then) bound_->then();
  if (CallLog* const log = sequence_->log(); log && started_ > 0) [[unlikely]]
    log->add(sequence_->domain(), run.call(), run.record(), started_);
  return true;
}

}  // namespace pycomm::runtime
