// A board: what the ranks of a group show each other of themselves, whatever joins them.
//
//   Member    one per rank, which that rank writes: what it calls, how far it is, where it sleeps, whether it
//             has stopped or closed
//   Failure   one: the first error, which every rank then raises
//
// On one node both lie in shared memory. A rank has a copy of each Member on another node, as that rank last
// published it; and publishing carries the failure from node to node. So whoever looks for a mismatch, a loss
// or a late rank asks the same questions of all ranks, and what joins them is decided here alone.
//
// Calls of a group are numbered from 1. A rank enters call c only when all of its node have entered c - 1, so
// a record of call c - 1 and one of call c are all that anybody can ask for.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "transport/group.h"
#include "transport/messages.h"
#include "transport/signals.h"

namespace pycomm::transport {

// What a rank calls. The board knows the fingerprint, which is the first word; ranks that call the same have
// the same one. The rest is for messages.
inline constexpr size_t kRecordBytes = 400;
using Record = std::array<std::byte, kRecordBytes>;

struct alignas(64) Entry {
  std::atomic<uint64_t> call;
  std::atomic<uint64_t> address;  // see Board::show_address
  std::atomic<int64_t> entered_at;
  std::atomic<uint64_t> words[kRecordBytes / 8];
};

struct Member {
  alignas(kApart) std::atomic<uint64_t> entered;  // the last call entered, the last finished
  std::atomic<uint64_t> finished;
  std::atomic<uint32_t> opened;  // a rank that never opens the group makes no call, and is told nothing
  std::atomic<uint32_t> closed;
  std::atomic<uint32_t> shrinking;  // has called shrink
  std::atomic<uint32_t> stopped;    // knows of the failure: has no call under way and will start none
  std::atomic<uint64_t> heartbeat;  // grows during a long wait
  alignas(kApart) Doorbell doorbell;
  std::atomic<int32_t> cpu;  // 1 + where it last waited
  alignas(kApart) Entry entries[2];
  std::atomic<char> last_words[512];  // of a rank that left because of an error; written before `closed`
};

enum class FailureKind : uint32_t { none, peer_lost, mismatch, timeout, aborted };
struct Failure {
  alignas(64) std::atomic<uint32_t> state;  // 0: none; 1: being written; 2: readable
  std::atomic<uint32_t> kind;
  std::atomic<char> text[1000];
};

class Board {
 public:
  // Of the shared memory for `local` ranks on a node; zeroed at first, or as other ranks left it.
  static int64_t bytes(int local) { return static_cast<int64_t>(sizeof(Failure) + local * sizeof(Member)); }

  // `memory` holds bytes(group.local_size()). A board with a parent is a pair's among the parent's ranks (for
  // send and recv): it shares the parent's Failure, and its ranks sleep, beat and close as the parent's.
  // `group`, `parent` and, for hold_told, `mapping`, in which `memory` lies, must outlive it.
  Board(const Group& group, GroupKey key, std::shared_ptr<Mapping> mapping, char* memory, Board* parent);
  ~Board();
  Board(const Board&) = delete;
  Board& operator=(const Board&) = delete;

  const Group& group() const { return group_; }
  Member& member(int rank) const { return *members_[rank]; }
  Member& self() const { return *self_; }
  // The Member whose doorbell wakes the rank: its group's, since it sleeps for all its calls at once.
  Member& waker(int rank) const { return *wakers_[rank]; }
  Member& waker() const { return waker(group_.rank); }  // this rank's
  // The rank's name in messages: a pair's board counts as its group does.
  std::string name_of(int rank) const { return "rank " + std::to_string(display_ranks_[rank]); }
  std::string name() const { return name_of(group_.rank); }

  // ---- calls ----

  // Publishes the record of call c, then c itself. The caller has seen that all ranks of the node have
  // entered c - 1.
  void enter(uint64_t call, std::span<const std::byte, kRecordBytes> record);
  void finish(uint64_t call) const { self().finished.store(call, std::memory_order_release); }
  std::optional<Record> record_of(int rank, uint64_t call) const;
  // The same record's fingerprint alone, for a call that the rank has entered and cannot have left by two.
  uint64_t fingerprint_of(int rank, uint64_t call) const {
    return member(rank).entries[call & 1].words[0].load(std::memory_order_acquire);
  }
  // An address in this rank's memory that ranks of its node may ask for in a call: shown before it enters,
  // asked for after a signal of it.
  void show_address(uint64_t call, uint64_t address) const {
    self().entries[call & 1].address.store(address, std::memory_order_relaxed);
  }
  uint64_t address_of(int rank, uint64_t call) const {
    return member(rank).entries[call & 1].address.load(std::memory_order_relaxed);
  }
  // From now on, enter() notes the time; to be set on all ranks, while this one makes no call.
  void note_times(bool on) { notes_times_ = on; }
  // When a rank of this node entered the call, in ns of the steady clock; 0 if that is not known.
  int64_t entered_at(int rank, uint64_t call) const;
  // The first rank that has recorded another fingerprint for the call than this one.
  std::optional<int> first_to_differ(uint64_t call, uint64_t fingerprint) const;

  // ---- liveness ----

  bool closed(int rank) const {  // a pair's ranks close with their group
    return waker(rank).closed.load(std::memory_order_acquire) != 0;
  }
  bool gone(int rank) const { return closed(rank) || group_.dead(rank); }
  // The first of the other ranks that is gone before it finished the call.
  std::optional<int> find_lost(uint64_t call) const;
  // Whether a rank of the node may have given the call up because of an error, so that its caller may have
  // changed the buffers that others read.
  bool given_up(uint64_t call) const;
  struct Late {
    int rank;
    bool waits;  // for others, and moves on in that
  };
  // The rank that the others wait for in the end, where this one waits for `awaited` in a call: of those that
  // do not move, the one furthest behind. Takes 60 ms.
  Late find_late(uint64_t call, int awaited);
  // Of a rank that left because of an error, before it closes; else empty.
  void leave_words(const std::string& error);
  std::string last_words_of(int rank) const;
  void ring_all() const;

  // ---- failure ----

  bool failed() const { return failure_->state.load(std::memory_order_acquire) != 0; }
  // Makes this the group's error unless there is one already, and tells all.
  void fail(FailureKind kind, const std::string& text);
  // After a failure, with no call of the group under way on this rank.
  void stop() const { self().stopped.store(1, std::memory_order_release); }
  // After a failure, before a call returns whose buffers peers may have been told: keeps the arena's blocks
  // from being handed out again until every peer has stopped, closed or ended and so can touch none.
  void hold_told();
  // Throws the group's error: as it is to a call that was under way and to the first call that finds it, to
  // later ones as AbortedError.
  enum class Caller : uint8_t { under_way, starting };
  [[noreturn]] void raise_failure(Caller caller);

  // ---- other nodes ----

  // With ranks on other nodes; null if there are none.
  Messages* messages() const { return messages_.get(); }
  // Publishes this rank's Member and Failure, of the group and all of its pairs, to ranks on other nodes;
  // takes in what those have published. Any thread may call.
  void publish();
  void hear();
  // Whether all that this rank has sent to other nodes has been received by the ranks that are still there.
  bool all_received();
  // After a failure, before a call returns: takes back what it and other calls of the group have sent from
  // callers' buffers. No call of the group is under way on this rank but those that have failed.
  void withdraw_messages();
  // Of the group and all of its pairs: what has been sent, and not been received, is gone.
  void end_messages();

 private:
  struct Status;
  void publish_own();
  // For this board, then for those of which it is the parent.
  void with_pairs(const std::function<void(Board&)>& act);

  const Group& group_;
  std::shared_ptr<Mapping> mapping_;
  Board* parent_;
  uint64_t fork_generation_ = fork_generation();
  Failure* failure_;
  std::unique_ptr<Member[]> copies_;  // of those of ranks on other nodes
  std::vector<Member*> members_, wakers_;
  Member* self_;
  std::vector<int> display_ranks_;
  std::shared_ptr<std::atomic<bool>> raised_;
  bool held_ = false;  // by hold_told
  bool notes_times_ = false;
  uint64_t shadow_[2] = {0, 0};  // fingerprint of what entries[i] holds already
  std::mutex pairs_mutex_, status_mutex_;
  std::vector<Board*> pairs_;  // of which this is the parent
  std::unique_ptr<Messages> messages_;
};

}  // namespace pycomm::transport
