#include "transport/board.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string_view>
#include <thread>
#include <utility>

#include "common/error.h"
#include "transport/arena.h"

namespace pycomm::transport {

namespace {

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
void write(Entry& entry, uint64_t call, std::span<const std::byte, kRecordBytes> record) {
  entry.call.store(0, std::memory_order_relaxed);
  uint64_t words[kRecordBytes / 8];
  std::memcpy(words, record.data(), kRecordBytes);
  for (size_t i = 0; i < std::size(words); ++i) entry.words[i].store(words[i], std::memory_order_release);
  entry.call.store(call, std::memory_order_release);
}

uint64_t fingerprint_in(std::span<const std::byte, kRecordBytes> record) {
  uint64_t fingerprint;
  std::memcpy(&fingerprint, record.data(), sizeof fingerprint);
  return fingerprint;
}

}  // namespace

// What crosses between nodes of a Member and its Failure.
struct Board::Status {
  uint64_t entered = 0, finished = 0, heartbeat = 0;
  uint32_t closed = 0, shrinking = 0;
  uint64_t calls[2] = {};
  Record records[2] = {};
  FailureKind failure = FailureKind::none;
  char text[sizeof Failure::text] = {}, last_words[sizeof Member::last_words] = {};
};

Board::Board(const Group& group, GroupKey key, std::shared_ptr<Mapping> mapping, char* memory, Board* parent)
    : group_(group),
      mapping_(std::move(mapping)),
      parent_(parent),
      failure_(parent ? parent->failure_ : reinterpret_cast<Failure*>(memory)),
      raised_(parent ? parent->raised_ : std::make_shared<std::atomic<bool>>(false)) {
  Member* const members = reinterpret_cast<Member*>(memory + sizeof(Failure));
  if (group.local_size() < group.size()) copies_ = std::make_unique<Member[]>(group.size());
  for (int r = 0; r < group.size(); ++r) {
    members_.push_back(group.mapped(r) ? &members[group.places[r]] : &copies_[r]);
    display_ranks_.push_back(r);
    if (parent) {
      const auto& ranks = parent->group_.node_ranks;
      display_ranks_[r] = static_cast<int>(std::ranges::find(ranks, group.node_ranks[r]) - ranks.begin());
    }
    wakers_.push_back(&(parent ? *parent : *this).member(display_ranks_[r]));
  }
  self_ = members_[group.rank];
  messages_ =
      group.node->open_messages(key, group.node_ranks, group.rank, [this] { waker().doorbell.ring(); });
  self().opened.store(1, std::memory_order_release);
  if (!parent) return;
  const std::lock_guard lock(parent->pairs_mutex_);
  parent->pairs_.push_back(this);
}

Board::~Board() {
  if (!parent_ || forked_since(fork_generation_)) return;
  const std::lock_guard lock(parent_->pairs_mutex_);
  std::erase(parent_->pairs_, this);
}

// ---- calls ----

void Board::enter(uint64_t call, std::span<const std::byte, kRecordBytes> record) {
  Entry& entry = self().entries[call & 1];
  uint64_t& shadow = shadow_[call & 1];
  if (notes_times_) [[unlikely]] {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    entry.entered_at.store(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count(),
                           std::memory_order_relaxed);
  }
  if (const uint64_t fingerprint = fingerprint_in(record); shadow != fingerprint) {
    shadow = fingerprint;
    write(entry, call, record);
  } else {
    entry.call.store(call, std::memory_order_release);
  }
  self().entered.store(call, std::memory_order_release);
}

std::optional<Record> Board::record_of(int rank, uint64_t call) const {
  const Entry& entry = member(rank).entries[call & 1];
  if (entry.call.load(std::memory_order_acquire) != call) return std::nullopt;
  uint64_t words[kRecordBytes / 8];
  for (size_t i = 0; i < std::size(words); ++i) words[i] = entry.words[i].load(std::memory_order_acquire);
  if (entry.call.load(std::memory_order_acquire) != call) return std::nullopt;
  Record record;
  std::memcpy(record.data(), words, sizeof words);
  return record;
}

int64_t Board::entered_at(int rank, uint64_t call) const {
  const Entry& entry = member(rank).entries[call & 1];
  const bool there = entry.call.load(std::memory_order_acquire) == call;
  return there ? entry.entered_at.load(std::memory_order_relaxed) : 0;
}

std::optional<int> Board::first_to_differ(uint64_t call, uint64_t fingerprint) const {
  for (int rank = 0; rank < group_.size(); ++rank) {
    const auto record = record_of(rank, call);
    if (record && fingerprint_in(*record) != fingerprint) return rank;
  }
  return std::nullopt;
}

// ---- liveness ----

std::optional<int> Board::find_lost(uint64_t call) const {
  const bool deaths = group_.node->any_dead().has_value();
  for (int rank = 0; rank < group_.size(); ++rank) {
    if (rank == group_.rank || !(closed(rank) || (deaths && group_.dead(rank)))) continue;
    if (member(rank).finished.load(std::memory_order_acquire) < call) return rank;
  }
  return std::nullopt;
}

bool Board::given_up(uint64_t call) const {
  return failed() && std::ranges::any_of(group_.local_ranks, [&](int rank) {
           return rank != group_.rank && member(rank).finished.load(std::memory_order_acquire) < call;
         });
}

// A rank of another node that waits for nothing publishes nothing, so it may be further than it seems: the
// rank that is waited for here comes before it.
Board::Late Board::find_late(uint64_t call, int awaited) {
  hear();
  std::vector<uint64_t> beats;
  for (int rank = 0; rank < group_.size(); ++rank) beats.push_back(waker(rank).heartbeat.load());
  for (int i = 0; i < 12; ++i) {  // others that are late at the same moment must see this rank wait
    waker().heartbeat.fetch_add(1, std::memory_order_relaxed);
    publish();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  hear();
  const auto moves = [&](int rank) { return waker(rank).heartbeat.load() != beats[rank]; };
  const bool awaited_waits = moves(awaited);
  int late = awaited;
  uint64_t least = UINT64_MAX;
  for (int rank = 0; rank < group_.size(); ++rank) {
    const uint64_t entered = member(rank).entered.load(std::memory_order_acquire);
    if (rank == group_.rank || member(rank).finished.load() >= call) continue;
    if (moves(rank) || entered >= least) continue;
    if (!group_.mapped(rank) && !awaited_waits && rank != awaited) continue;
    late = rank;
    least = entered;
  }
  return {late, moves(late)};
}

void Board::leave_words(const std::string& error) { store(self().last_words, error); }
std::string Board::last_words_of(int rank) const { return load(waker(rank).last_words); }

void Board::ring_all() const {
  for (const int rank : group_.local_ranks) {
    if (rank != group_.rank) waker(rank).doorbell.ring();
  }
}

// ---- failure ----

void Board::fail(FailureKind kind, const std::string& text) {
  uint32_t none = 0;
  if (!failure_->state.compare_exchange_strong(none, 1)) return;
  store(failure_->text, text);
  failure_->kind.store(static_cast<uint32_t>(kind), std::memory_order_relaxed);
  failure_->state.store(2, std::memory_order_release);
  (parent_ ? *parent_ : *this).ring_all();
  publish();
}

// What asks later needs no board, only its memory: where that has gone back, all have let go of it, and the
// failure reads as none.
void Board::hold_told() {
  Arena* const arena = Arena::if_any();
  if (!group_.nodes.empty() || !arena || !arena->used() || std::exchange(held_, true)) return;
  arena->quarantine([node = group_.node, mapping = mapping_, failure = failure_, members = members_,
                     ranks = group_.node_ranks, me = group_.rank] {
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

void Board::raise_failure(Caller caller) {
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

// ---- other nodes ----

void Board::with_pairs(const std::function<void(Board&)>& act) {
  act(*this);
  const std::lock_guard lock(pairs_mutex_);
  for (Board* pair : pairs_) act(*pair);
}

void Board::publish() {
  (parent_ ? *parent_ : *this).with_pairs([](Board& board) { board.publish_own(); });
}

void Board::publish_own() {
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
    if (const auto record = record_of(group_.rank, call); record && status.entered >= 1) {
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

void Board::hear() {
  if (parent_) parent_->hear();
  Status failed;
  for (int r = 0; r < group_.size(); ++r) {
    if (group_.mapped(r)) continue;
    const std::lock_guard lock(status_mutex_);
    if (!messages_) return;
    const std::string news = messages_->status(r);
    if (news.empty()) continue;
    Status status;
    std::memcpy(&status, news.data(), sizeof status);
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

bool Board::all_received() {
  if (!messages_) return true;
  hear();
  for (int to = 0; to < group_.size(); ++to) {
    if (group_.mapped(to)) continue;
    for (int channel = 0; channel < Messages::kChannels; ++channel) {
      const auto received = messages_->received(to, channel).load(std::memory_order_acquire);
      if (received < messages_->sent(to, channel) && !gone(to)) return false;
    }
  }
  return true;
}

void Board::withdraw_messages() {
  with_pairs([](Board& board) {
    const std::lock_guard lock(board.status_mutex_);
    if (board.messages_) board.messages_->withdraw();
  });
}

void Board::end_messages() {
  with_pairs([](Board& board) {
    const std::lock_guard lock(board.status_mutex_);
    board.messages_.reset();
  });
}

}  // namespace pycomm::transport
