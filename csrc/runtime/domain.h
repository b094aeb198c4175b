// A domain: what one group (or one pair for send and recv) shares on one node, and the protocol words in it.
//
//   Failure     one: the first error, which every rank then raises
//   Member      one per rank: what it calls (a two-deep record), how far it is, whether it sleeps
//   Cell        one per (reader, writer, bank, index): the signals of a plan
//   windows     two banks per rank
//
// Ranks of the group on another node share a domain there, of which this rank maps nothing. Messages join
// the nodes, and a status that each rank publishes: its Member and the group's failure. So a rank has a
// Member of each other rank: the shared one on its own node, and a copy, as last published, of the others.
//
// Calls of a domain are numbered from 1. Call c uses bank c mod 2 and a rank enters c only when all of its
// node have entered c - 1, so a record of call c - 1 and one of call c are all that anybody can ask for.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "schedule/plan.h"
#include "transport/node.h"
#include "transport/signals.h"

namespace pycomm::runtime {

using schedule::Collective;

using transport::Cell;
static_assert(sizeof(Cell) == schedule::kCellBytes && sizeof(Cell::payload) == schedule::kPayloadBytes);
inline constexpr int kCellsPerPair = 4;  // in each bank
inline constexpr int64_t kBankBytes = 1 << 20;
// What a rank calls, in enough detail for an error message. Plain bytes, copied word by word into shared
// memory.
struct CallRecord {
  uint64_t fingerprint = 0;
  int64_t count = 0;
  int64_t symmetric_offset = -1;
  double prescale = 1.0;
  int32_t root = 0;
  enum class Side : uint8_t { both, sends, receives };
  Collective collective = Collective::all_reduce;
  DType dtype = DType::float32;
  Op op = Op::sum;
  schedule::Placement in = schedule::Placement::plain, out = schedule::Placement::plain;
  bool ragged = false;
  Side side = Side::both;  // send and recv: this rank's; `peer` is the other rank of the group
  int16_t peer = 0;
  uint32_t steps = 0;  // whether it has a step
  uint32_t step = 0;
  char algorithm[24] = {};
  char tag[240] = {};   // long enough for the shapes of a list
  char codec[80] = {};  // its name and options
};
static_assert(sizeof(CallRecord) % 8 == 0);
std::string describe(const CallRecord& record);

struct alignas(64) Entry {
  std::atomic<uint64_t> call;
  std::atomic<uint64_t> in;  // where a reachable input lies in its rank's memory, for that call
  std::atomic<uint64_t> words[sizeof(CallRecord) / 8];
};

struct Member {
  alignas(transport::kApart) std::atomic<uint64_t> entered;  // the last call entered, the last finished
  std::atomic<uint64_t> finished;
  std::atomic<uint32_t> opened;  // a rank that never opens the group makes no call, and is told nothing
  std::atomic<uint32_t> closed;
  std::atomic<uint32_t> shrinking;  // has called shrink
  std::atomic<uint32_t> stopped;    // knows of the failure: has no call under way and will start none
  std::atomic<uint64_t> heartbeat;  // grows during a long wait
  alignas(transport::kApart) transport::Doorbell doorbell;
  std::atomic<int32_t> cpu;  // 1 + where it last waited
  alignas(transport::kApart) Entry entries[2];
  std::atomic<char> last_words[512];  // of a rank that left because of an error; written before `closed`
};

enum class FailureKind : uint32_t { none, peer_lost, mismatch, timeout, aborted };
struct Failure {
  alignas(64) std::atomic<uint32_t> state;  // 0: none; 1: being written; 2: readable
  std::atomic<uint32_t> kind;
  std::atomic<char> text[1000];
};

// How a rank reaches a rank of its node (or itself) in the calls of one bank; all in one cache line.
struct alignas(64) Link {
  std::array<char*, 5> bases{};  // its memory, by schedule::Space; a run fills in the caller's buffers
  Cell *outgoing = nullptr, *incoming = nullptr;
  transport::Doorbell* doorbell = nullptr;
};

// Identifies a group: the same on all of its ranks, and different from every other group of the world.
using GroupKey = uint64_t;

// What a group keeps in the shared memory of a node, where one of its ranks has reserved it. In this order:
// Failure, Members, Cells, channel offsets, who has let go, from which call on ranks tell, windows.
class Domain {
 public:
  // The bytes for the `local` ranks of a group of `size` that are on one node.
  static int64_t bytes(int local, int size, int64_t bank_bytes = kBankBytes);

  // `node_ranks[i]` is the node's rank of group rank i. The extent at `offset` is zeroed or holds the domain
  // already. A domain that `parent` is given for shares its Failure (send and recv between a pair of a
  // group's ranks), and must not outlive it.
  Domain(std::shared_ptr<transport::Node> node, std::vector<int> node_ranks, int rank, int64_t offset,
         int64_t bank_bytes = kBankBytes, GroupKey key = 0, Domain* parent = nullptr);

  ~Domain();
  Domain(const Domain&) = delete;
  Domain& operator=(const Domain&) = delete;

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(node_ranks_.size()); }
  GroupKey key() const { return key_; }
  transport::Node& node() const { return *node_; }
  const std::shared_ptr<transport::Node>& shared_node() const { return node_; }
  const std::vector<int>& node_ranks() const { return node_ranks_; }
  int64_t bank_bytes() const { return bank_bytes_; }
  // By rank of the group; empty: all map each other's memory, and there are no messages.
  const std::vector<int>& nodes() const { return nodes_; }
  // With ranks on other nodes; null if there are none.
  transport::Messages* messages() const { return messages_.get(); }
  // The group's ranks on this node, ascending, and a rank's index among them (-1: on another node).
  const std::vector<int>& local_ranks() const { return local_ranks_; }
  int place_of(int rank) const { return places_[rank]; }

  Member& member(int rank) const { return *members_[rank]; }
  Member& self() const { return *self_; }
  // The cells of two ranks of this node for a call.
  Cell* cells(int reader, int writer, uint64_t call) const;
  // By rank, for the calls of a bank; empty for ranks on other nodes.
  std::vector<Link> links(uint64_t call) const;
  // Where on this node the domain lies for send and recv from one rank to another, at least one of which is
  // on this node; 0: not made yet (the first of the two to need it makes it). (rank, rank): the domain that
  // rank made in shrink.
  std::atomic<int64_t>& channel_offset(int src, int dst) const { return channels_[src * size() + dst]; }
  char* bank(int rank, uint64_t call) const {
    return windows_ + (2 * places_[rank] + (call & 1)) * bank_bytes_;
  }

  // Publishes the record of call c, then c itself. The caller has seen that all ranks of the node have
  // entered c - 1.
  void enter(uint64_t call, const CallRecord& record);
  std::optional<CallRecord> record_of(int rank, uint64_t call) const;
  // Where the rank's reachable input of a call lies: told before it enters, asked after a signal of it.
  void show_input(uint64_t call, uint64_t address) const {
    self().entries[call & 1].in.store(address, std::memory_order_relaxed);
  }
  uint64_t input_of(int rank, uint64_t call) const {
    return member(rank).entries[call & 1].in.load(std::memory_order_relaxed);
  }
  // The same record's fingerprint alone, for a call that the rank has entered and cannot have left by two.
  uint64_t fingerprint_of(int rank, uint64_t call) const {
    return member(rank).entries[call & 1].words[0].load(std::memory_order_acquire);
  }

  // Whether, before this call, the ranks tell each other where its buffers lie (binder.h). The answer is the
  // same on all ranks: a rank asks when it has left call - 1, hence after all have entered call - 2; so it
  // knows every wish that was made before somebody entered call - 2, which is every wish for this call.
  bool tells(uint64_t call) const {
    const uint64_t from = told_from_->load(std::memory_order_relaxed);
    return from != 0 && from <= call;
  }
  // This rank, which is about to enter `call`, wishes so for the calls from call + 2 on.
  void wish_to_tell(uint64_t call) const;

  // The Member whose doorbell wakes the rank: its group's, since it sleeps for all its calls at once.
  Member& waker(int rank) const { return *wakers_[rank]; }
  void ring_all() const;

  // Publishes this rank's Member and Failure, of the group and all of its pairs, to ranks on other nodes;
  // takes in what those have published. Any thread may call.
  void publish();
  void hear();
  // Whether all that this rank has sent to other nodes has been received by the ranks that are still there.
  bool all_received();

  bool failed() const { return failure_->state.load(std::memory_order_acquire) != 0; }
  // Makes this the group's error unless there is one already, and tells all.
  void fail(FailureKind kind, const std::string& text);
  // After a failure, before a call returns whose buffers peers may have been told: keeps the arena's blocks
  // from being handed out again until every peer has stopped, closed or ended and so can touch none.
  void hold_told();
  // After a failure, before a call returns: takes back what it and other calls of the group have sent from
  // callers' buffers. No call of the group is under way on this rank but those that have failed.
  void withdraw_messages();
  // After a failure, with no call of the group under way on this rank.
  void stop() const { self().stopped.store(1, std::memory_order_release); }
  // Throws the group's error: as it is to a call that was under way and to the first call that finds it, to
  // later ones as AbortedError.
  enum class Caller : uint8_t { under_way, starting };
  [[noreturn]] void raise_failure(Caller caller);

  bool closed(int rank) const {  // a pair's ranks close with their group
    return waker(rank).closed.load(std::memory_order_acquire) != 0;
  }
  // Whether the rank's process has ended.
  bool dead(int rank) const { return node_->dead(node_ranks_[rank]); }
  // Node::read of a rank of this node.
  int read(int rank, void* to, uint64_t from, int64_t bytes) const {
    return node_->read(node_ranks_[rank], to, from, bytes);
  }
  int64_t pid_of(int rank) const { return node_->pid_of(node_ranks_[rank]); }
  // Of a rank that left because of an error, before it closes; else empty.
  void leave_words(const std::string& error);
  std::string last_words_of(int rank) const;
  // This rank needs the memory no more, nor that of its pairs. Nothing in it may be used after that.
  void let_go();
  // The rank's name in messages: a pair's domain counts as its group does.
  int display_rank(int rank) const { return display_ranks_[rank]; }

 private:
  struct Status;
  void publish_own();
  void end_messages();

  std::shared_ptr<transport::Node> node_;
  std::vector<int> node_ranks_, display_ranks_;
  std::vector<int> nodes_, local_ranks_, places_;
  int rank_;
  GroupKey key_;
  int64_t bank_bytes_;
  int64_t offset_;
  Domain* parent_;
  uint64_t fork_generation_ = transport::fork_generation();
  std::shared_ptr<transport::Mapping> mapping_;
  Failure* failure_;
  std::unique_ptr<Member[]> copies_;  // of those of ranks on other nodes
  std::vector<Member*> members_, wakers_;
  Member* self_;
  Cell* cells_;
  std::atomic<int64_t>* channels_;
  std::atomic<uint64_t>* let_go_;
  std::atomic<uint64_t>* told_from_;  // 0: from none
  char* windows_;
  std::shared_ptr<std::atomic<bool>> raised_;
  bool held_ = false;            // by hold_told
  uint64_t shadow_[2] = {0, 0};  // fingerprint of what entries[i] holds already
  std::mutex pairs_mutex_, status_mutex_;
  std::vector<Domain*> pairs_;  // of which this is the parent
  std::unique_ptr<transport::Messages> messages_;
};

}  // namespace pycomm::runtime
