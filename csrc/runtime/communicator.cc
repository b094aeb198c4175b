#include "runtime/communicator.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <utility>

#include "common/env.h"
#include "common/error.h"
#include "common/hash.h"
#include "common/log.h"
#include "transport/peer_memory.h"

namespace pycomm::runtime {

namespace {
void rest(Patience& patience) {
  patience.on_block();
  const timespec nap{0, 500000};
  nanosleep(&nap, nullptr);
  patience.on_tick();
}

bool reads_itself(transport::Node& node) {
  const uint64_t word = 1;
  uint64_t there = 0;
  return node.read(node.rank(), &there, reinterpret_cast<uint64_t>(&word), sizeof word) == 0 && there == word;
}
}  // namespace

// ---- coming and going ----

Communicator::Communicator(std::unique_ptr<Domain> domain, double timeout_s)
    : domain_(std::move(domain)),
      timeout_s_(timeout_s),
      fork_generation_(transport::fork_generation()),
      policy_{.spin_us = env().spin_us, .yield = true},
      background_policy_{.spin_us = 0, .yield = true},
      heap_(std::make_shared<Heap>(domain_->shared_node())),
      collectives_(*domain_) {
  register_for_fences();
}

std::shared_ptr<Communicator> Communicator::join(const transport::Node::Options& options) {
  warn_of_misspelt_variables();
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
  comm->learn_caches();
  comm->learn_single_copy();
  return comm;
}

std::vector<std::shared_ptr<Communicator>> Communicator::threads(int size, double timeout_s) {
  warn_of_misspelt_variables();
  auto nodes = transport::Node::local(size);
  const int64_t offset = nodes[0]->reserve(Domain::bytes(size));
  std::vector<int> ranks(size);
  for (int r = 0; r < size; ++r) ranks[r] = r;
  std::vector<std::shared_ptr<Communicator>> comms;
  for (int r = 0; r < size; ++r) {
    comms.emplace_back(new Communicator(std::make_unique<Domain>(nodes[r], ranks, r, offset), timeout_s));
    const unsigned cores = std::thread::hardware_concurrency();
    comms[r]->policy_ = wait_policy(size, static_cast<int>(cores));
    comms[r]->caches_ = caches();
    comms[r]->single_copy_ = env().single_copy && reads_itself(*nodes[r]);
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

// Plans depend on the caches, and ranks may be shown different ones: each in a container of its own, say.
void Communicator::learn_caches() {
  const Caches& mine = caches();
  Patience patience;
  const auto all = exchange({mine.l2, mine.last, mine.sharers}, patience);
  caches_ = mine;
  for (int r = 0; r < size(); ++r) {
    caches_.l2 = std::min(caches_.l2, all[3 * r]);
    caches_.last = std::min(caches_.last, all[3 * r + 1]);
    caches_.sharers = std::min(caches_.sharers, static_cast<int>(all[3 * r + 2]));
  }
  log(LogLevel::info, "caches: L2 of ", caches_.l2 >> 10, " KiB a core, last level of ", caches_.last >> 20,
      " MiB for ", caches_.sharers, " cores");
}

// Every rank reads a word of each other's, and all hear how that went: they must choose alike.
void Communicator::learn_single_copy() {
  if (size() == 1) return;
  const uint64_t word = Hasher().add(getpid()).add(now_s()).digest();
  const int64_t address = env().single_copy ? reinterpret_cast<int64_t>(&word) : 0;
  Patience patience;
  const auto words = exchange({address, static_cast<int64_t>(word)}, patience);
  for (int r = 0; r < size(); ++r) {
    if (words[2 * r] != 0) continue;
    return log(LogLevel::info, "single copy off: rank ", r, " has PYCOMM_SINGLE_COPY=0");
  }
  const auto try_all = [&] {
    int64_t error = 0;
    for (int r = 0; r < size() && error == 0; ++r) {
      int64_t there = 0;
      error = domain_->node().read(domain_->node_ranks()[r], &there, static_cast<uint64_t>(words[2 * r]),
                                   sizeof there);
      if (error == 0 && there != words[2 * r + 1]) error = ESRCH;  // another namespace's pid
    }
    return exchange({error}, patience);
  };
  auto errors = try_all();
  const bool forbidden = std::count(errors.begin(), errors.end(), EPERM) > 0;
  if (forbidden) {
    transport::let_siblings_read(true);
    exchange({0}, patience);
    errors = try_all();
  }
  const auto error = static_cast<int>(*std::max_element(errors.begin(), errors.end()));
  if (forbidden && error != 0) transport::let_siblings_read(false);
  single_copy_ = error == 0;
  log(LogLevel::info, "single copy ", single_copy_ ? "on" : "off: ranks cannot read each other's memory: ",
      single_copy_ ? "" : std::strerror(error));
}

Communicator::~Communicator() {
  if (transport::forked_since(fork_generation_)) {  // the parent's: nothing of it is here
    if (progress_.joinable()) progress_.detach();
    for (auto* condition : {&queue_changed_, &work_left_}) {
      new (condition) std::condition_variable;  // the parent's would wait for its waiters, who are not here
    }
    return;
  }
  try {
    close();
  } catch (const CommError& error) {
    log(LogLevel::warn, error.what());
  }
  let_go();
}

// Of the group's memory, once: not while another thread is still in a call.
void Communicator::let_go() {
  const Holding token(*this);
  if (token && !std::exchange(let_go_, true)) domain_->let_go();
}

void Communicator::close(Patience& patience) {
  if (transport::forked_since(fork_generation_)) return;
  refuse_reentry();
  {
    const std::lock_guard lock(queue_mutex_);
    if (std::exchange(stopping_, true)) return;
  }
  work_left_.notify_all();
  const std::exception_ptr interrupted = wait_for_queue(patience);
  if (progress_.joinable()) progress_.join();  // it finishes what is queued
  closed_.store(true);
  domain_->self().closed.exchange(1, std::memory_order_seq_cst);
  domain_->ring_all();
  std::optional<std::string> mismatch;
  if (!interrupted && !domain_->failed()) mismatch = find_last_mismatch();
  if (mismatch) domain_->fail(FailureKind::mismatch, *mismatch);
  let_go();
  if (interrupted) std::rethrow_exception(interrupted);
  if (mismatch) throw MismatchError(*mismatch);
}

void Communicator::leave(const std::string& error, Patience& patience) {
  if (transport::forked_since(fork_generation_)) return;
  if (!closed() && queued_.load(std::memory_order_acquire) != 0) {
    domain_->fail(FailureKind::peer_lost,
                  "rank " + std::to_string(rank()) +
                      " left the group with calls under way, because of an error: " + error);
    domain_->ring(rank());
  }
  if (!closed()) {
    auto& words = domain_->self().last_words;
    for (size_t i = 0; i < std::min(error.size(), std::size(words) - 1); ++i) {
      words[i].store(error[i], std::memory_order_relaxed);
    }
  }
  close(patience);
}

// Until nothing is queued. If the caller is interrupted, what is queued fails, and this is what it was
// interrupted by.
std::exception_ptr Communicator::wait_for_queue(Patience& patience) {
  std::exception_ptr interrupted;
  while (queued_.load(std::memory_order_acquire) != 0) {
    patience.on_block();
    {
      std::unique_lock lock(queue_mutex_);
      queue_changed_.wait_for(lock, std::chrono::milliseconds(20), [&] { return queues_.empty(); });
    }
    if (interrupted) continue;
    try {
      patience.on_tick();
    } catch (...) {
      interrupted = std::current_exception();
      domain_->fail(FailureKind::aborted, "rank " + std::to_string(rank()) +
                                              " was interrupted in close(), with calls that had not ended");
    }
  }
  patience.on_block();
  return interrupted;
}

// The last call may not have synchronised its ranks; the rank that closes last detects the mismatch.
std::optional<std::string> Communicator::find_last_mismatch() const {
  const uint64_t calls = collectives_.calls();
  const auto ours = domain_->record_of(rank(), calls);
  if (ours && !collectives_.last_exchanged()) {
    if (const auto mismatch = find_mismatch(*domain_, calls, *ours)) return mismatch;
  }
  for (int r = 0; r < size(); ++r) {
    const uint64_t theirs = domain_->member(r).entered.load(std::memory_order_acquire);
    if (r == rank() || !domain_->closed(r) || theirs == calls) continue;
    const int more = theirs > calls ? r : rank(), less = theirs > calls ? rank() : r;
    const auto record = domain_->record_of(more, std::max(theirs, calls));
    return "rank " + std::to_string(more) + " called " + (record ? describe(*record) : "more often") +
           " last, and rank " + std::to_string(less) + " closed its communicator without it (call " +
           std::to_string(std::max(theirs, calls)) +
           " of the group). All ranks must make the same calls in the same order with the same arguments.";
  }
  return std::nullopt;
}

void Communicator::abandon() {
  domain_->node().mark_dead(domain_->node_ranks()[rank()]);
  domain_->ring_all();
}

void Communicator::refuse_child() const {
  if (transport::forked_since(fork_generation_)) {
    throw CommError(
        "this communicator belongs to the parent process: a child of fork() cannot use it. Call "
        "pycomm.init() in the processes that communicate.");
  }
}

void Communicator::check_usable() const {
  refuse_child();
  if (closed()) throw AbortedError("rank " + std::to_string(rank()) + " has closed this communicator");
  if (domain_->failed()) domain_->raise_failure(Domain::Caller::starting);
}

// Whether the rank's process has ended, or has closed its communicator.
bool Communicator::gone(int rank) const {
  return domain_->closed(rank) || domain_->node().dead(domain_->node_ranks()[rank]);
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
  const auto all = exchange_extent({bytes, offset}, offset, extent, patience);
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
  return heap_->open(all[1], bytes, domain_->node_ranks(), rank());
}

// What it has reserved, if offset > 0, is nobody's where that fails.
std::vector<int64_t> Communicator::exchange_extent(const std::vector<int64_t>& mine, int64_t offset,
                                                   int64_t bytes, Patience& patience) {
  try {
    return exchange(mine, patience);
  } catch (...) {
    if (offset > 0) domain_->node().release(offset, bytes);
    throw;
  }
}

std::shared_ptr<Communicator> Communicator::split(int64_t color, int64_t key, Patience& patience) {
  const auto all = exchange({color, key}, patience);
  std::vector<int> members;
  for (int r = 0; r < size(); ++r) {
    if (color >= 0 && all[2 * r] == color) members.push_back(r);
  }
  std::stable_sort(members.begin(), members.end(),
                   [&](int a, int b) { return all[2 * a + 1] < all[2 * b + 1]; });
  const int64_t extent = Domain::bytes(static_cast<int>(members.size()));
  int64_t offset = 0;
  std::exception_ptr failed;
  if (!members.empty() && members[0] == rank()) {
    try {
      offset = domain_->node().reserve(extent);
    } catch (const OutOfMemoryError&) {
      failed = std::current_exception();
      offset = -1;
    }
  }
  const auto offsets = exchange_extent({offset}, offset, extent, patience);
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
  comm->caches_ = caches_;
  comm->single_copy_ = single_copy_;
  return comm;
}

// A rank that is dead without having called shrink stays dead, and every other rank is waited for: all see
// the same survivors.
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
  comm->caches_ = caches_;
  comm->single_copy_ = single_copy_;
  return comm;
}

}  // namespace pycomm::runtime
