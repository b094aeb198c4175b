#include "runtime/communicator.h"

#include <sched.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "common/env.h"
#include "common/error.h"
#include "common/log.h"

namespace pycomm::runtime {

namespace {
void rest(Patience& patience) {
  patience.on_block();
  const timespec nap{0, 500000};
  nanosleep(&nap, nullptr);
  patience.on_tick();
}
}  // namespace

struct Communicator::Channel {
  std::unique_ptr<Domain> domain;
  uint64_t calls = 0;
  bool last_exchanged = true;
  Run run;
};

// ---- coming and going ----

Communicator::Communicator(std::unique_ptr<Domain> domain, double timeout_s)
    : domain_(std::move(domain)),
      timeout_s_(timeout_s),
      fork_generation_(transport::fork_generation()),
      policy_{.spin_us = env().spin_us, .yield = true},
      background_policy_{.spin_us = 0, .yield = true},
      heap_(std::make_shared<Heap>(domain_->shared_node())) {
  register_for_fences();
}

std::shared_ptr<Communicator> Communicator::join(const transport::Node::Options& options) {
  auto node = transport::Node::join(options);
  auto& root = *reinterpret_cast<std::atomic<int64_t>*>(node->root_page() + 64);
  std::vector<int> ranks(options.size);
  for (int r = 0; r < options.size; ++r) ranks[r] = r;
  if (options.rank == 0) {
    try {
      root.store(node->reserve(Domain::bytes(options.size)), std::memory_order_release);
    } catch (...) {
      root.store(-1, std::memory_order_release);
      throw;
    }
  }
  while (root.load(std::memory_order_acquire) == 0) {
    if (node->dead(0) && root.load(std::memory_order_acquire) == 0) {
      throw PeerLostError("rank 0 ended while it made the group's memory");
    }
    if (options.on_wait) options.on_wait();
    timespec nap{0, 200000};
    nanosleep(&nap, nullptr);
  }
  const int64_t offset = root.load(std::memory_order_acquire);
  if (offset < 0) throw OutOfMemoryError("rank 0 could not reserve the group's shared memory; see its error");
  std::shared_ptr<Communicator> comm(
      new Communicator(std::make_unique<Domain>(node, ranks, options.rank, offset), options.timeout_s));
  comm->learn_cores();
  return comm;
}

std::vector<std::shared_ptr<Communicator>> Communicator::threads(int size, double timeout_s) {
  auto nodes = transport::Node::local(size);
  const int64_t offset = nodes[0]->reserve(Domain::bytes(size));
  std::vector<int> ranks(size);
  for (int r = 0; r < size; ++r) ranks[r] = r;
  std::vector<std::shared_ptr<Communicator>> comms;
  for (int r = 0; r < size; ++r) {
    comms.emplace_back(new Communicator(std::make_unique<Domain>(nodes[r], ranks, r, offset), timeout_s));
    const unsigned cores = std::thread::hardware_concurrency();
    comms[r]->policy_ = wait_policy(size, static_cast<int>(cores));
  }
  return comms;
}

// The cores that the ranks may use together decide whether spinning is polite.
void Communicator::learn_cores() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  sched_getaffinity(0, sizeof mask, &mask);
  std::vector<int64_t> words(sizeof mask / sizeof(int64_t));
  std::memcpy(words.data(), &mask, sizeof mask);
  Patience patience;
  const auto all = exchange(words, patience);
  int cores = 0;
  for (size_t w = 0; w < words.size(); ++w) {
    uint64_t together = 0;
    for (int r = 0; r < size(); ++r) together |= static_cast<uint64_t>(all[r * words.size() + w]);
    cores += std::popcount(together);
  }
  policy_ = wait_policy(size(), cores);
  if (cores > size()) background_policy_ = policy_;
  log(LogLevel::info, "joined ", size(), " ranks on ", cores, " cores: waits ",
      policy_.yield ? "yield" : "spin", " before they sleep");
}

Communicator::~Communicator() {
  if (transport::forked_since(fork_generation_)) {  // the parent's: nothing of it is here
    if (progress_.joinable()) progress_.detach();
    new (&queue_changed_)
        std::condition_variable;  // the parent's would wait for its waiters, who are not here
    return;
  }
  close();
}

void Communicator::close() {
  if (transport::forked_since(fork_generation_)) return;
  {
    const std::lock_guard lock(queue_mutex_);
    if (std::exchange(stopping_, true)) return;
  }
  queue_changed_.notify_all();
  if (progress_.joinable()) progress_.join();  // it finishes what is queued
  closed_.store(true);
  domain_->self().closed.store(1, std::memory_order_release);
  domain_->ring_all();
  for (auto& [key, channel] : channels_) channel->domain->ring_all();
}

void Communicator::abandon() {
  domain_->node().mark_dead(domain_->node_ranks()[rank()]);
  domain_->ring_all();
}

void Communicator::check_usable() const {
  if (transport::forked_since(fork_generation_)) {
    throw CommError(
        "this communicator belongs to the parent process: a child of fork() cannot use it. Call "
        "pycomm.init() in the processes that communicate.");
  }
  if (closed()) throw AbortedError("rank " + std::to_string(rank()) + " has closed this communicator");
  if (domain_->failed()) domain_->raise_failure(Domain::Caller::starting);
}

// ---- running ----

void Communicator::compare_counts(Bound::Agreement& agreement, Patience& patience, const WaitPolicy& policy) {
  run_with_token(agreement.exchange, patience, policy);
  for (int r = 0; r < size(); ++r) {
    if (agreement.coming[r] == agreement.expected[r]) continue;
    domain_->fail(FailureKind::mismatch,
                  "rank " + std::to_string(r) + " sends " + std::to_string(agreement.coming[r]) +
                      " elements to rank " + std::to_string(rank()) + ", which expects " +
                      std::to_string(agreement.expected[r]) + ", in " + describe(agreement.exchange.record) +
                      ". What is in send_counts of one rank must be in recv_counts of the other.");
    domain_->raise_failure(Domain::Caller::under_way);
  }
}

void Communicator::run(const Bound& bound, Patience& patience) {
  if (queued_.load(std::memory_order_acquire) == 0) {
    std::unique_lock token(token_, std::try_to_lock);
    if (!token) {
      patience.on_block();
      token.lock();
    }
    if (queued_.load(std::memory_order_acquire) == 0) return run_with_token(bound, patience, policy_);
  }
  submit(bound)->wait(INFINITY, patience);  // behind what is queued
}

void Communicator::run_with_token(const Bound& bound, Patience& patience, const WaitPolicy& policy) {
  check_usable();
  if (bound.agreement) compare_counts(*bound.agreement, patience, policy);
  Domain* domain = domain_.get();
  Run* run = &run_;
  uint64_t* calls = &calls_;
  bool* last_exchanged = &last_exchanged_;
  if (bound.src >= 0) {
    Channel& pair = channel(bound.src, bound.dst, patience, bound.timeout_s);
    domain = pair.domain.get();
    run = &pair.run;
    calls = &pair.calls;
    last_exchanged = &pair.last_exchanged;
  }
  run->start(*domain, *bound.prepared, bound.buffers, ++*calls, bound.record, !*last_exchanged);
  double started = 0;
  while (!run->advance(policy.polls())) wait(*domain, *run, policy, started, bound.timeout_s, patience);
  domain->self().finished.store(*calls, std::memory_order_release);
  *last_exchanged = bound.prepared->plan.full_exchange;
  if (bound.then) bound.then();
}

std::shared_ptr<Work> Communicator::submit(Bound bound) {
  check_usable();
  auto work = std::make_shared<Work>();
  work->owner_ = this;
  work->bound_ = std::move(bound);
  {
    const std::lock_guard lock(queue_mutex_);
    if (stopping_) throw AbortedError("rank " + std::to_string(rank()) + " is closing this communicator");
    if (!progress_.joinable()) progress_ = std::thread([this] { progress(); });
    queue_.push_back(work);
    queued_.fetch_add(1, std::memory_order_release);
  }
  queue_changed_.notify_all();
  return work;
}

void Communicator::complete(Work& work, Patience& patience, const WaitPolicy& policy) {
  try {
    run_with_token(work.bound_, patience, policy);
  } catch (...) {
    work.error_ = std::current_exception();
  }
}

// Runs the queue's first call, if there is one, and returns it; under the token.
std::shared_ptr<Work> Communicator::complete_next(Patience& patience, const WaitPolicy& policy) {
  std::shared_ptr<Work> work;
  {
    const std::lock_guard lock(queue_mutex_);
    if (queue_.empty()) return nullptr;
    work = queue_.front();
  }
  complete(*work, patience, policy);
  work->bound_ = {};
  {
    const std::lock_guard lock(queue_mutex_);
    queue_.pop_front();
    queued_.fetch_sub(1, std::memory_order_release);
    work->done_.store(true, std::memory_order_release);
  }
  queue_changed_.notify_all();
  return work;
}

void Communicator::progress() {
  Patience patience;
  for (;;) {
    {
      std::unique_lock lock(queue_mutex_);
      queue_changed_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
    }
    const std::lock_guard token(token_);
    complete_next(patience, background_policy_);
  }
}

namespace {
// Ctrl-C during another's call is for who waits, not for the error of that call alone.
void raise_interrupt(const std::exception_ptr& error) {
  if (!error) return;
  try {
    std::rethrow_exception(error);
  } catch (const CommError&) {
  } catch (const OutOfMemoryError&) {
  }
}
}  // namespace

void Communicator::drive(const Work& work, Patience& patience) {
  while (!work.is_completed()) {
    if (std::unique_lock token(token_, std::try_to_lock); token) {
      const auto completed = complete_next(patience, policy_);
      if (completed && completed.get() != &work) raise_interrupt(completed->error_);
      continue;
    }
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

// Whether the rank's process has ended, or has closed its communicator.
bool Communicator::gone(int rank) const {
  return domain_->closed(rank) || domain_->node().dead(domain_->node_ranks()[rank]);
}

// ---- send and recv ----

Communicator::Channel& Communicator::channel(int src, int dst, Patience& patience, double timeout_s) {
  const int64_t key = int64_t{src} * size() + dst;
  if (const auto found = channels_.find(key); found != channels_.end()) return *found->second;
  std::atomic<int64_t>& offset = domain_->channel_offset(src, dst);
  if (rank() == src) {
    const int64_t made = domain_->node().reserve(Domain::bytes(2, kChannelBankBytes));
    offset.store(made, std::memory_order_release);
  }
  const std::vector<int> pair = {domain_->node_ranks()[src], domain_->node_ranks()[dst]};
  for (const double started = now_s(); offset.load(std::memory_order_acquire) == 0;) {
    if (domain_->failed()) domain_->raise_failure(Domain::Caller::under_way);
    if (gone(src) && offset.load(std::memory_order_acquire) == 0) {
      domain_->fail(FailureKind::peer_lost, "rank " + std::to_string(src) +
                                                " has left before it sent what rank " + std::to_string(dst) +
                                                " waits for.");
    } else if (now_s() - started > timeout_s) {
      domain_->fail(FailureKind::timeout, "rank " + std::to_string(dst) + " waited " +
                                              std::to_string(timeout_s) + " s for rank " +
                                              std::to_string(src) + " to send");
    }
    rest(patience);
  }
  auto channel = std::make_unique<Channel>();
  channel->domain =
      std::make_unique<Domain>(domain_->shared_node(), pair, rank() == src ? 0 : 1,
                               offset.load(std::memory_order_acquire), kChannelBankBytes, domain_.get());
  return *(channels_[key] = std::move(channel));
}

// ---- collective services ----

std::vector<int64_t> Communicator::exchange(const std::vector<int64_t>& mine, Patience& patience) {
  std::vector<int64_t> all(mine.size() * size());
  Request request;
  request.call.world.collective = Collective::all_gather;
  request.call.dtype = DType::int64;
  request.call.counts.assign(size(), static_cast<int64_t>(mine.size()));
  request.in = mine.data();
  request.out = all.data();
  execute(request, patience);
  return all;
}

std::shared_ptr<Allocation> Communicator::allocate(int64_t bytes, Patience& patience) {
  check_usable();
  transport::Node& node = domain_->node();
  const int64_t extent = Heap::extent_bytes(bytes, size());
  int64_t offset = 0;
  std::exception_ptr failed;
  if (rank() == 0) {
    try {
      offset = node.reserve(extent);
    } catch (const OutOfMemoryError&) {
      failed = std::current_exception();
      offset = -1;
    }
  }
  const auto all = exchange({bytes, offset}, patience);
  for (int r = 0; r < size(); ++r) {
    if (all[2 * r] == bytes) continue;
    if (rank() == 0 && offset > 0) node.release(offset, extent);
    throw ValueError("symmetric memory has one size on all ranks: rank " + std::to_string(rank()) +
                     " asked for " + std::to_string(bytes) + " bytes, rank " + std::to_string(r) + " for " +
                     std::to_string(all[2 * r]));
  }
  if (failed) std::rethrow_exception(failed);
  if (all[1] < 0) {
    throw OutOfMemoryError("rank 0 could not reserve " + std::to_string(extent) +
                           " bytes of shared memory for all ranks; its error says what there is");
  }
  return heap_->open(all[1], bytes, rank(), size());
}

std::shared_ptr<Communicator> Communicator::split(int64_t color, int64_t key, Patience& patience) {
  const auto all = exchange({color, key}, patience);
  std::vector<int> members;
  for (int r = 0; r < size(); ++r) {
    if (color >= 0 && all[2 * r] == color) members.push_back(r);
  }
  std::stable_sort(members.begin(), members.end(),
                   [&](int a, int b) { return all[2 * a + 1] < all[2 * b + 1]; });
  int64_t offset = 0;
  std::exception_ptr failed;
  if (!members.empty() && members[0] == rank()) {
    try {
      offset = domain_->node().reserve(Domain::bytes(static_cast<int>(members.size())));
    } catch (const OutOfMemoryError&) {
      failed = std::current_exception();
      offset = -1;
    }
  }
  const auto offsets = exchange({offset}, patience);
  if (failed) std::rethrow_exception(failed);
  if (members.empty()) return nullptr;
  const int leader = members[0];
  if (offsets[leader] < 0) {
    throw OutOfMemoryError("rank " + std::to_string(leader) +
                           " could not reserve the new group's shared memory");
  }
  std::vector<int> node_ranks;
  int mine = 0;
  for (size_t i = 0; i < members.size(); ++i) {
    if (members[i] == rank()) mine = static_cast<int>(i);
    node_ranks.push_back(domain_->node_ranks()[members[i]]);
  }
  std::shared_ptr<Communicator> comm(new Communicator(
      std::make_unique<Domain>(domain_->shared_node(), node_ranks, mine, offsets[leader]), timeout_s_));
  comm->policy_ = policy_;
  comm->background_policy_ = background_policy_;
  return comm;
}

// Who is dead without having called shrink stays so, and everybody else is waited for: all see the same
// survivors.
std::shared_ptr<Communicator> Communicator::shrink(Patience& patience) {
  if (transport::forked_since(fork_generation_) || closed()) check_usable();
  const double started = now_s();
  const auto in_time = [&](int rank) {
    if (now_s() - started > timeout_s_) {
      throw CommTimeoutError("rank " + std::to_string(this->rank()) + " waited " +
                             std::to_string(timeout_s_) + " s in shrink() for rank " + std::to_string(rank));
    }
    rest(patience);
  };
  domain_->self().shrinking.store(1, std::memory_order_release);
  domain_->fail(FailureKind::aborted,
                "rank " + std::to_string(rank()) + " has called shrink() on this group");
  std::vector<int> node_ranks;
  int leader = -1, mine = -1;
  for (int r = 0; r < size(); ++r) {
    const std::atomic<uint32_t>& here = domain_->member(r).shrinking;
    while (here.load(std::memory_order_acquire) == 0 && !gone(r)) in_time(r);
    if (here.load(std::memory_order_acquire) == 0) continue;
    if (leader < 0) leader = r;
    if (r == rank()) mine = static_cast<int>(node_ranks.size());
    node_ranks.push_back(domain_->node_ranks()[r]);
  }
  std::atomic<int64_t>& offset = domain_->channel_offset(leader, leader);
  if (leader == rank()) {
    offset.store(domain_->node().reserve(Domain::bytes(static_cast<int>(node_ranks.size()))),
                 std::memory_order_release);
  }
  while (offset.load(std::memory_order_acquire) == 0) {
    if (gone(leader) && offset.load(std::memory_order_acquire) == 0) {
      throw PeerLostError("rank " + std::to_string(leader) + " ended in shrink()");
    }
    in_time(leader);
  }
  std::shared_ptr<Communicator> comm(new Communicator(
      std::make_unique<Domain>(domain_->shared_node(), node_ranks, mine, offset.load()), timeout_s_));
  comm->policy_ = policy_;
  comm->background_policy_ = background_policy_;
  return comm;
}

}  // namespace pycomm::runtime
