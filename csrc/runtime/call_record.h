// What a rank calls, as ranks show it to each other (transport/board.h), in enough detail for an error message.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "common/dtype.h"
#include "schedule/plan.h"
#include "transport/board.h"

namespace pycomm::runtime {

using schedule::Collective;

// Plain bytes, copied word by word into shared memory.
struct CallRecord {
  uint64_t fingerprint = 0;  // equal where ranks call the same
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
  bool named_by_tag = false;  // a part of a method that is no collective, whose name is the tag
  Side side = Side::both;     // send and recv: this rank's; `peer` is the other rank of the group
  int16_t peer = 0;
  uint32_t steps = 0;  // whether it has a step
  uint32_t step = 0;
  char algorithm[24] = {};
  char tag[240] = {};   // long enough for the shapes of a list
  char codec[80] = {};  // its name and options
};
static_assert(sizeof(CallRecord) == transport::kRecordBytes);

std::string describe(const CallRecord& record);

inline void enter(transport::Board& board, uint64_t call, const CallRecord& record) {
  board.enter(call, std::as_bytes(std::span<const CallRecord, 1>(&record, 1)));
}
// What a rank of the board has recorded for a call, if that is still there.
std::optional<CallRecord> record_of(const transport::Board& board, int rank, uint64_t call);

// In words, if another rank has recorded something else for this call than this rank has.
std::optional<std::string> find_mismatch(const transport::Board& board, uint64_t call,
                                         const CallRecord& ours);

}  // namespace pycomm::runtime
