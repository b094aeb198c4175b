#include "runtime/domain.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>

#include "common/error.h"
#include "transport/memory.h"

namespace pycomm::runtime {

namespace {
int64_t header_bytes(int size) {
  const int64_t n = size;
  return transport::round_up(
      static_cast<int64_t>(sizeof(Failure) + n * sizeof(Member) +
                           n * n * (2 * kCellsPerPair * sizeof(Cell) + sizeof(int64_t)) +
                           (n + 63) / 64 * sizeof(uint64_t)),
      transport::kSmallPage);
}
}  // namespace

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
    if (record.in == schedule::Placement::reachable) text += ", input read through the kernel";
    text += ")";
  }
  if (record.tag[0]) text += std::string(" tagged \"") + record.tag + "\"";
  return text;
}

int64_t Domain::bytes(int size, int64_t bank_bytes) { return header_bytes(size) + 2 * size * bank_bytes; }

Domain::Domain(std::shared_ptr<transport::Node> node, std::vector<int> node_ranks, int rank, int64_t offset,
               int64_t bank_bytes, Domain* parent)
    : node_(std::move(node)),
      node_ranks_(std::move(node_ranks)),
      display_ranks_(node_ranks_.size()),
      nodes_(node_->nodes_of(node_ranks_)),
      rank_(rank),
      bank_bytes_(bank_bytes),
      offset_(offset),
      mapping_(node_->map(offset, bytes(size(), bank_bytes))),
      messages_(node_->open_messages(offset, node_ranks_, rank)) {
  char* base = mapping_->data();
  failure_ = parent ? parent->failure_ : reinterpret_cast<Failure*>(base);
  members_ = reinterpret_cast<Member*>(base + sizeof(Failure));
  group_ = parent ? parent->group_ : members_;
  cells_ = reinterpret_cast<Cell*>(members_ + size());
  channels_ = reinterpret_cast<std::atomic<int64_t>*>(cells_ + size() * next_reader());
  let_go_ = reinterpret_cast<std::atomic<uint64_t>*>(channels_ + size() * size());
  windows_ = base + header_bytes(size());
  raised_ = parent ? parent->raised_ : std::make_shared<std::atomic<bool>>(false);
  for (int r = 0; r < size(); ++r) {
    display_ranks_[r] = r;
    if (!parent) continue;
    const auto& ranks = parent->node_ranks_;
    display_ranks_[r] =
        static_cast<int>(std::find(ranks.begin(), ranks.end(), node_ranks_[r]) - ranks.begin());
  }
}

void Domain::let_go() {
  const auto begin = reinterpret_cast<char*>(channels_) - mapping_->data();
  node_->let_go({.mapping = mapping_,
                 .offset = offset_,
                 .bytes = bytes(size(), bank_bytes_),
                 .let_go = let_go_,
                 .ranks = node_ranks_,
                 .me = rank_,
                 .with_it = [offset = offset_, begin, n = size()](transport::Node& node) {
                   const auto header = node.map(offset, header_bytes(n));
                   const auto* channels =
                       reinterpret_cast<const std::atomic<int64_t>*>(header->data() + begin);
                   for (int pair = 0; pair < n * n; ++pair) {
                     const int64_t offset = channels[pair].load(std::memory_order_acquire);
                     if (offset != 0 && pair / n != pair % n) node.release(offset, bytes(2));
                   }
                 }});
}

void Domain::enter(uint64_t call, const CallRecord& record) {
  Entry& entry = self().entries[call & 1];
  uint64_t& shadow = shadow_[call & 1];
  if (shadow != record.fingerprint) {
    shadow = record.fingerprint;
    entry.call.store(0, std::memory_order_relaxed);
    uint64_t words[sizeof(CallRecord) / 8];
    std::memcpy(words, &record, sizeof record);
    for (size_t i = 0; i < std::size(words); ++i) entry.words[i].store(words[i], std::memory_order_release);
  }
  entry.call.store(call, std::memory_order_release);
  self().entered.store(call, std::memory_order_release);
}

std::optional<CallRecord> Domain::record_of(int rank, uint64_t call) const {
  const Entry& entry = members_[rank].entries[call & 1];
  if (entry.call.load(std::memory_order_acquire) != call) return std::nullopt;
  uint64_t words[sizeof(CallRecord) / 8];
  for (size_t i = 0; i < std::size(words); ++i) words[i] = entry.words[i].load(std::memory_order_acquire);
  if (entry.call.load(std::memory_order_acquire) != call) return std::nullopt;
  CallRecord record;
  std::memcpy(static_cast<void*>(&record), words, sizeof record);
  return record;
}

void Domain::wake(int rank) const {
  Member& peer = waker(rank);
  peer.doorbell.fetch_add(1, std::memory_order_release);
  syscall(SYS_futex, &peer.doorbell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Domain::ring_all() const {
  for (int rank = 0; rank < size(); ++rank) {
    if (rank != rank_) ring(rank);
  }
}

void Domain::fail(FailureKind kind, const std::string& text) {
  uint32_t none = 0;
  if (!failure_->state.compare_exchange_strong(none, 1)) return;
  const size_t length = std::min(text.size(), std::size(failure_->text) - 1);
  for (size_t i = 0; i <= length; ++i)
    failure_->text[i].store(i < length ? text[i] : '\0', std::memory_order_relaxed);
  failure_->kind.store(static_cast<uint32_t>(kind), std::memory_order_relaxed);
  failure_->state.store(2, std::memory_order_release);
  ring_all();
}

void Domain::raise_failure(Caller caller) {
  // The writer needs microseconds, unless it was killed between the two stores.
  for (int i = 0; failure_->state.load(std::memory_order_acquire) == 1 && i < 100; ++i) usleep(1000);
  std::string text;
  for (const auto& c : failure_->text) {
    const char byte = c.load(std::memory_order_relaxed);
    if (byte == '\0') break;
    text += byte;
  }
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
