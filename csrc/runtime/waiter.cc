#include "runtime/waiter.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>

#include "common/env.h"
#include "common/error.h"

namespace pycomm::runtime {

using transport::Board;

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
  first.domain->board().waker().cpu.store(cpu, std::memory_order_relaxed);
  const std::atomic<int32_t>& peer_cpu = first.domain->board().waker(first.run->blocked_on().peer).cpu;
  while (now_s() < end) {
    if (peer_cpu.load(std::memory_order_relaxed) != cpu && hopes.met(kSpinBeforeYield)) return true;
    patience.on_block();
    sched_yield();
    if (hopes.met()) return true;
  }
  return false;
}

// A peer that ended before it finished this call is lost, unless what is waited for came before its end.
void look_for_losses(Board& board, const Run& run) {
  const auto lost = board.find_lost(run.call());
  if (!lost || run.blocked_on().met()) return;
  const std::string error = board.last_words_of(*lost);
  board.fail(
      FailureKind::peer_lost,
      board.closed(*lost)
          ? board.name_of(*lost) +
                (error.empty() ? " closed its communicator" : " left the group because of an error") +
                " before " + describe(run.record()) + ", which " + board.name() + " had called" +
                (error.empty() ? "." : ": " + error)
          : board.name_of(*lost) + " (pid " + std::to_string(board.group().pid_of(*lost)) +
                ") has ended in or before " + describe(run.record()) + ", call " +
                std::to_string(run.call()) +
                " of the group. Look at that rank's own output for the cause; this group cannot go on.");
}

// Makes what keeps a call from going on the group's failure.
void look_for_trouble(const Pending& call) {
  Board& board = call.domain->board();
  const Run& run = *call.run;
  const auto before = run.call() > 1 ? record_of(board, board.group().rank, run.call() - 1) : std::nullopt;
  auto mismatch = before ? find_mismatch(board, run.call() - 1, *before) : std::nullopt;
  if (!mismatch) mismatch = find_mismatch(board, run.call(), run.record());
  if (mismatch) board.fail(FailureKind::mismatch, *mismatch);
  if (!board.failed()) look_for_losses(board, run);
  if (!board.failed() && run.mismatched() >= 0 && now_s() - call.started > kRecordLate) {
    board.fail(FailureKind::mismatch,
               board.name() + " called " + describe(run.record()) + " where " +
                   board.name_of(run.mismatched()) +
                   " called something else, and has not said yet what. All ranks must make the same calls in "
                   "the same order with the same arguments.");
  }
  if (board.failed() || now_s() - call.started <= call.timeout_s) return;
  const auto [late, waits] = board.find_late(run.call(), run.blocked_on().peer);
  if (run.blocked_on().met()) return;
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%g", call.timeout_s);
  board.fail(FailureKind::timeout,
             board.name() + " waited " + seconds + " s in " + describe(run.record()) + " for " +
                 board.name_of(late) + ", which " +
                 (waits                                            ? "waits for others itself"
                  : board.member(late).entered.load() < run.call() ? "has not called it"
                                                                   : "has called it but does not move") +
                 " (pid " + std::to_string(board.group().pid_of(late)) +
                 "). Is it stopped, or slower than the timeout (timeout=, PYCOMM_TIMEOUT) allows?");
}

}  // namespace

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
    group.board().waker().heartbeat.fetch_add(1, std::memory_order_relaxed);
    for (const Pending* call : calls) {
      call->domain->board().hear();
      look_for_trouble(*call);
      if (!group.board().failed()) continue;
      if (hopes.met()) return;  // in time: others may have failed in a later call
      group.board().raise_failure(transport::Board::Caller::under_way);
    }
    if (now - ticked > kTick) {
      ticked = now;
      for (const Pending* call : calls) call->domain->board().publish();
      try {
        patience.on_tick();
        turned = now_s();  // it may wait for the interpreter's lock, and that time counts
      } catch (...) {
        group.board().fail(FailureKind::aborted, group.board().name() + " was interrupted in " +
                                                     describe(calls[0]->run->record()) +
                                                     "; the group cannot go on.");
        throw;
      }
    }
    group.board().waker().doorbell.sleep(nap, [&] { return hopes.met(); });
    nap = std::min(nap * 2, 0.005);
  }
}

}  // namespace pycomm::runtime
