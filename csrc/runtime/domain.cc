#include "runtime/domain.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string_view>
#include <utility>

#include "common/error.h"
#include "transport/arena.h"
#include "transport/memory.h"

namespace pycomm::runtime {

namespace {

int64_t header_bytes(int local, int size) {
  const int64_t n = size, m = local;
  return transport::round_up(
      static_cast<int64_t>(sizeof(Failure) + m * sizeof(Member) + m * m * 2 * kCellsPerPair * sizeof(Cell) +
                           n * n * sizeof(int64_t) + ((m + 63) / 64 + 1) * sizeof(uint64_t)),
      transport::kSmallPage);
}

template <size_t N>
void store(std::atomic<char> (&to)[N], std::string_view text) {
  const size_t length = std::min(text.size(), N - 1);
  for (size_t i = 0; i <= length; ++i) to[i].store(i < length ? text[i] : '\0', std::memory_order_relaxed);
}

template <size_t N>
std::string load(const std::atomic<char> (&from)[N]) {
  std::string text;
  for (const auto& letter : from) {
    const char found = letter.load(std::memory_order_relaxed);
    if (!found) break;
    text += found;
  }
  return text;
}

// For readers who look whether `call` is still what they want after they have read.
void write(Entry& entry, uint64_t call, const CallRecord& record) {
  entry.call.store(0, std::memory_order_relaxed);
  uint64_t words[sizeof(CallRecord) / 8];
  std::memcpy(words, &record, sizeof record);
  for (size_t i = 0; i < std::size(words); ++i) entry.words[i].store(words[i], std::memory_order_release);
  entry.call.store(call, std::memory_order_release);
}

}  // namespace

// What crosses between nodes of a Member and its Failure.
struct Domain::Status {
  uint64_t entered = 0, finished = 0, heartbeat = 0;
  uint32_t closed = 0, shrinking = 0;
  uint64_t calls[2] = {};
  CallRecord records[2];
  FailureKind failure = FailureKind::none;
  char text[sizeof Failure::text] = {}, last_words[sizeof Member::last_words] = {};
};

std::string describe(const CallRecord& record) {
  std::string text = record.side == CallRecord::Side::sends      ? "send"
                     : record.side == CallRecord::Side::receives ? "recv"
                                                                 : name(record.collective);
  const schedule::Traits& traits = schedule::traits(record.collective);
  if (traits.moves()) {
    text += "(count=" + std::to_string(record.count) + ", dtype=" + name(record.dtype);
    if (record.ragged) text += ", with counts";
    if (traits.reduces) text += std::string(", op=") + name(record.op);
    if (record.codec[0]) text += std::string(", codec=") + record.codec;
    if (record.steps) text += ", step=" + std::to_string(record.step);
    if (record.prescale != 1.0) text += ", scaled by " + std::to_string(record.prescale);
    if (traits.rooted) text += ", root=" + std::to_string(record.root);
    if (record.side == CallRecord::Side::both) {
      text += std::string(", algorithm=") + record.algorithm;
    } else {
      text += (record.side == CallRecord::Side::sends ? ", dst=" : ", src=") + std::to_string(record.peer);
    }
    if (record.in == schedule::Placement::symmetric || record.out == schedule::Placement::symmetric) {
      text += std::string(", symmetric ") + (record.in == record.out                       ? "buffers"
                                             : record.in == schedule::Placement::symmetric ? "input"
                                                                                           : "output");
      text += " at offset " + std::to_string(record.symmetric_offset);
    }
    const auto told = schedule::Placement::told;
    if (record.in == told || record.out == told) {
      text += std::string(", shared array") + (record.in == record.out ? "s"
                                               : record.in == told     ? " in"
                                                                       : " out");
    }
    if (record.in == schedule::Placement::reachable) text += ", input read through the kernel";
    text += ")";
  }
  if (record.tag[0]) text += std::string(" tagged \"") + record.tag + "\"";
  return text;
}

int64_t Domain::bytes(int local, int size, int64_t bank_bytes) {
  return header_bytes(local, size) + 2 * local * bank_bytes;
}

Domain::Domain(std::shared_ptr<transport::Node> node, std::vector<int> node_ranks, int rank, int64_t offset,
               int64_t bank_bytes, GroupKey key, Domain* parent)
    : node_(std::move(node)),
      node_ranks_(std::move(node_ranks)),
      display_ranks_(node_ranks_.size()),
      nodes_(node_->nodes_of(node_ranks_)),
      places_(node_ranks_.size(), -1),
      rank_(rank),
      key_(key),
      bank_bytes_(bank_bytes),
      offset_(offset),
      parent_(parent) {
  for (int r = 0; r < size(); ++r) {
    if (!nodes_.empty() && nodes_[r] != nodes_[rank]) continue;
    places_[r] = static_cast<int>(local_ranks_.size());
    local_ranks_.push_back(r);
  }
  const auto local = static_cast<int>(local_ranks_.size());
  mapping_ = node_->map(offset, bytes(local, size(), bank_bytes));
  char* base = mapping_->data();
  failure_ = parent ? parent->failure_ : reinterpret_cast<Failure*>(base);
  Member* const members = reinterpret_cast<Member*>(base + sizeof(Failure));
  if (local < size()) copies_ = std::make_unique<Member[]>(size());
  cells_ = reinterpret_cast<Cell*>(members + local);
  channels_ = reinterpret_cast<std::atomic<int64_t>*>(cells_ + local * local * 2 * kCellsPerPair);
  let_go_ = reinterpret_cast<std::atomic<uint64_t>*>(channels_ + size() * size());
  told_from_ = let_go_ + (local + 63) / 64;
  windows_ = base + header_bytes(local, size());
  raised_ = parent ? parent->raised_ : std::make_shared<std::atomic<bool>>(false);
  for (int r = 0; r < size(); ++r) {
    members_.push_back(places_[r] < 0 ? &copies_[r] : &members[places_[r]]);
    display_ranks_[r] = r;
    if (parent) {
      const auto& ranks = parent->node_ranks_;
      display_ranks_[r] =
          static_cast<int>(std::find(ranks.begin(), ranks.end(), node_ranks_[r]) - ranks.begin());
    }
    wakers_.push_back(&(parent ? *parent : *this).member(display_ranks_[r]));
  }
  self_ = members_[rank];
  messages_ = node_->open_messages(key, node_ranks_, rank, [this] { waker(rank_).doorbell.ring(); });
  self().opened.store(1, std::memory_order_release);
  if (!parent) return;
  const std::lock_guard lock(parent->pairs_mutex_);
  parent->pairs_.push_back(this);
}

Domain::~Domain() {
  if (!parent_ || transport::forked_since(fork_generation_)) return;
  const std::lock_guard lock(parent_->pairs_mutex_);
  std::erase(parent_->pairs_, this);
}

Cell* Domain::cells(int reader, int writer, uint64_t call) const {
  const int pair = places_[reader] * static_cast<int>(local_ranks_.size()) + places_[writer];
  return cells_ + (pair * 2 + (call & 1)) * kCellsPerPair;
}

std::vector<Link> Domain::links(uint64_t call) const {
  std::vector<Link> links(size());
  for (const int r : local_ranks_) {
    Cell *const outgoing = cells(r, rank_, call), *const incoming = cells(rank_, r, call);
    links[r] = {.bases = {nullptr, nullptr, bank(r, call), outgoing->payload, incoming->payload},
                .outgoing = outgoing,
                .incoming = incoming,
                .doorbell = &waker(r).doorbell};
  }
  return links;
}

// What has been sent, and not been received, is gone before the memory that it lies in.
void Domain::end_messages() {
  const std::lock_guard lock(status_mutex_);
  messages_.reset();
}

void Domain::let_go() {
  end_messages();
  {
    const std::lock_guard lock(pairs_mutex_);
    for (Domain* pair : pairs_) pair->end_messages();
  }
  const auto begin = reinterpret_cast<char*>(channels_) - mapping_->data();
  const auto local = static_cast<int>(local_ranks_.size());
  std::vector<int> ranks;
  for (const int r : local_ranks_) ranks.push_back(node_ranks_[r]);
  node_->let_go({.mapping = mapping_,
                 .offset = offset_,
                 .bytes = bytes(local, size(), bank_bytes_),
                 .let_go = let_go_,
                 .ranks = std::move(ranks),
                 .me = places_[rank_],
                 .with_it = [offset = offset_, begin, local, places = places_](transport::Node& node) {
                   const auto n = static_cast<int>(places.size());
                   const auto header = node.map(offset, header_bytes(local, n));
                   const auto* channels =
                       reinterpret_cast<const std::atomic<int64_t>*>(header->data() + begin);
                   for (int pair = 0; pair < n * n; ++pair) {
                     const int64_t offset = channels[pair].load(std::memory_order_acquire);
                     const int src = pair / n, dst = pair % n, here = (places[src] >= 0) + (places[dst] >= 0);
                     if (offset != 0 && src != dst) node.release(offset, bytes(here, 2));
                   }
                 }});
}

void Domain::enter(uint64_t call, const CallRecord& record) {
  Entry& entry = self().entries[call & 1];
  uint64_t& shadow = shadow_[call & 1];
  if (shadow != record.fingerprint) {
    shadow = record.fingerprint;
    write(entry, call, record);
  } else {
    entry.call.store(call, std::memory_order_release);
  }
  self().entered.store(call, std::memory_order_release);
}

std::optional<CallRecord> Domain::record_of(int rank, uint64_t call) const {
  const Entry& entry = member(rank).entries[call & 1];
  if (entry.call.load(std::memory_order_acquire) != call) return std::nullopt;
  uint64_t words[sizeof(CallRecord) / 8];
  for (size_t i = 0; i < std::size(words); ++i) words[i] = entry.words[i].load(std::memory_order_acquire);
  if (entry.call.load(std::memory_order_acquire) != call) return std::nullopt;
  CallRecord record;
  std::memcpy(static_cast<void*>(&record), words, sizeof record);
  return record;
}

void Domain::wish_to_tell(uint64_t call) const {
  uint64_t from = told_from_->load(std::memory_order_relaxed);
  while (from == 0 || from > call + 2) {
    if (told_from_->compare_exchange_weak(from, call + 2)) return;
  }
}

void Domain::ring_all() const {
  for (const int rank : local_ranks_) {
    if (rank != rank_) waker(rank).doorbell.ring();
  }
}

void Domain::fail(FailureKind kind, const std::string& text) {
  uint32_t none = 0;
  if (!failure_->state.compare_exchange_strong(none, 1)) return;
  store(failure_->text, text);
  failure_->kind.store(static_cast<uint32_t>(kind), std::memory_order_relaxed);
  failure_->state.store(2, std::memory_order_release);
  (parent_ ? *parent_ : *this).ring_all();
  publish();
}

void Domain::leave_words(const std::string& error) { store(self().last_words, error); }
std::string Domain::last_words_of(int rank) const { return load(waker(rank).last_words); }

// ---- ranks on other nodes ----

void Domain::publish() {
  if (parent_) return parent_->publish();
  publish_own();
  const std::lock_guard lock(pairs_mutex_);
  for (Domain* pair : pairs_) pair->publish_own();
}

void Domain::publish_own() {
  const std::lock_guard lock(status_mutex_);
  if (!messages_) return;
  Status status;
  const Member& mine = self();
  status.entered = mine.entered.load(std::memory_order_acquire);
  status.finished = mine.finished.load(std::memory_order_acquire);
  status.heartbeat = mine.heartbeat.load(std::memory_order_relaxed);
  status.closed = mine.closed.load(std::memory_order_acquire);
  status.shrinking = mine.shrinking.load(std::memory_order_acquire);
  for (const uint64_t call : {status.entered, status.entered - 1}) {
    if (const auto record = record_of(rank_, call); record && status.entered >= 1) {
      status.calls[call & 1] = call;
      status.records[call & 1] = *record;
    }
  }
  if (failure_->state.load(std::memory_order_acquire) == 2) {
    status.failure = static_cast<FailureKind>(failure_->kind.load(std::memory_order_relaxed));
    std::ranges::copy(load(failure_->text), status.text);
  }
  std::ranges::copy(load(mine.last_words), status.last_words);
  messages_->publish({reinterpret_cast<const char*>(&status), sizeof status});
}

void Domain::hear() {
  if (parent_) parent_->hear();
  Status failed;
  for (int r = 0; r < size(); ++r) {
    if (places_[r] >= 0) continue;
    const std::lock_guard lock(status_mutex_);
    if (!messages_) return;
    const std::string news = messages_->status(r);
    if (news.empty()) continue;
    Status status;
    std::memcpy(static_cast<void*>(&status), news.data(), sizeof status);
    Member& copy = member(r);
    for (const int bank : {0, 1}) write(copy.entries[bank], status.calls[bank], status.records[bank]);
    store(copy.last_words, status.last_words);
    copy.heartbeat.store(status.heartbeat, std::memory_order_relaxed);
    copy.entered.store(status.entered, std::memory_order_release);
    copy.finished.store(status.finished, std::memory_order_release);
    copy.shrinking.store(status.shrinking, std::memory_order_release);
    copy.closed.store(status.closed, std::memory_order_release);
    if (status.failure != FailureKind::none) failed = status;
  }
  if (failed.failure != FailureKind::none) fail(failed.failure, failed.text);
}

void Domain::withdraw_messages() {
  const std::lock_guard lock(pairs_mutex_);
  std::vector<Domain*> domains = pairs_;
  domains.push_back(this);
  for (Domain* domain : domains) {
    const std::lock_guard status_lock(domain->status_mutex_);
    if (domain->messages_) domain->messages_->withdraw();
  }
}

bool Domain::all_received() {
  if (!messages_) return true;
  hear();
  for (int to = 0; to < size(); ++to) {
    if (places_[to] >= 0) continue;
    for (int channel = 0; channel < transport::Messages::kChannels; ++channel) {
      const auto received = messages_->received(to, channel).load(std::memory_order_acquire);
      if (received < messages_->sent(to, channel) && !closed(to) && !dead(to)) return false;
    }
  }
  return true;
}

// What asks later needs no domain, only its memory: where that has gone back, all have let go of it, and the
// failure reads as none.
void Domain::hold_told() {
  transport::Arena* const arena = transport::Arena::if_any();
  if (!nodes_.empty() || !arena || !arena->used() || std::exchange(held_, true)) return;
  arena->quarantine([node = node_, mapping = mapping_, failure = failure_, members = members_,
                     ranks = node_ranks_, me = rank_] {
    if (failure->state.load(std::memory_order_acquire) == 0) return true;
    for (size_t rank = 0; rank < ranks.size(); ++rank) {
      const Member& peer = *members[rank];
      if (static_cast<int>(rank) == me || peer.opened.load(std::memory_order_acquire) == 0 ||
          peer.stopped.load(std::memory_order_acquire) != 0 ||
          peer.closed.load(std::memory_order_acquire) != 0) {
        continue;
      }
      // A thread that will not come back may have calls under way that another one drives.
      if (node->threads() || !node->dead(ranks[rank])) return false;
    }
    return true;
  });
}

void Domain::raise_failure(Caller caller) {
  // The writer needs microseconds, unless it was killed between the two stores.
  for (int i = 0; failure_->state.load(std::memory_order_acquire) == 1 && i < 100; ++i) usleep(1000);
  std::string text = load(failure_->text);
  if (text.empty()) text = "the group failed on another rank, which ended before it could say why";
  if (raised_->exchange(true) && caller == Caller::starting)
    throw AbortedError("the group has failed before: " + text);
  switch (static_cast<FailureKind>(failure_->kind.load(std::memory_order_relaxed))) {
    case FailureKind::peer_lost:
      throw PeerLostError(text);
    case FailureKind::mismatch:
      throw MismatchError(text);
    case FailureKind::timeout:
      throw CommTimeoutError(text);
    case FailureKind::aborted:
    case FailureKind::none:
      break;
  }
  throw AbortedError(text);
}

}  // namespace pycomm::runtime
