#include "runtime/waiter.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <thread>

#include "common/env.h"
#include "common/error.h"

namespace pycomm::runtime {

namespace {

constexpr double kTick = 0.02;
constexpr double kRecordLate = 2;     // of a rank on another node, which may not wait for anything now
constexpr double kLongestTurn = 1;    // of wait()'s loop without its ticks: that takes milliseconds
constexpr int kSpinBeforeYield = 64;  // about a microsecond

// What a rank waits for, one or several things.
class Hopes {
 public:
  Hopes(std::span<Pending* const> calls, const Blocked* also) : calls_(calls), also_(also) {}
  bool met(int polls = 1) const {
    for (const Pending* call : calls_) {
      const Blocked& blocked = call->run->blocked_on();
      if (call->run->mismatched() < 0 && reaches(*blocked.word, blocked.target, polls)) return true;
    }
    return also_ && also_->met();
  }

 private:
  std::span<Pending* const> calls_;
  const Blocked* also_;
};

// Spins or yields as the policy says; true if something is met.
bool met_soon(const Pending& first, const Hopes& hopes, const WaitPolicy& policy, Patience& patience) {
  const double end = now_s() + policy.spin_us * 1e-6;
  if (!policy.yield) {
    while (now_s() < end) {
      if (hopes.met(64)) return true;
    }
    return false;
  }
  const int cpu = 1 + sched_getcpu();
  first.domain->waker(first.domain->rank()).cpu.store(cpu, std::memory_order_relaxed);
  const std::atomic<int32_t>& peer_cpu = first.domain->waker(first.run->blocked_on().peer).cpu;
  while (now_s() < end) {
    if (peer_cpu.load(std::memory_order_relaxed) != cpu && hopes.met(kSpinBeforeYield)) return true;
    patience.on_block();
    sched_yield();
    if (hopes.met()) return true;
  }
  return false;
}

std::string rank_name(const Domain& domain, int rank) {
  return "rank " + std::to_string(domain.display_rank(rank));
}

// A peer that ended before it finished this call is lost, unless what is waited for came before its end.
void look_for_losses(Domain& domain, const Run& run) {
  const bool deaths = domain.node().any_dead().has_value();
  for (int rank = 0; rank < domain.size(); ++rank) {
    if (rank == domain.rank()) continue;
    Member& peer = domain.member(rank);
    const bool closed = domain.closed(rank);
    if (!closed && !(deaths && domain.dead(rank))) continue;
    if (peer.finished.load(std::memory_order_acquire) >= run.call() || run.blocked_on().met()) continue;
    const std::string error = domain.last_words_of(rank);  // of the group, if this is a pair
    domain.fail(
        FailureKind::peer_lost,
        closed ? rank_name(domain, rank) +
                     (error.empty() ? " closed its communicator" : " left the group because of an error") +
                     " before " + describe(run.record()) + ", which " + rank_name(domain, domain.rank()) +
                     " had called" + (error.empty() ? "." : ": " + error)
               : rank_name(domain, rank) + " (pid " + std::to_string(domain.pid_of(rank)) +
                     ") has ended in or before " + describe(run.record()) + ", call " +
                     std::to_string(run.call()) +
                     " of the group. Look at that rank's own output for the cause; this group cannot go on.");
  }
}

struct Late {
  int rank;
  bool waits;  // for others, and moves on in that
};

// The rank that the others wait for in the end: of those that do not move, the one furthest behind. A rank of
// another node that waits for nothing publishes nothing, so it may be further than it seems: the rank that is
// waited for here comes before it.
Late find_late(Domain& domain, const Run& run) {
  domain.hear();
  std::vector<uint64_t> beats;
  for (int rank = 0; rank < domain.size(); ++rank) beats.push_back(domain.waker(rank).heartbeat.load());
  for (int i = 0; i < 12; ++i) {  // others that are late at the same moment must see this rank wait
    domain.waker(domain.rank()).heartbeat.fetch_add(1, std::memory_order_relaxed);
    domain.publish();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  domain.hear();
  int late = run.blocked_on().peer;
  const auto moves = [&](int rank) { return domain.waker(rank).heartbeat.load() != beats[rank]; };
  const bool waits = moves(late);
  uint64_t least = UINT64_MAX;
  for (int rank = 0; rank < domain.size(); ++rank) {
    const Member& peer = domain.member(rank);
    const uint64_t entered = peer.entered.load(std::memory_order_acquire);
    if (rank == domain.rank() || peer.finished.load() >= run.call()) continue;
    if (moves(rank) || entered >= least) continue;
    if (domain.place_of(rank) < 0 && !waits && rank != run.blocked_on().peer) continue;
    late = rank;
    least = entered;
  }
  return {late, moves(late)};
}

// Makes what keeps a call from going on the group's failure.
void look_for_trouble(const Pending& call) {
  Domain& domain = *call.domain;
  const Run& run = *call.run;
  const auto before = run.call() > 1 ? domain.record_of(domain.rank(), run.call() - 1) : std::nullopt;
  auto mismatch = before ? find_mismatch(domain, run.call() - 1, *before) : std::nullopt;
  if (!mismatch) mismatch = find_mismatch(domain, run.call(), run.record());
  if (mismatch) domain.fail(FailureKind::mismatch, *mismatch);
  if (!domain.failed()) look_for_losses(domain, run);
  if (!domain.failed() && run.mismatched() >= 0 && now_s() - call.started > kRecordLate) {
    domain.fail(
        FailureKind::mismatch,
        rank_name(domain, domain.rank()) + " called " + describe(run.record()) + " where " +
            rank_name(domain, run.mismatched()) +
            " called something else, and has not said yet what. All ranks must make the same calls in "
            "the same order with the same arguments.");
  }
  if (domain.failed() || now_s() - call.started <= call.timeout_s) return;
  const auto [late, waits] = find_late(domain, run);
  if (run.blocked_on().met()) return;
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%g", call.timeout_s);
  domain.fail(FailureKind::timeout,
              rank_name(domain, domain.rank()) + " waited " + seconds + " s in " + describe(run.record()) +
                  " for " + rank_name(domain, late) + ", which " +
                  (waits                                             ? "waits for others itself"
                   : domain.member(late).entered.load() < run.call() ? "has not called it"
                                                                     : "has called it but does not move") +
                  " (pid " + std::to_string(domain.pid_of(late)) +
                  "). Is it stopped, or slower than the timeout (timeout=, PYCOMM_TIMEOUT) allows?");
}

}  // namespace

std::optional<std::string> find_mismatch(const Domain& domain, uint64_t call, const CallRecord& ours) {
  for (int rank = 0; rank < domain.size(); ++rank) {
    const auto theirs = domain.record_of(rank, call);
    if (!theirs || theirs->fingerprint == ours.fingerprint) continue;
    return rank_name(domain, domain.rank()) + " called " + describe(ours) + " where " +
           rank_name(domain, rank) + " called " + describe(*theirs) +
           (ours.side == CallRecord::Side::both
                ? " (call " + std::to_string(call) +
                      " of the group). All ranks must make the same calls in the same order with the same "
                      "arguments."
                : ". What a rank sends the other receives in the same order: as many elements of the same "
                  "type, "
                  "with the same tag.");
  }
  return std::nullopt;
}

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

WaitPolicy wait_policy(int ranks, int cores) { return {.spin_us = env().spin_us, .yield = ranks > cores}; }

void wait(std::span<Pending* const> calls, const WaitPolicy& policy, Patience& patience,
          const Blocked* also) {
  const Hopes hopes(calls, also);
  const bool hopeless =
      std::ranges::any_of(calls, [](const Pending* c) { return c->run->mismatched() >= 0; });
  if (!hopeless && policy.spin_us > 0 && met_soon(*calls[0], hopes, policy, patience)) return;
  patience.on_block();
  Domain& group = *calls[0]->domain;
  double nap = 0.0005, ticked = now_s(), turned = ticked;
  for (Pending* call : calls) {
    if (call->started == 0) call->started = ticked;
  }
  while (!hopes.met()) {
    // A job that was stopped, or whose machine slept, does not come back to a deadline that has passed.
    const double now = now_s();
    if (const double stood = now - turned - kLongestTurn; stood > 0) {
      for (Pending* call : calls) call->started += stood;
    }
    turned = now;
    group.waker(group.rank()).heartbeat.fetch_add(1, std::memory_order_relaxed);
    for (const Pending* call : calls) {
      call->domain->hear();
      look_for_trouble(*call);
      if (!group.failed()) continue;
      if (hopes.met()) return;  // in time: others may have failed in a later call
      group.raise_failure(Domain::Caller::under_way);
    }
    if (now - ticked > kTick) {
      ticked = now;
      for (const Pending* call : calls) call->domain->publish();
      try {
        patience.on_tick();
        turned = now_s();  // it may wait for the interpreter's lock, and that time counts
      } catch (...) {
        group.fail(FailureKind::aborted, rank_name(group, group.rank()) + " was interrupted in " +
                                             describe(calls[0]->run->record()) + "; the group cannot go on.");
        throw;
      }
    }
    group.waker(group.rank()).doorbell.sleep(nap, [&] { return hopes.met(); });
    nap = std::min(nap * 2, 0.005);
  }
}

}  // namespace pycomm::runtime
