// How a blocked call waits, and how it learns that waiting is in vain.
//
// Where every rank has a core of its own a wait first spins. Where ranks outnumber cores it yields: at once
// if the peer last waited on this very core (spinning would keep the core from it), else after a spin shorter
// than a switch of processes. Then it sleeps on the rank's doorbell, and wakes every few milliseconds at the
// latest to look at the group's failure, the peers' records (MismatchError), their processes (PeerLostError),
// the deadline (CommTimeoutError) and the caller's own interrupts.
#pragma once

#include <optional>
#include <span>
#include <string>

#include "runtime/domain.h"
#include "runtime/executor.h"

namespace pycomm::runtime {

// What the caller's language wants during a wait: Python releases its lock, and looks for Ctrl-C.
class Patience {
 public:
  virtual ~Patience() = default;
  virtual void on_block() {}  // before the first sleep or yield of a call; may come again
  virtual void on_tick() {}   // about every 20 ms of sleep; may throw, which fails the group
};

struct WaitPolicy {
  double spin_us = 50;
  bool yield = false;  // instead of spinning
  // What advance() may poll before it gives up.
  int polls() const { return yield || spin_us <= 0 ? 1 : 256; }
};

// The policy for this many ranks on the cores that they may use together.
WaitPolicy wait_policy(int ranks, int cores);

// A call that is under way on this rank.
struct Pending {
  Domain* domain = nullptr;
  const Run* run = nullptr;
  double timeout_s = 0;  // of all its waits together, counted
  // From its first long one, by now_s(), moved on by the time in which the process stood still; 0 until then.
  double started = 0;
};

// Returns when one of the calls may go on: what its run is blocked on is met, or `also` is. The calls are of
// one group (its own, and messages between its pairs). Otherwise makes the reason the group's failure and
// throws it.
void wait(std::span<Pending* const> calls, const WaitPolicy& policy, Patience& patience,
          const Blocked* also = nullptr);

double now_s();

}  // namespace pycomm::runtime
