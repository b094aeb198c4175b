#include "runtime/communicator.h"

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <iterator>
#include <utility>

#include "common/error.h"
#include "common/hash.h"
#include "common/log.h"

namespace pycomm::runtime {

namespace {
void rest(Patience& patience) {
  patience.on_block();
  const timespec nap{0, 500000};
  nanosleep(&nap, nullptr);
  patience.on_tick();
}

// A rank's part in sharing memory: the first rank of each node reserves it, and tells the others the offset.
struct Reserved {
  int64_t offset = 0;  // -1: there was no space; of other ranks 0
  std::exception_ptr failed = nullptr;
};

Reserved reserve(transport::Node& node, bool first, int64_t bytes) {
  if (!first) return {};
  try {
    return {node.reserve(bytes)};
  } catch (const OutOfMemoryError&) {
    return {-1, std::current_exception()};
  }
}

}  // namespace

// ---- coming and going ----

Communicator::Communicator(std::unique_ptr<Domain> domain, const Fabric& fabric, double timeout_s)
    : domain_(std::move(domain)),
      timeout_s_(timeout_s),
      fabric_(fabric),
      heap_(std::make_shared<Heap>(domain_->group().node)),
      sequences_(*domain_),
      plans_(fabric_, domain_->size()),
      binder_(*domain_, fabric_, *heap_, plans_, timeout_s),
      queue_(*domain_, sequences_, fabric_) {
  transport::register_for_fences();
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
  const std::vector<int>& nodes = domain_->group().nodes;
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
  domain_->board().self().closed.exchange(1, std::memory_order_seq_cst);
  domain_->board().ring_all();
  domain_->board().publish();
  std::optional<std::string> late;
  if (!interrupted) late = await_receipts(patience);
  if (late) domain_->board().fail(FailureKind::timeout, *late);
  std::optional<std::string> mismatch;
  if (!interrupted && !domain_->board().failed()) mismatch = find_last_mismatch();
  if (mismatch) domain_->board().fail(FailureKind::mismatch, *mismatch);
  let_go();
  if (interrupted) std::rethrow_exception(interrupted);
  if (mismatch) throw MismatchError(*mismatch);
  if (late) throw CommTimeoutError(*late);
}

void Communicator::leave(const std::string& error, Patience& patience) {
  if (queue_.forked()) return;
  if (!closed() && !queue_.idle()) {
    domain_->board().fail(FailureKind::peer_lost,
                          "rank " + std::to_string(rank()) +
                              " left the group with calls under way, because of an error: " + error);
    domain_->board().waker().doorbell.ring();
  }
  if (!closed()) domain_->board().leave_words(error);
  close(patience);
}

// What was sent to other nodes lies here until it has been received.
// Returns what to say if it is not received in time.
std::optional<std::string> Communicator::await_receipts(Patience& patience) {
  const Queue::Holding token(queue_, Queue::Holding::wait);
  const double started = now_s();
  while (!domain_->board().failed() && !sequences_.all_received()) {
    if (now_s() - started > timeout_s_) {
      char seconds[32];
      std::snprintf(seconds, sizeof seconds, "%g", timeout_s_);
      return "rank " + std::to_string(rank()) + " waited " + seconds +
             " s in close() for ranks on other nodes to receive what it has sent: messages between nodes are "
             "not buffered. Is a receiver slower than the group's timeout (timeout=, PYCOMM_TIMEOUT) allows?";
    }
    rest(patience);
  }
  return std::nullopt;
}

// The last call may not have synchronised its ranks; the rank that closes last detects the mismatch.
std::optional<std::string> Communicator::find_last_mismatch() const {
  const uint64_t calls = sequences_.collectives().calls();
  const auto ours = record_of(domain_->board(), rank(), calls);
  if (ours && (!sequences_.collectives().last_exchanged() || !domain_->group().nodes.empty())) {
    if (const auto mismatch = find_mismatch(domain_->board(), calls, *ours)) return mismatch;
  }
  for (int r = 0; r < size(); ++r) {
    const uint64_t theirs = domain_->board().member(r).entered.load(std::memory_order_acquire);
    if (r == rank() || !domain_->board().closed(r) || theirs == calls) continue;
    const int more = theirs > calls ? r : rank(), less = theirs > calls ? rank() : r;
    const auto record = record_of(domain_->board(), more, std::max(theirs, calls));
    return "rank " + std::to_string(more) + " called " + (record ? describe(*record) : "more often") +
           " last, and rank " + std::to_string(less) + " closed its communicator without it (call " +
           std::to_string(std::max(theirs, calls)) +
           " of the group). All ranks must make the same calls in the same order with the same arguments.";
  }
  return std::nullopt;
}

void Communicator::abandon() {
  domain_->group().node->mark_dead(domain_->group().node_ranks[rank()]);
  domain_->board().ring_all();
}

// ---- collective services ----

void Communicator::log_calls(size_t capacity, Patience& patience) {
  const bool on = capacity > 0;
  const auto under_token = [this](const auto& change) {
    const Queue::Holding token(queue_, Queue::Holding::wait);
    change();
  };
  queue_.check_usable();
  under_token([&] { on ? domain_->board().note_times(true) : sequences_.collectives().set_log(nullptr); });
  exchange("log_calls()", {on}, patience);
  under_token([&] {
    if (!on) return domain_->board().note_times(false);
    log_ = std::make_unique<CallLog>(capacity);
    sequences_.collectives().set_log(log_.get());
  });
}

CallLog::Taken Communicator::take_log() {
  const Queue::Holding token(queue_, Queue::Holding::wait);
  return log_ ? log_->take() : CallLog::Taken{};
}

std::vector<int64_t> Communicator::exchange(const char* method, const std::vector<int64_t>& mine,
                                            Patience& patience) {
  std::vector<int64_t> all(mine.size() * size());
  Request request;
  request.call.world.collective = Collective::all_gather;
  request.call.dtype = DType::int64;
  request.call.counts.assign(size(), static_cast<int64_t>(mine.size()));
  request.in = mine.data();
  request.out = all.data();
  request.tag = method;
  request.part_of.emplace().named_by_tag = true;
  execute(request, patience);
  return all;
}

std::shared_ptr<Allocation> Communicator::allocate(int64_t bytes, Patience& patience) {
  queue_.check_usable();
  transport::Node& node = *domain_->group().node;
  const std::vector<int>& here = domain_->group().local_ranks;
  const int64_t extent = Heap::extent_bytes(bytes, static_cast<int>(here.size()));
  const Reserved mine = reserve(node, here[0] == rank(), extent);
  const auto all = exchange_extent("empty()", {bytes, mine.offset}, mine.offset, extent, patience);
  const auto refuse = [&](const auto& error) {
    if (mine.offset > 0) node.release(mine.offset, extent);
    throw error;
  };
  for (int r = 0; r < size(); ++r) {
    if (all[2 * r] == bytes) continue;
    refuse(ValueError("symmetric memory has one size on all ranks: rank " + std::to_string(rank()) +
                      " asked for " + std::to_string(bytes) + " bytes, rank " + std::to_string(r) + " for " +
                      std::to_string(all[2 * r])));
  }
  if (mine.failed) std::rethrow_exception(mine.failed);
  std::vector<int> nearest_first = here;
  for (int r = 0; r < size(); ++r) nearest_first.push_back(r);
  for (const int r : nearest_first) {
    if (all[2 * r + 1] >= 0) continue;
    refuse(
        OutOfMemoryError("rank " + std::to_string(r) + " could not reserve " + std::to_string(extent) +
                         " bytes of shared memory for the ranks of its node; its error says what there is"));
  }
  std::vector<int> node_ranks;
  for (const int r : here) node_ranks.push_back(domain_->group().node_ranks[r]);
  return heap_->open(all[2 * here[0] + 1], bytes, std::move(node_ranks), domain_->group().places[rank()]);
}

// What it has reserved, if offset > 0, is nobody's where that fails.
std::vector<int64_t> Communicator::exchange_extent(const char* method, const std::vector<int64_t>& mine,
                                                   int64_t offset, int64_t bytes, Patience& patience) {
  try {
    return exchange(method, mine, patience);
  } catch (...) {
    if (offset > 0) domain_->group().node->release(offset, bytes);
    throw;
  }
}

std::shared_ptr<Communicator> Communicator::split(int64_t color, int64_t key, Patience& patience) {
  const auto all = exchange("split()", {color, key}, patience);
  std::vector<int> members;
  for (int r = 0; r < size(); ++r) {
    if (color >= 0 && all[2 * r] == color) members.push_back(r);
  }
  std::stable_sort(members.begin(), members.end(),
                   [&](int a, int b) { return all[2 * a + 1] < all[2 * b + 1]; });
  const std::vector<int> here = on_this_node(members);
  const int64_t extent = Domain::bytes(static_cast<int>(here.size()), static_cast<int>(members.size()));
  const auto [offset, failed] = reserve(*domain_->group().node, !here.empty() && here[0] == rank(), extent);
  const auto offsets = exchange_extent("split()", {offset}, offset, extent, patience);
  const GroupKey split = Hasher(domain_->key()).add("split").add(++splits_).digest();
  if (failed) std::rethrow_exception(failed);
  if (members.empty()) return nullptr;
  for (const int member : members) {
    if (offsets[member] >= 0) continue;
    if (offset > 0) domain_->group().node->release(offset, extent);
    throw OutOfMemoryError("rank " + std::to_string(member) +
                           " could not reserve the new group's shared memory; its error says what there is");
  }
  return group_of(members, offsets[here[0]], Hasher(split).add(members[0]).digest());
}

std::vector<int> Communicator::on_this_node(const std::vector<int>& ranks) const {
  std::vector<int> here;
  std::ranges::copy_if(ranks, std::back_inserter(here), [&](int r) { return domain_->group().mapped(r); });
  return here;
}

std::shared_ptr<Communicator> Communicator::group_of(const std::vector<int>& members, int64_t offset,
                                                     GroupKey key) const {
  std::vector<int> node_ranks;
  for (const int member : members) node_ranks.push_back(domain_->group().node_ranks[member]);
  const auto mine = static_cast<int>(std::ranges::find(members, rank()) - members.begin());
  auto domain = std::make_unique<Domain>(domain_->group().node, node_ranks, mine, offset, kBankBytes, key);
  return std::make_shared<Communicator>(std::move(domain), fabric_, timeout_s_);
}

// A rank that is dead without having called shrink stays dead, and every other rank is waited for: all see
// the same survivors.
std::shared_ptr<Communicator> Communicator::shrink(Patience& patience) {
  if (queue_.forked() || closed()) queue_.check_usable();
  if (shrunk_) {
    throw CommError("shrink() has been called on this group: go on with the group that it returned");
  }
  const double started = now_s();
  const auto in_time = [&](int rank) {
    if (now_s() - started > timeout_s_) {
      throw CommTimeoutError("rank " + std::to_string(this->rank()) + " waited " +
                             std::to_string(timeout_s_) + " s in shrink() for rank " + std::to_string(rank));
    }
    rest(patience);
    domain_->board().hear();
  };
  domain_->board().self().shrinking.store(1, std::memory_order_release);
  domain_->board().fail(FailureKind::aborted,
                        "rank " + std::to_string(rank()) + " has called shrink() on this group");
  domain_->board().publish();
  std::vector<int> members;
  for (int r = 0; r < size(); ++r) {
    // Whoever is gone has called shrink before, or never will: what it said last has been heard by then.
    const auto here = [&] {
      return domain_->board().member(r).shrinking.load(std::memory_order_acquire) != 0;
    };
    const auto left = [&] {
      const bool is_gone = gone(r);
      domain_->board().hear();
      return is_gone || gone(r);
    };
    while (!here() && !left()) in_time(r);
    if (here()) members.push_back(r);
  }
  const std::vector<int> here = on_this_node(members);
  const int leader = here[0];
  std::atomic<int64_t>& offset = domain_->channel_offset(leader, leader);
  if (leader == rank()) {
    offset.store(domain_->group().node->reserve(
                     Domain::bytes(static_cast<int>(here.size()), static_cast<int>(members.size()))),
                 std::memory_order_release);
  }
  while (offset.load(std::memory_order_acquire) == 0) {
    if (gone(leader) && offset.load(std::memory_order_acquire) == 0) {
      throw PeerLostError("rank " + std::to_string(leader) + " ended in shrink()");
    }
    in_time(leader);
  }
  shrunk_ = true;
  Hasher key(domain_->key());
  key.add("shrink");
  for (const int member : members) key.add(member);
  return group_of(members, offset.load(), key.digest());
}

}  // namespace pycomm::runtime
