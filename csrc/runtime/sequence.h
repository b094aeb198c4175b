// The calls that a rank makes on one domain, one after the other: numbers them, and keeps the state that one
// call leaves to the next. Sequences of a group (its collectives; the messages of each pair, one way) are
// independent.
#pragma once

#include <map>
#include <memory>
#include <utility>

#include "runtime/call_log.h"
#include "runtime/domain.h"
#include "runtime/executor.h"
#include "runtime/waiter.h"

namespace pycomm::runtime {

class Sequence {
 public:
  explicit Sequence(Domain& domain) : domain_(&domain) {}
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;
  Domain& domain() const { return *domain_; }
  uint64_t calls() const { return calls_; }
  bool last_exchanged() const { return last_exchanged_; }

  // Begins the next call; `prepared` and `record` must live until finish(). The call before has finished.
  void start(const Prepared& prepared, const Bases& bases, const CallRecord& record) {
    run_.start(*domain_, prepared, bases, ++calls_, record, !last_exchanged_);
    last_exchanged_ = prepared.plan.full_exchange;
  }
  // Where calls are logged; null: nowhere. To be set while no call is under way.
  CallLog* log() const { return log_; }
  void set_log(CallLog* log) { log_ = log; }
  // To advance until it says that the program has ended.
  Run& run() { return run_; }
  void finish() { domain_->board().finish(calls_); }

  Pending pending(double timeout_s) const { return {domain_, &run_, timeout_s}; }
  // The whole of a call whose record is its plan's.
  void complete(const Prepared& prepared, const Bases& bases, const WaitPolicy& policy, double timeout_s,
                Patience& patience) {
    start(prepared, bases, prepared.record);
    Pending waiting = pending(timeout_s);
    Pending* const one = &waiting;
    while (!run_.advance(policy.polls())) wait({&one, 1}, policy, patience);
    finish();
  }

 private:
  Domain* domain_;
  uint64_t calls_ = 0;
  bool last_exchanged_ = true;
  CallLog* log_ = nullptr;
  Run run_;
};

// Those of one rank of a group. One thread at a time may use them.
class Sequences {
 public:
  explicit Sequences(Domain& group) : group_(group), collectives_(group) {}
  Sequence& collectives() { return collectives_; }
  const Sequence& collectives() const { return collectives_; }
  // Of the messages from one rank of the group to another; {-1, -1}: of the collectives. The first use of a
  // pair makes its domain, or opens the one that the other rank has made; throws OutOfMemoryError.
  Sequence& of(std::pair<int, int> pair) { return pair.first < 0 ? collectives_ : messages(pair); }
  // Domain::all_received, for the group and all of its pairs.
  bool all_received();

 private:
  Sequence& messages(std::pair<int, int> pair);

  struct Channel {
    explicit Channel(std::unique_ptr<Domain> d) : domain(std::move(d)), messages(*domain) {}
    std::unique_ptr<Domain> domain;
    Sequence messages;
  };
  Domain& group_;
  Sequence collectives_;
  std::map<std::pair<int, int>, Channel> channels_;
};

}  // namespace pycomm::runtime
