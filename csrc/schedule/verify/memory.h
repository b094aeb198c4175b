// One range of addresses in a symbolic run: what each byte holds and which access touched it last.
#pragma once

#include <map>
#include <optional>
#include <vector>

#include "schedule/verify/expression.h"

namespace pycomm::schedule {

// A rank's vector clock: how many signals and entries of each rank happened before now. An access made when
// its rank had counted `epoch` of its own happened before all that is done by a rank that has heard of more.
// After the ranks come the channels of messages, each of which counts what has been received.
using Clock = std::vector<int32_t>;

struct Access {
  static constexpr int kEntry = -1, kEnd = -2;  // in `step`: the caller's own accesses
  int32_t rank = -1;                            // -1: nobody
  int32_t epoch = 0;
  int32_t call = 0;
  int32_t step = 0;
  int64_t trip = 0;
  bool before(const Clock& clock, int by) const { return rank < 0 || rank == by || clock[rank] > epoch; }
};

// What a byte holds: a part of element (address - origin) / size of an expression. Only whole elements count.
struct Value {
  ExprId expr = 0;
  int32_t size = 1;
  int64_t origin = 0;
  bool operator==(const Value&) const = default;
};

// Two accesses to bytes [begin, end) that nothing orders.
struct Conflict {
  int64_t begin, end;
  Access earlier;
  bool earlier_writes;
};

class Memory {
 public:
  explicit Memory(const Value& value) { segments_[INT64_MIN] = {INT64_MAX, value, {}, {}}; }

  struct Piece {
    int64_t begin, end;
    Value value;
    int32_t call;  // that wrote it
  };
  // Checks the read against earlier writes and records it. Neighbouring bytes of one value make one piece.
  std::optional<Conflict> read(int64_t begin, int64_t end, const Access& access, const Clock& clock,
                               std::vector<Piece>& pieces);
  // Checks a write against earlier reads and writes; put() then makes it.
  std::optional<Conflict> check_write(int64_t begin, int64_t end, const Access& access, const Clock& clock);
  void put(int64_t begin, int64_t end, const Value& value, const Access& access);
  // What is there, without an access.
  std::vector<Piece> look(int64_t begin, int64_t end) const;

 private:
  struct Interval {
    int64_t end;
    Value value;
    Access write;
    std::vector<Access> reads;  // since the write; the latest of each rank
  };
  using Map = std::map<int64_t, Interval>;
  Map::iterator split(int64_t at);  // the interval that now starts here

  Map segments_;
};

}  // namespace pycomm::schedule
