#include "runtime/communicator.h"

#include <algorithm>
#include <ctime>
#include <utility>

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

// ---- coming and going ----

Communicator::Communicator(std::unique_ptr<Domain> domain, const Fabric& fabric, double timeout_s)
    : domain_(std::move(domain)),
      timeout_s_(timeout_s),
      fabric_(fabric),
      heap_(std::make_shared<Heap>(domain_->shared_node())),
      sequences_(*domain_),
      plans_(fabric_, domain_->size()),
      binder_(*domain_, fabric_, *heap_, plans_, timeout_s),
      queue_(*domain_, sequences_, fabric_) {
  register_for_fences();
}

Communicator::~Communicator() {
  if (queue_.forked()) return;  // the parent's: nothing of it is here
  try {
    close();
  } catch (const CommError& error) {
    log(LogLevel::warn, error.what());
  }
  let_go();
}

Communicator::Place Communicator::place() const {
  const std::vector<int>& nodes = domain_->nodes();
  if (nodes.empty()) return {rank(), size(), 1};
  const int mine = nodes[rank()];
  return {static_cast<int>(std::count(nodes.begin(), nodes.begin() + rank(), mine)),
          static_cast<int>(std::count(nodes.begin(), nodes.end(), mine)),
          1 + *std::max_element(nodes.begin(), nodes.end())};
}

// Of the group's memory, once: not while another thread is still in a call.
void Communicator::let_go() {
  const Queue::Holding token(queue_);
  if (token && !std::exchange(let_go_, true)) domain_->let_go();
}

void Communicator::close(Patience& patience) {
  if (queue_.forked()) return;
  queue_.refuse_reentry();
  std::exception_ptr interrupted;
  if (!queue_.stop(patience, interrupted)) return;
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
  if (queue_.forked()) return;
  if (!closed() && !queue_.idle()) {
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

// The last call may not have synchronised its ranks; the rank that closes last detects the mismatch.
std::optional<std::string> Communicator::find_last_mismatch() const {
  const uint64_t calls = sequences_.collectives().calls();
  const auto ours = domain_->record_of(rank(), calls);
  if (ours && (!sequences_.collectives().last_exchanged() || !domain_->nodes().empty())) {
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
  queue_.check_usable();
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
  auto domain = std::make_unique<Domain>(domain_->shared_node(), node_ranks, mine, offsets[leader]);
  return std::make_shared<Communicator>(std::move(domain), fabric_, timeout_s_);
}

// A rank that is dead without having called shrink stays dead, and every other rank is waited for: all see
// the same survivors.
std::shared_ptr<Communicator> Communicator::shrink(Patience& patience) {
  if (queue_.forked() || closed()) queue_.check_usable();
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
  auto domain = std::make_unique<Domain>(domain_->shared_node(), node_ranks, mine, offset.load());
  return std::make_shared<Communicator>(std::move(domain), fabric_, timeout_s_);
}

}  // namespace pycomm::runtime
