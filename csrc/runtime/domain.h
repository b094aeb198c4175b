// A domain: the memory that one group (or one pair for send and recv) shares on one node.
//
//   Board       what the ranks show each other of themselves (transport/board.h)
//   Cell        one per (reader, writer, bank, index): the signals of a plan
//   windows     two banks per rank
//
// Ranks of the group on another node share a domain there, of which this rank maps nothing; messages join the
// two. Call c uses bank c mod 2.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "runtime/call_record.h"
#include "schedule/plan.h"
#include "transport/board.h"
#include "transport/node.h"
#include "transport/signals.h"

namespace pycomm::runtime {

using transport::Cell;
using transport::FailureKind;
using transport::GroupKey;
static_assert(sizeof(Cell) == schedule::kCellBytes && sizeof(Cell::payload) == schedule::kPayloadBytes &&
              transport::kValueBits == schedule::kSignalBits);
inline constexpr int kCellsPerPair = 4;  // in each bank
inline constexpr int64_t kBankBytes = 1 << 20;

// How a rank reaches a rank of its node (or itself) in the calls of one bank; all in one cache line.
struct alignas(64) Link {
  std::array<char*, 5> bases{};  // its memory, by schedule::Space; a run fills in the caller's buffers
  Cell *outgoing = nullptr, *incoming = nullptr;
  transport::Doorbell* doorbell = nullptr;
};

// In its memory, in this order: board, Cells, channel offsets, who has let go, from which call on ranks tell,
// windows.
class Domain {
 public:
  // The bytes for the `local` ranks of a group of `size` that are on one node.
  static int64_t bytes(int local, int size, int64_t bank_bytes = kBankBytes);

  // `node_ranks[i]` is the node's rank of group rank i. The extent at `offset` is zeroed or holds the domain
  // already; one of the node's ranks has reserved it. A domain that `parent` is given for is that of a pair
  // of the parent's ranks, and must not outlive it.
  Domain(std::shared_ptr<transport::Node> node, std::vector<int> node_ranks, int rank, int64_t offset,
         int64_t bank_bytes = kBankBytes, GroupKey key = 0, Domain* parent = nullptr);
  Domain(const Domain&) = delete;
  Domain& operator=(const Domain&) = delete;

  const transport::Group& group() const { return group_; }
  int rank() const { return group_.rank; }
  int size() const { return group_.size(); }
  GroupKey key() const { return key_; }
  transport::Board& board() { return board_; }
  const transport::Board& board() const { return board_; }

  // The cells of two ranks of this node for a call.
  Cell* cells(int reader, int writer, uint64_t call) const;
  char* bank(int rank, uint64_t call) const {
    return windows_ + (2 * group_.places[rank] + (call & 1)) * bank_bytes_;
  }
  // By rank, for the calls of a bank; empty for ranks on other nodes.
  std::vector<Link> links(uint64_t call) const;
  // Where on this node the domain lies for send and recv from one rank to another, at least one of which is
  // on this node; 0: not made yet (the first of the two to need it makes it). (rank, rank): the domain that
  // rank made in shrink.
  std::atomic<int64_t>& channel_offset(int src, int dst) const { return channels_[src * size() + dst]; }

  // Whether, before this call, the ranks tell each other where its buffers lie (agreement.h). The answer is the
  // same on all ranks: a rank asks when it has left call - 1, hence after all have entered call - 2; so it
  // knows every wish that was made before somebody entered call - 2, which is every wish for this call.
  bool tells(uint64_t call) const {
    const uint64_t from = told_from_->load(std::memory_order_relaxed);
    return from != 0 && from <= call;
  }
  // This rank, which is about to enter `call`, wishes so for the calls from call + 2 on.
  void wish_to_tell(uint64_t call) const;

  // This rank needs the memory no more, nor that of its pairs. Nothing in it may be used after that.
  void let_go();

 private:
  transport::Group group_;
  GroupKey key_;
  int64_t bank_bytes_;
  int64_t offset_;
  std::shared_ptr<transport::Mapping> mapping_;
  transport::Board board_;
  Cell* cells_;
  std::atomic<int64_t>* channels_;
  std::atomic<uint64_t>* let_go_;
  std::atomic<uint64_t>* told_from_;  // 0: from none
  char* windows_;
};

}  // namespace pycomm::runtime
