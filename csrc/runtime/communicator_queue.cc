// Running calls: at once where nothing is queued, else as part of the queue.
#include <sched.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "common/error.h"
#include "runtime/communicator.h"
#include "schedule/layout.h"

namespace pycomm::runtime {

namespace {
constexpr int64_t kShortBytes = 64 << 10;  // moved in less time than another thread takes to wake up

bool shorter_than_waking(const Bound& bound) {
  if (bound.before || bound.agreement) return false;
  const schedule::Call& call = bound.prepared->plan.call;
  const int root = call.world.root;
  const int64_t elements = std::max(schedule::in_elements(call, root), schedule::out_elements(call, root));
  return elements * static_cast<int64_t>(size_of(call.dtype)) <= kShortBytes;
}
}  // namespace

// ---- at once ----

void Communicator::run(const Bound& bound, Patience& patience) {
  if (queued_.load(std::memory_order_acquire) == 0) {
    const Holding token(*this);
    if (token && queued_.load(std::memory_order_acquire) == 0) return run_alone(bound, patience);
  }
  refuse_reentry();
  const Driving here(*this);  // so that nobody is woken to do it
  const auto work = submit(bound);
  run_queued(work, patience);
}

// What runs inside a call's wait (a signal handler) cannot wait for that call to end.
void Communicator::refuse_reentry() const {
  if (!token_.held()) return;
  throw CommError("rank " + std::to_string(rank()) +
                  " made a call inside another one of the same group and thread, as from a signal handler: "
                  "let the handler set a flag, and call when the other one has returned");
}

void Communicator::run_alone(const Bound& asked, Patience& patience) {
  check_usable();
  const Bound* bound = &asked;
  if (asked.before) asked.before();
  if (Agreement* agreement = asked.agreement.get()) {
    if (agreement->ask) agreement->ask(asked);
    run_alone(agreement->exchange, patience);
    bound = &agreement->conclude(asked);
  }
  Sequence& sequence = sequence_of(*bound);
  sequence.start(*bound->prepared, bound->buffers, bound->record);
  Pending pending = sequence.pending(bound->timeout_s);
  while (!sequence.run().advance(policy_.polls())) {
    const Blocked submission{&queued_, 1};
    wait({&pending, 1}, policy_, patience, &submission);
    if (submission.met()) {
      Active active{nullptr, bound, &sequence, pending};
      join_queue({&active, 1}, patience);
      if (asked.then) asked.then();
      return;
    }
  }
  sequence.finish();
  if (asked.then) asked.then();
}

void Communicator::run_both(const Bound& first, const Bound& second, Patience& patience) {
  if (queued_.load(std::memory_order_acquire) == 0) {
    const Holding token(*this);
    if (token && queued_.load(std::memory_order_acquire) == 0) {
      return run_both_alone(first, second, patience);
    }
  }
  refuse_reentry();
  const Driving here(*this);
  const std::array works = {submit(first), submit(second)};
  std::exception_ptr error;
  for (const auto& work : works) {
    try {
      run_queued(work, patience);
    } catch (...) {
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

void Communicator::run_both_alone(const Bound& first, const Bound& second, Patience& patience) {
  check_usable();
  for (const Bound* bound : {&first, &second}) sequence_of(*bound);  // throws before anything has begun
  std::array<Active, 2> calls;
  for (const Bound* bound : {&first, &second}) start(calls[bound == &second], *bound);
  for (size_t left = calls.size();;) {
    for (size_t i = left; i-- > 0;) {
      Sequence& sequence = *calls[i].sequence;
      if (sequence.run().mismatched() >= 0 || !sequence.run().advance()) continue;
      sequence.finish();
      std::swap(calls[i], calls[--left]);
    }
    if (left == 0) return;
    std::array pending = {calls[0].pending, calls[1].pending};
    const Blocked submission{&queued_, 1};
    wait({pending.data(), left}, policy_, patience, &submission);
    for (size_t i = 0; i < left; ++i) calls[i].pending = pending[i];
    if (submission.met()) return join_queue({calls.data(), left}, patience);
  }
}

// Another thread has made a call, which these, that have begun, may be waiting for in the end.
void Communicator::join_queue(std::span<Active> begun, Patience& patience) {
  for (Active& active : begun) {
    auto work = active.work = std::make_shared<Work>();
    work->owner_ = this;
    work->bound_ = *active.bound;
    work->bound_.agreement = nullptr;  // that is done
    work->bound_.before = nullptr;
    work->bound_.then = nullptr;
    work->taken_up_ = true;
    active_.push_back({work, &work->bound_, active.sequence, active.pending});
    const std::lock_guard lock(queue_mutex_);
    queues_[work->bound_.sequence()].push_front(work);
    queued_.fetch_add(1, std::memory_order_release);
  }
  const auto completed = [&] {
    return std::ranges::all_of(begun, [](const Active& a) { return a.work->is_completed(); });
  };
  try {
    while (!completed()) complete_some(patience, policy_);
  } catch (...) {         // interrupted, and the group has failed
    patience.on_block();  // others must be able to complete their calls
    Patience none;
    while (!completed()) complete_some(none, policy_);
    throw;
  }
  for (const Active& active : begun) {
    if (active.work->error_) std::rethrow_exception(active.work->error_);
  }
}

// A blocking call as part of the queue: the caller's buffers are its own again when this returns or throws.
void Communicator::run_queued(const std::shared_ptr<Work>& work, Patience& patience) {
  try {
    work->wait(INFINITY, patience);
  } catch (...) {
    if (!work->is_completed()) {
      domain_->fail(FailureKind::aborted,
                    "rank " + std::to_string(rank()) + " was interrupted in a call; the group cannot go on.");
      patience.on_block();
      Patience none;
      drive(*work, none);
    }
    throw;
  }
}

Sequence& Communicator::sequence_of(const Bound& bound) {
  if (bound.src < 0) return collectives_;
  const auto found = channels_.find(bound.sequence());
  if (found != channels_.end()) return found->second.messages;
  transport::Node& node = domain_->node();
  std::atomic<int64_t>& offset = domain_->channel_offset(bound.src, bound.dst);
  int64_t there = offset.load(std::memory_order_acquire);
  if (there == 0) {
    const int64_t bytes = Domain::bytes(2), made = node.reserve(bytes);
    if (offset.compare_exchange_strong(there, made, std::memory_order_acq_rel)) {
      there = made;
    } else {
      node.release(made, bytes);
    }
  }
  const std::vector<int> pair = {domain_->node_ranks()[bound.src], domain_->node_ranks()[bound.dst]};
  auto domain = std::make_unique<Domain>(domain_->shared_node(), pair, rank() == bound.src ? 0 : 1, there,
                                         kBankBytes, domain_.get());
  return channels_.try_emplace(bound.sequence(), std::move(domain)).first->second.messages;
}

// ---- the queue ----

// A short call is begun by the thread that makes it: peers find its data sooner, and where their data is
// there already, no other thread has to wake up for it.
std::shared_ptr<Work> Communicator::submit(Bound bound) {
  check_usable();
  const bool is_short = shorter_than_waking(bound);
  auto work = std::make_shared<Work>();
  work->owner_ = this;
  work->bound_ = std::move(bound);
  bool first = false;
  {
    const std::lock_guard lock(queue_mutex_);
    if (stopping_) throw AbortedError("rank " + std::to_string(rank()) + " is closing this communicator");
    if (!progress_.joinable()) progress_ = std::thread([this] { progress(); });
    queues_[work->bound_.sequence()].push_back(work);
    first = queued_.fetch_add(1) == 0;
  }
  attention_.fetch_add(1);
  if (first && is_short) {
    const Holding token(*this);
    if (token) advance_all(1);
  }
  domain_->ring(rank());  // whoever drives may sleep
  if (!work->is_completed()) wake_progress();
  return work;
}

void Communicator::start(Active& active, const Bound& bound) {
  active.bound = &bound;
  active.sequence = &sequence_of(bound);
  active.sequence->start(*bound.prepared, bound.buffers, bound.record);
  active.pending = active.sequence->pending(bound.timeout_s);
}

// Starts the first call of every sequence that has one.
void Communicator::take_up() {
  std::vector<std::shared_ptr<Work>> fresh;
  {
    const std::lock_guard lock(queue_mutex_);
    for (auto& [sequence, queue] : queues_) {
      if (std::exchange(queue.front()->taken_up_, true)) continue;
      fresh.push_back(queue.front());
    }
  }
  for (auto& work : fresh) {
    Active active{.work = work};
    try {
      if (domain_->failed()) domain_->raise_failure(Domain::Caller::under_way);  // it was made before that
      if (work->bound_.before) work->bound_.before();
      Agreement* agreement = work->bound_.agreement.get();
      if (agreement && agreement->ask) agreement->ask(work->bound_);
      start(active, agreement ? agreement->exchange : work->bound_);
      active_.push_back(std::move(active));
    } catch (...) {
      work->error_ = std::current_exception();
      complete(active);
    }
  }
}

// True when the call has ended, well or not.
bool Communicator::go_on(Active& active, int polls) {
  const Bound& asked = active.work->bound_;
  try {
    for (;;) {
      if (active.sequence->run().mismatched() >= 0 || !active.sequence->run().advance(polls)) return false;
      active.sequence->finish();
      if (!asked.agreement || active.bound != &asked.agreement->exchange) break;
      start(active, asked.agreement->conclude(asked));
    }
    if (asked.then) asked.then();
  } catch (...) {
    active.work->error_ = std::current_exception();
  }
  return true;
}

void Communicator::complete(Active& active) {
  Work& work = *active.work;
  const auto sequence = work.bound_.sequence();
  work.bound_ = {};
  {
    const std::lock_guard lock(queue_mutex_);
    const auto queue = queues_.find(sequence);
    queue->second.pop_front();
    if (queue->second.empty()) queues_.erase(queue);
    queued_.fetch_sub(1, std::memory_order_release);
    work.done_.store(true, std::memory_order_release);
  }
  queue_changed_.notify_all();
}

// As far as what is queued can go without waiting. True if a call has ended, or there is none.
bool Communicator::advance_all(int polls) {
  take_up();
  if (active_.size() > 1) polls = 1;
  const auto ended =
      std::stable_partition(active_.begin(), active_.end(), [&](Active& a) { return !go_on(a, polls); });
  const bool any = ended != active_.end();
  std::for_each(ended, active_.end(), [&](Active& a) { complete(a); });
  active_.erase(ended, active_.end());
  return any || active_.empty();
}

// Runs what is queued until a call has ended, if there is one, or another thread draws attention.
void Communicator::complete_some(Patience& patience, const WaitPolicy& policy) {
  const uint64_t seen = attention_.load(std::memory_order_acquire);
  const Blocked attention{&attention_, seen + 1};
  while (!advance_all(policy.polls())) {
    std::vector<Pending> pending;
    for (const Active& active : active_) pending.push_back(active.pending);
    try {
      wait(pending, policy, patience, &attention);
    } catch (const CommError&) {  // the group's
      for (Active& active : active_) {
        active.work->error_ = std::current_exception();
        complete(active);
      }
      active_.clear();
      return;
    }
    for (size_t i = 0; i < active_.size(); ++i) active_[i].pending.started = pending[i].started;
    if (attention.met()) return;
  }
}

// Drives what nobody waits for. Whoever comes to wait drives sooner than another thread can wake up: so this
// one stands back while somebody is there, and lets the thread that woke it go on first, if they share a
// core. (A sleep would cost more than most calls: a timer is an exit of a virtual machine.)
void Communicator::progress() {
  Patience patience;
  for (bool rested = true;; rested = false) {
    {
      std::unique_lock lock(queue_mutex_);
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
    complete_some(patience, background_policy_);
  }
}

void Communicator::wake_progress() {
  if (drivers_ > 0) return;
  const std::lock_guard lock(queue_mutex_);
  if (rests_) work_left_.notify_one();
}

Communicator::Holding::~Holding() {
  if (!held_) return;
  comm_.token_.unlock();
  if (comm_.token_waiters_ == 0) return;
  const std::lock_guard lock(comm_.queue_mutex_);
  comm_.queue_changed_.notify_all();
}

Communicator::Driving::~Driving() {
  if (comm_.drivers_.fetch_sub(1) == 1 && comm_.queued_.load() != 0) {
    comm_.wake_progress();
  }
}

void Communicator::drive(const Work& work, Patience& patience) {
  const Driving here(*this);
  attention_.fetch_add(1);  // of the progress thread, which may hold the token in its sleep
  domain_->ring(rank());
  while (!work.is_completed()) {
    if (const Holding token(*this); token) {
      complete_some(patience, policy_);
      continue;
    }
    refuse_reentry();
    patience.on_block();
    {
      std::unique_lock lock(queue_mutex_);
      ++token_waiters_;
      queue_changed_.wait_for(lock, std::chrono::milliseconds(20),
                              [&] { return work.is_completed() || !token_.taken(); });
      --token_waiters_;
    }
    patience.on_tick();
  }
}

void Work::wait(double timeout_s, Patience& patience) {
  if (!is_completed()) owner_->refuse_child();
  if (is_completed()) {
  } else if (std::isinf(timeout_s)) {
    owner_->drive(*this, patience);
  } else {
    for (const double end = now_s() + timeout_s;;) {
      patience.on_block();
      {
        std::unique_lock lock(owner_->queue_mutex_);
        const double slice = std::min(end - now_s(), 0.02);
        if (owner_->queue_changed_.wait_for(lock, std::chrono::duration<double>(slice),
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

}  // namespace pycomm::runtime
