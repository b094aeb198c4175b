// The symbolic run of one or several calls: all ranks, in one of the orders that the waits allow.
#pragma once

#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "schedule/cursor.h"
#include "schedule/verify/memory.h"
#include "schedule/verify/trips.h"
#include "schedule/verify/verify.h"

namespace pycomm::schedule {

class SymbolicRun {
 public:
  SymbolicRun(std::span<const Plan* const> plans, const VerifyOptions& options);
  std::optional<Counterexample> run();

 private:
  using Kind = Counterexample::Kind;
  static constexpr int kBanks = 2;

  // Elements [begin, end) of an operand or a buffer; element j holds `term` at index j.
  struct Elements {
    int64_t begin, end;
    Term term;
  };
  struct Encoded {
    int64_t begin, end;  // elements of the rank's `in`
    int turn;
    ExprId expr;
    int step;
  };
  struct CallState {
    const Plan* plan;
    TripSelection trips;
    std::vector<CallerMemory> buffers;
    std::vector<std::unique_ptr<Memory>> memory;  // of the caller, once its rank has come to the call
    std::vector<Clock> arrival;                   // of each rank, when it came; empty: it has not come
    std::vector<int32_t> entry_epoch;             // -1: not entered
    std::vector<Clock> entry_clock;
    std::vector<std::vector<Elements>> results;    // what all ranks must hold alike
    std::vector<std::vector<Encoded>> encoded;     // by rank
    std::set<std::pair<ExprId, int64_t>> crossed;  // tiles that were sent between nodes
    int ended = 0;
  };
  struct Signal {
    int32_t call;
    int64_t value;
    Clock clock;
  };
  // What a rank has sent: what its operand held, and the rank's clock. The bytes stay in the sender's memory
  // until they are received. So the channel counts as a reader of that memory, whose read ends with the
  // receipt (verify/messages.cc).
  struct Sent {
    int32_t call;
    int64_t bytes;
    std::vector<Memory::Piece> pieces;  // from 0 on
    Clock clock;
  };
  struct Channel {
    std::vector<Sent> sent;
    size_t received = 0;
    std::vector<size_t> before;  // by call of the sender: how many were sent in earlier calls
  };
  enum class Phase : uint8_t { outside, gate, inside, done };
  struct RankState {
    Phase phase = Phase::outside;
    int32_t call = 0;
    Cursor cursor;
    Clock clock;
  };
  // An operand of the step at hand, resolved.
  struct Span {
    Memory* memory;
    int64_t begin, end;
    int64_t item;   // bytes of an element, or of a tile where the operand is a wire one
    int64_t count;  // elements, or tiles
    const Operand* operand;
  };

  // Each returns whether the rank moved.
  bool advance(int rank);
  bool pass_gate(int rank);
  bool execute(int rank);
  bool wait(int rank, const Step& step, int64_t trip);

  void arrive(int rank);
  void enter(int rank);
  void hear(int rank, const Clock& clock);
  void leave(int rank);
  void signal(int rank, const Step& step, int64_t trip);
  void send(int rank, const Step& step, int64_t trip);
  bool receive(int rank, const Step& step, int64_t trip);
  bool complete(int rank, const Step& step, int64_t trip);
  bool earlier_received(int rank);
  void check_all_received();
  void combine(int rank, const Step& step, int64_t trip);
  bool resolve(int rank, const Step& step, int64_t trip, std::vector<Span>& spans);
  bool is_bare_copy(int rank, const Step& step);
  bool formats_allowed(int rank, const Step& step);
  bool overlaps(int rank, const Step& step, const std::vector<Span>& spans);
  // What a rank finds in an operand; in its `out`, if there is no operand.
  std::vector<Elements> elements(const std::vector<Memory::Piece>& pieces, int64_t begin, int64_t item,
                                 int64_t count, int rank, const Operand* operand);
  std::vector<Elements> compute(const Step& step, const Operand* operands,
                                const std::vector<std::vector<Elements>>& sources);
  std::vector<Elements> combined(const Step& step, const Operand* operands,
                                 const std::vector<std::vector<Elements>>& sources);
  // With a codec (verify/codec.cc).
  std::vector<Elements> compute_coded(int rank, const Step& step, int64_t trip,
                                      std::vector<std::vector<Elements>> sources);
  std::vector<Elements> copied_tiles(const Call& call, const std::vector<Elements>& tiles, int64_t count);
  std::vector<Elements> decoded(const Call& call, const std::vector<Elements>& tiles, int64_t count);
  std::vector<Elements> encoded(int rank, const Step& step, int64_t trip,
                                const std::vector<Elements>& elements);
  int64_t tile_length(const Call& call, Term tile) const;
  void check_encodes(int rank);
  void note_crossing(int rank, const Span& span, const std::vector<Memory::Piece>& pieces);
  void check_crossings(int call);
  void check_exchange(int rank);
  void check_output(int rank);
  void check_input(int rank);
  void check_required(int rank, const Required& required, const std::vector<Elements>& held);
  void check_same_results(int call);

  CallState& call_of(int rank) { return calls_[ranks_[rank].call]; }
  std::vector<Signal>& cell(int reader, int writer, int index) {
    return cells_[(static_cast<size_t>(reader) * n_ + writer) * num_cells_ + index];
  }
  // A channel's index. As a reader of the sender's memory, the channel comes after the ranks in clocks.
  size_t channel_at(int from, int to, int index) const {
    return (static_cast<size_t>(from) * n_ + to) * num_channels_ + index;
  }
  int reader(size_t channel) const { return n_ + static_cast<int>(channel); }
  int sender_of(int reader) const { return (reader - n_) / num_channels_ / n_; }
  // The step that a rank runs next, with its trip as the proof numbers it and as the plan does. No step: the
  // program has ended.
  struct Current {
    const Step* step;
    int64_t trip, plan_trip;
  };
  Current current(int rank, Cursor& cursor) const;
  Current current(int rank) const {
    Cursor cursor = ranks_[rank].cursor;
    return current(rank, cursor);
  }

  // Words.
  void fail(Kind kind, int rank, int step, const std::string& what);
  void data_fault(int rank, int call, const std::string& what);
  void race(int rank, const Step* step, const std::string& place, int64_t base, bool writes,
            const Conflict& conflict);
  std::string at(int rank, const Step* step) const;
  std::string at_end(int rank, int call) const;
  std::string call_words(int call) const;
  std::string place(int rank, const Operand& operand) const;
  std::string deadlock_words(int rank) const;
  std::string blocked_words(int rank, int& on) const;

  const VerifyOptions& options_;
  int n_;
  int num_cells_;
  int num_channels_ = 0;
  Expressions expressions_;
  std::vector<CallState> calls_;
  std::vector<std::vector<Memory>> windows_;  // by rank and bank
  std::vector<std::vector<Signal>> cells_;
  std::vector<Channel> channels_;
  std::vector<RankState> ranks_;
  std::optional<Counterexample> fault_;       // ends the run
  std::optional<Counterexample> data_fault_;  // reported if nothing ends the run
};

}  // namespace pycomm::schedule
