// Running calls: at once where nothing is queued, else as part of the queue.
#include <algorithm>
#include <cmath>
#include <utility>

#include "common/error.h"
#include "runtime/communicator.h"

namespace pycomm::runtime {

// ---- at once ----

void Communicator::run(const Bound& bound, Patience& patience) {
  if (queued_.load(std::memory_order_acquire) == 0) {
    const std::unique_lock token(token_, std::try_to_lock);
    if (token && queued_.load(std::memory_order_acquire) == 0) return run_alone(bound, patience);
  }
  refuse_reentry();
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
      join_queue(*bound, sequence, pending, patience);
      if (asked.then) asked.then();
      return;
    }
  }
  sequence.finish();
  if (asked.then) asked.then();
}

// Another thread has made a call, which this one may be waiting for in the end.
void Communicator::join_queue(const Bound& bound, Sequence& sequence, const Pending& pending,
                              Patience& patience) {
  auto work = std::make_shared<Work>();
  work->owner_ = this;
  work->bound_ = bound;
  work->bound_.agreement = nullptr;  // that is done
  work->bound_.before = nullptr;
  work->bound_.then = nullptr;
  work->taken_up_ = true;
  active_.push_back({work, &work->bound_, &sequence, pending});
  {
    const std::lock_guard lock(queue_mutex_);
    queues_[bound.sequence()].push_front(work);
    queued_.fetch_add(1, std::memory_order_release);
  }
  try {
    while (!work->is_completed()) complete_some(patience, policy_);
  } catch (...) {         // interrupted, and the group has failed
    patience.on_block();  // others must be able to complete their calls
    Patience none;
    while (!work->is_completed()) complete_some(none, policy_);
    throw;
  }
  if (work->error_) std::rethrow_exception(work->error_);
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
    const int64_t bytes = Domain::bytes(2, kChannelBankBytes), made = node.reserve(bytes);
    if (offset.compare_exchange_strong(there, made, std::memory_order_acq_rel)) {
      there = made;
    } else {
      node.release(made, bytes);
    }
  }
  const std::vector<int> pair = {domain_->node_ranks()[bound.src], domain_->node_ranks()[bound.dst]};
  auto domain = std::make_unique<Domain>(domain_->shared_node(), pair, rank() == bound.src ? 0 : 1, there,
                                         kChannelBankBytes, domain_.get());
  return channels_.try_emplace(bound.sequence(), std::move(domain)).first->second.messages;
}

// ---- the queue ----

std::shared_ptr<Work> Communicator::submit(Bound bound) {
  check_usable();
  auto work = std::make_shared<Work>();
  work->owner_ = this;
  work->bound_ = std::move(bound);
  {
    const std::lock_guard lock(queue_mutex_);
    if (stopping_) throw AbortedError("rank " + std::to_string(rank()) + " is closing this communicator");
    if (!progress_.joinable()) progress_ = std::thread([this] { progress(); });
    queues_[work->bound_.sequence()].push_back(work);
    queued_.fetch_add(1, std::memory_order_release);
  }
  queue_changed_.notify_all();
  domain_->ring(rank());  // whoever drives may sleep
  return work;
}

void Communicator::start(Active& active, const Bound& bound) {
  active.bound = &bound;
  active.sequence = &sequence_of(bound);
  active.sequence->start(*bound.prepared, bound.buffers, bound.record);
  active.pending = active.sequence->pending(bound.timeout_s);
}

// Starts the first call of every sequence that has one. Returns how many are queued in all.
uint64_t Communicator::take_up() {
  std::vector<std::shared_ptr<Work>> fresh;
  uint64_t queued = 0;
  {
    const std::lock_guard lock(queue_mutex_);
    for (auto& [sequence, queue] : queues_) {
      if (std::exchange(queue.front()->taken_up_, true)) continue;
      fresh.push_back(queue.front());
    }
    queued = queued_.load(std::memory_order_relaxed);
  }
  for (auto& work : fresh) {
    Active active{work, nullptr, nullptr, {}};
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
      --queued;
    }
  }
  return queued;
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

// Runs what is queued until a call has ended, if there is one.
void Communicator::complete_some(Patience& patience, const WaitPolicy& policy) {
  for (;;) {
    const uint64_t queued = take_up();
    const auto ended = std::stable_partition(
        active_.begin(), active_.end(),
        [&, polls = active_.size() > 1 ? 1 : policy.polls()](Active& a) { return !go_on(a, polls); });
    const bool any = ended != active_.end();
    std::for_each(ended, active_.end(), [&](Active& a) { complete(a); });
    active_.erase(ended, active_.end());
    if (any || active_.empty()) return;

    std::vector<Pending> pending;
    for (const Active& active : active_) pending.push_back(active.pending);
    const Blocked submission{&queued_, queued + 1};
    try {
      wait(pending, policy, patience, &submission);
    } catch (const CommError&) {  // the group's
      for (Active& active : active_) {
        active.work->error_ = std::current_exception();
        complete(active);
      }
      active_.clear();
      return;
    }
    for (size_t i = 0; i < active_.size(); ++i) active_[i].pending.started = pending[i].started;
  }
}

void Communicator::progress() {
  Patience patience;
  for (;;) {
    {
      std::unique_lock lock(queue_mutex_);
      queue_changed_.wait(lock, [&] { return stopping_ || !queues_.empty(); });
      if (queues_.empty()) return;
    }
    const std::lock_guard token(token_);
    complete_some(patience, background_policy_);
  }
}

void Communicator::drive(const Work& work, Patience& patience) {
  while (!work.is_completed()) {
    if (const std::unique_lock token(token_, std::try_to_lock); token) {
      complete_some(patience, policy_);
      continue;
    }
    refuse_reentry();
    patience.on_block();
    {
      std::unique_lock lock(queue_mutex_);
      queue_changed_.wait_for(lock, std::chrono::milliseconds(20), [&] { return work.is_completed(); });
    }
    patience.on_tick();
  }
}

void Work::wait(double timeout_s, Patience& patience) {
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
