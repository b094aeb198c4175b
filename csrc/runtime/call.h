// A call: as its caller makes it (Request), and bound to plans and buffers, ready to run again and again
// (Bound).
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "runtime/executor.h"

namespace pycomm::runtime {

// Its buffers have been checked for size, contiguity and overlap.
struct Request {
  schedule::Call call;  // its placement is found when it is bound
  const void* in = nullptr;
  void* out = nullptr;
  std::shared_ptr<Coding> coding;  // with a codec; no two bound calls that may run at once share it
  Composite composite;             // with a codec that no plan carries
  std::string algorithm;           // empty: the library chooses
  std::string tag;
  double timeout_s = -1;  // negative: the group's
  // For a call that the library makes as a part of another one: what mismatches and errors shall tell.
  std::optional<CallRecord> part_of;
};

struct BoundPlan {
  std::shared_ptr<const Prepared> prepared;
  Bases bases;
  CallRecord record;
};

// A plan that runs before a call's own, so that ranks can agree on something. If `wanted` is set, it gets the
// number that this plan would have in its sequence, and returns the plan to run instead. If it returns null,
// as it then must on all ranks, the run goes on with the call's own plan, without later preludes or `conclude`.
struct Prelude {
  std::function<const BoundPlan*(uint64_t call)> wanted = nullptr;
  std::function<void()> before = nullptr;  // if set, finds what this rank says
  BoundPlan plan = {};
};

// Runs in this order (execution.h), by whichever thread runs the call: `before`; each prelude; `conclude`;
// the call's own plan; `then`. Each of these functions may be empty, and may throw, which ends the call.
struct Bound : BoundPlan {
  double timeout_s = 0;    // of each plan
  int src = -1, dst = -1;  // send and recv: the pair, in ranks of the group
  std::pair<int, int> sequence() const { return {src, dst}; }
  std::shared_ptr<Coding> coding;
  std::function<void()> before;  // before anything moves
  std::vector<Prelude> preludes;
  // Host work on the results of the preludes. Returns the plan to run: its argument, or another one that it
  // keeps alive.
  std::function<const BoundPlan&(const BoundPlan& own)> conclude;
  std::function<void()> then;         // after success
  std::shared_ptr<void> keeps_alive;  // asynchronous calls: the caller's buffers

  // With a codec, while it does not run: the step that its random bits depend on. All ranks must have it
  // alike.
  void set_step(uint32_t step);
};

}  // namespace pycomm::runtime
