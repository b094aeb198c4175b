#include "runtime/queue.h"

#include <sched.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>

#include "common/error.h"
#include "common/log.h"
#include "schedule/lower/layout.h"

namespace pycomm::runtime {

using transport::Board;

namespace {
constexpr int64_t kShortBytes = 64 << 10;  // moved in less time than another thread takes to wake up

bool shorter_than_waking(const Bound& bound) {
  const auto is_certain = [](const Prelude& prelude) { return !prelude.wanted; };
  if (bound.before || std::ranges::any_of(bound.preludes, is_certain)) return false;
  const schedule::Call& call = bound.prepared->plan.call;
  const int root = call.world.root;
  const int64_t elements = std::max(schedule::in_elements(call, root), schedule::out_elements(call, root));
  return elements * static_cast<int64_t>(size_of(call.dtype)) <= kShortBytes;
}

// Keeps this thread on one of the cores that it may use, as PYCOMM_PROGRESS_CORE names it.
void stay_on_core(int core) {
  cpu_set_t allowed;
  if (core == 0 || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  std::vector<int> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed)) cores.push_back(cpu);
  }
  const auto count = static_cast<int>(cores.size());
  if (std::abs(core) > count) {
    log(LogLevel::warn, "PYCOMM_PROGRESS_CORE=" + std::to_string(core) + ", and this process may use " +
                            std::to_string(count) + " cores: the progress thread runs on any of them");
    return;
  }
  CPU_ZERO(&allowed);
  CPU_SET(cores[core > 0 ? core - 1 : count + core], &allowed);
  sched_setaffinity(0, sizeof allowed, &allowed);
}
}  // namespace

Queue::~Queue() {
  if (!forked()) return;  // the parent's: its threads are not here
  if (progress_.joinable()) progress_.detach();
  for (auto* condition : {&changed_, &work_left_}) {
    new (condition) std::condition_variable;  // the parent's would wait for its waiters, who are not here
  }
}

void Queue::refuse_child() const {
  if (!forked()) return;
  throw CommError(
      "this communicator belongs to the parent process: a child of fork() cannot use it. Call pycomm.init() "
      "in "
      "the processes that communicate.");
}

// What runs inside a call's wait (a signal handler) cannot wait for that call to end.
void Queue::refuse_reentry() const {
  if (!token_.held()) return;
  throw CommError("rank " + std::to_string(domain_.rank()) +
                  " made a call inside another one of the same group and thread, as from a signal handler: "
                  "let the handler set a flag, and call when the other one has returned");
}

double Queue::progress_seconds() {
  const std::lock_guard lock(mutex_);
  clockid_t clock;
  timespec time{};
  if (!progress_.joinable() || pthread_getcpuclockid(progress_.native_handle(), &clock) != 0 ||
      clock_gettime(clock, &time) != 0) {
    return 0;
  }
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

void Queue::check_usable() {
  refuse_child();
  if (closed())
    throw AbortedError("rank " + std::to_string(domain_.rank()) + " has closed this communicator");
  if (!domain_.board().failed()) return;
  if (const Holding token(*this); token) settle();  // a rank that learns of it here has stopped as well
  domain_.board().raise_failure(transport::Board::Caller::starting);
}

bool Queue::stop(Patience& patience, std::exception_ptr& interrupted) {
  if (on_progress_thread()) {
    throw CommError(
        "rank " + std::to_string(domain_.rank()) +
        " closes its communicator in a completion callback, on the thread that drives its calls: let "
        "the callback set a flag, and close where the calls are made");
  }
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(stopping_, true)) return false;
  }
  work_left_.notify_all();
  while (!idle()) {
    patience.on_block();
    {
      std::unique_lock lock(mutex_);
      changed_.wait_for(lock, std::chrono::milliseconds(20), [&] { return queues_.empty(); });
    }
    if (interrupted) continue;
    try {
      patience.on_tick();
    } catch (...) {
      interrupted = std::current_exception();
      domain_.board().fail(FailureKind::aborted,
                           "rank " + std::to_string(domain_.rank()) +
                               " was interrupted in close(), with calls that had not ended");
    }
  }
  patience.on_block();
  if (progress_.joinable()) progress_.join();  // it finishes what is queued
  closed_.store(true);
  return true;
}

// ---- blocking calls ----

void Queue::run(const Bound& call, Patience& patience) { run_all(std::array{&call}, patience); }

void Queue::run_both(const Bound& first, const Bound& second, Patience& patience) {
  run_all(std::array{&first, &second}, patience);
}

template <size_t N>
void Queue::run_all(const std::array<const Bound*, N>& calls, Patience& patience) {
  if (idle()) {
    const Holding token(*this);
    if (token && idle()) {
      try {
        return run_at_once(calls, patience);
      } catch (...) {
        settle();
        throw;
      }
    }
  }
  run_queued(calls, patience);
}

// What a call's functions throw ends it before anything has begun, if there are two (messages have none).
template <size_t N>
void Queue::run_at_once(const std::array<const Bound*, N>& calls, Patience& patience) {
  check_usable();
  std::array<Execution, N> executions;
  for (size_t i = 0; i < N; ++i) executions[i] = Execution(*calls[i], sequences_.of(calls[i]->sequence()));
  for (Execution& execution : executions) execution.start();
  for (size_t left = N;;) {
    const int polls = left > 1 ? 1 : fabric_.policy.polls();
    for (size_t i = left; i-- > 0;) {
      if (executions[i].advance(polls)) std::swap(executions[i], executions[--left]);
    }
    if (left == 0) return;
    std::array<Pending*, N> pending;
    for (size_t i = 0; i < left; ++i) pending[i] = &executions[i].pending();
    const Blocked submission{&queued_, 1};
    wait({pending.data(), left}, fabric_.policy, patience, &submission);
    if (submission.met()) return join({executions.data(), left}, patience);
  }
}

void Queue::run_queued(std::span<const Bound* const> calls, Patience& patience) {
  refuse_reentry();
  const Driving here(*this);  // so that nobody is woken to do it
  std::vector<std::shared_ptr<Work>> works;
  std::exception_ptr error;  // the first one; what has been submitted is waited for all the same
  const auto attempt = [&](const auto& action) {
    try {
      action();
    } catch (...) {
      if (!error) error = std::current_exception();
    }
  };
  for (const Bound* call : calls) attempt([&] { works.push_back(submit(*call)); });
  for (const auto& work : works) attempt([&] { wait_for(work, patience); });
  if (error) std::rethrow_exception(error);
}

// The caller's buffers are its own again when this returns or throws.
void Queue::wait_for(const std::shared_ptr<Work>& work, Patience& patience) {
  try {
    work->wait(INFINITY, patience);
  } catch (...) {
    if (!work->is_completed()) {
      domain_.board().fail(FailureKind::aborted, "rank " + std::to_string(domain_.rank()) +
                                                     " was interrupted in a call; the group cannot go on.");
      patience.on_block();
      Patience none;
      drive(*work, none);
    }
    throw;
  }
}

// Another thread has made a call, which these, that have begun, may be waiting for in the end.
void Queue::join(std::span<const Execution> begun, Patience& patience) {
  std::vector<std::shared_ptr<Work>> works;
  for (const Execution& execution : begun) {
    auto work = works.emplace_back(std::make_shared<Work>());
    work->owner_ = this;
    work->taken_up_ = true;
    active_.push_back({work, execution});
    const std::lock_guard lock(mutex_);
    queues_[execution.sequence()].push_front(work);
    queued_.fetch_add(1, std::memory_order_release);
  }
  const auto completed = [&] {
    return std::ranges::all_of(works, [](const auto& work) { return work->is_completed(); });
  };
  try {
    while (!completed()) complete_some(patience, fabric_.policy);
  } catch (...) {         // interrupted, and the group has failed
    patience.on_block();  // others must be able to complete their calls
    Patience none;
    while (!completed()) complete_some(none, fabric_.policy);
    throw;
  }
  for (const auto& work : works) {
    if (work->error_) std::rethrow_exception(work->error_);
  }
}

// ---- the queue ----

std::shared_ptr<Work> Queue::submit(Bound bound) {
  check_usable();
  const bool is_short = shorter_than_waking(bound);
  auto work = std::make_shared<Work>();
  work->owner_ = this;
  work->bound_ = std::move(bound);
  bool first = false;
  {
    const std::lock_guard lock(mutex_);
    if (stopping_)
      throw AbortedError("rank " + std::to_string(domain_.rank()) + " is closing this communicator");
    if (!progress_.joinable()) progress_ = std::thread([this] { progress(); });
    queues_[work->bound_.sequence()].push_back(work);
    first = queued_.fetch_add(1) == 0;
  }
  attention_.fetch_add(1);
  if (first && is_short) {
    const Holding token(*this);
    if (token) advance_all(1);
  }
  domain_.board().waker().doorbell.ring();  // whoever drives may sleep
  if (!work->is_completed()) wake_progress();
  return work;
}

int Queue::find_sender(const std::vector<int>& skip) {
  check_usable();
  refuse_reentry();
  Board& board = domain_.board();
  const int me = domain_.rank(), size = domain_.size();
  if (!board.group().nodes.empty()) {
    throw ValueError("find_sender knows the ranks of one node, and this group is on several: name a source");
  }
  const Driving here(*this);
  attention_.fetch_add(1);  // of the progress thread, which may hold the token in its sleep
  board.waker().doorbell.ring();
  const Holding token(*this, Holding::wait);
  bool any_open = size == 1 || !skip.empty();
  for (int i = 1; i <= size; ++i) {
    const int src = (last_sender_ + i) % size;
    if (src == me || std::ranges::find(skip, src) != skip.end()) continue;
    const bool closed = board.closed(src), dead = board.group().dead(src);  // it may have sent before that
    bool received = false;
    {
      const std::lock_guard lock(mutex_);
      received = queues_.contains({src, me});
    }
    if (!received && domain_.channel_offset(src, me).load(std::memory_order_acquire) != 0) {
      const Sequence& messages = sequences_.of({src, me});
      if (messages.domain().board().member(0).entered.load(std::memory_order_acquire) > messages.calls()) {
        return last_sender_ = src;
      }
    }
    any_open = any_open || received || !closed;
    if (closed || !dead) continue;
    board.fail(FailureKind::peer_lost, board.name_of(src) + " (pid " +
                                           std::to_string(board.group().pid_of(src)) + ") has ended, where " +
                                           board.name() + " looks for a message of any rank. Look at that " +
                                           "rank's own output for the cause; this group cannot go on.");
  }
  if (!any_open) {
    board.fail(FailureKind::peer_lost, "all other ranks have closed their communicators, where " +
                                           board.name() + " looks for a message of any rank.");
  }
  if (!board.failed()) return -1;
  settle();
  board.raise_failure(Board::Caller::under_way);
}

// After an error: what peers were told is held until they have stopped, and they hear that this rank has.
void Queue::settle() {
  if (forked() || !domain_.board().failed()) return;
  domain_.board().withdraw_messages();
  domain_.board().hold_told();
  if (active_.empty()) domain_.board().stop();
}

// Starts the first call of every sequence that has one.
void Queue::take_up() {
  std::vector<std::shared_ptr<Work>> fresh;
  {
    const std::lock_guard lock(mutex_);
    for (auto& [sequence, queue] : queues_) {
      if (std::exchange(queue.front()->taken_up_, true)) continue;
      fresh.push_back(queue.front());
    }
  }
  for (auto& work : fresh) {
    Active active{.work = work};
    try {
      if (domain_.board().failed())
        domain_.board().raise_failure(transport::Board::Caller::under_way);  // it was made before that
      active.execution = Execution(work->bound_, sequences_.of(work->bound_.sequence()));
      active.execution.start();
      active_.push_back(std::move(active));
    } catch (...) {
      work->error_ = std::current_exception();
      settle();
      complete(active);
    }
  }
}

// True when the call has ended, well or not.
bool Queue::go_on(Active& active, int polls) {
  try {
    return active.execution.advance(polls);
  } catch (...) {
    active.work->error_ = std::current_exception();
    settle();
    return true;
  }
}

void Queue::complete(Active& active) {
  Work& work = *active.work;
  work.bound_ = {};
  const std::lock_guard lock(mutex_);
  const auto queue =
      std::ranges::find_if(queues_, [&](const auto& q) { return q.second.front() == active.work; });
  queue->second.pop_front();
  if (queue->second.empty()) queues_.erase(queue);
  queued_.fetch_sub(1, std::memory_order_release);
  work.done_.store(true, std::memory_order_release);
  if (!work.callbacks_.empty()) {
    std::ranges::move(work.callbacks_, std::back_inserter(due_));
    work.callbacks_.clear();
    any_due_.store(true, std::memory_order_relaxed);
  }
  changed_.notify_all();
}

// As far as what is queued can go without waiting. True if a call has ended, or there is none.
bool Queue::advance_all(int polls) {
  take_up();
  if (active_.size() > 1) polls = 1;
  const auto ended =
      std::stable_partition(active_.begin(), active_.end(), [&](Active& a) { return !go_on(a, polls); });
  const bool any = ended != active_.end();
  std::for_each(ended, active_.end(), [&](Active& a) { complete(a); });
  active_.erase(ended, active_.end());
  if (any) settle();
  return any || active_.empty();
}

// Runs what is queued until a call has ended, if there is one, or another thread draws attention.
void Queue::complete_some(Patience& patience, const WaitPolicy& policy) {
  const uint64_t seen = attention_.load(std::memory_order_acquire);
  const Blocked attention{&attention_, seen + 1};
  while (!advance_all(policy.polls())) {
    std::vector<Pending*> pending;
    for (Active& active : active_) pending.push_back(&active.execution.pending());
    try {
      wait(pending, policy, patience, &attention);
    } catch (const CommError&) {  // the group's
      settle();
      for (Active& active : active_) {
        active.work->error_ = std::current_exception();
        complete(active);
      }
      active_.clear();
      settle();
      return;
    }
    if (attention.met()) return;
  }
}

// Drives what nobody waits for. Whoever comes to wait drives sooner than another thread can wake up: so
// this one stands back while somebody is there, and lets the thread that woke it go on first, if they share
// a core. (A sleep would cost more than most calls: a timer is an exit of a virtual machine.)
void Queue::progress() {
  stay_on_core(env().progress_core);
  Patience patience;
  for (bool rested = true;; rested = false) {
    {
      std::unique_lock lock(mutex_);
      while (!stopping_ && (queues_.empty() || drivers_ > 0)) {
        rests_ = rested = true;
        work_left_.wait(lock);
        rests_ = false;
      }
      if (queues_.empty()) return;
    }
    if (rested) {
      sched_yield();
      if (drivers_ > 0) continue;
    }
    const Holding token(*this, Holding::wait);
    complete_some(patience, fabric_.background);
  }
}

void Queue::wake_progress() {
  if (drivers_ > 0) return;
  const std::lock_guard lock(mutex_);
  if (rests_) work_left_.notify_one();
}

Queue::Holding::~Holding() {
  if (!held_) return;
  queue_.token_.unlock();
  if (queue_.token_waiters_ != 0) {
    const std::lock_guard lock(queue_.mutex_);
    queue_.changed_.notify_all();
  }
  if (queue_.any_due_.load(std::memory_order_relaxed)) [[unlikely]]
    queue_.deliver();
}

Queue::Driving::~Driving() {
  if (queue_.drivers_.fetch_sub(1) == 1 && queue_.queued_.load() != 0) queue_.wake_progress();
}

void Queue::deliver() {
  std::vector<std::function<void()>> due;
  {
    const std::lock_guard lock(mutex_);
    due.swap(due_);
    any_due_.store(false, std::memory_order_relaxed);
  }
  for (const auto& callback : due) callback();
}

void Queue::drive(const Work& work, Patience& patience) {
  const Driving here(*this);
  attention_.fetch_add(1);  // of the progress thread, which may hold the token in its sleep
  domain_.board().waker().doorbell.ring();
  while (!work.is_completed()) {
    if (const Holding token(*this); token) {
      complete_some(patience, fabric_.policy);
      continue;
    }
    refuse_reentry();
    patience.on_block();
    {
      std::unique_lock lock(mutex_);
      ++token_waiters_;
      changed_.wait_for(lock, std::chrono::milliseconds(20),
                        [&] { return work.is_completed() || !token_.taken(); });
      --token_waiters_;
    }
    patience.on_tick();
  }
}

// ---- works ----

void Work::wait(double timeout_s, Patience& patience) {
  if (!is_completed()) owner_->refuse_child();
  if (is_completed()) {
  } else if (std::isinf(timeout_s)) {
    owner_->drive(*this, patience);
  } else {
    for (const double end = now_s() + timeout_s;;) {
      patience.on_block();
      {
        std::unique_lock lock(owner_->mutex_);
        const double slice = std::min(end - now_s(), 0.02);
        if (owner_->changed_.wait_for(lock, std::chrono::duration<double>(slice),
                                      [&] { return is_completed(); })) {
          break;
        }
      }
      if (now_s() >= end) {
        throw CommTimeoutError("the call has not completed within " + std::to_string(timeout_s) +
                               " s; it goes on: wait again, or close the communicator");
      }
      patience.on_tick();
    }
  }
  if (error_) std::rethrow_exception(error_);
}

void Work::on_completion(std::function<void()> callback) {
  if (!is_completed()) {
    const std::lock_guard lock(owner_->mutex_);
    if (!is_completed()) return callbacks_.push_back(std::move(callback));
  }
  callback();
}

}  // namespace pycomm::runtime
