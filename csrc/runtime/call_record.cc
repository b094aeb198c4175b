#include "runtime/call_record.h"

#include <bit>

namespace pycomm::runtime {

std::string describe(const CallRecord& record) {
  if (record.named_by_tag) return record.tag;
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

std::optional<CallRecord> record_of(const transport::Board& board, int rank, uint64_t call) {
  const auto record = board.record_of(rank, call);
  return record ? std::optional(std::bit_cast<CallRecord>(*record)) : std::nullopt;
}

std::optional<std::string> find_mismatch(const transport::Board& board, uint64_t call,
                                         const CallRecord& ours) {
  const auto rank = board.first_to_differ(call, ours.fingerprint);
  const auto theirs = rank ? record_of(board, *rank, call) : std::nullopt;
  if (!theirs) return std::nullopt;
  return board.name() + " called " + describe(ours) + " where " + board.name_of(*rank) + " called " +
         describe(*theirs) +
         (ours.side == CallRecord::Side::both
              ? " (call " + std::to_string(call) +
                    " of the group). All ranks must make the same calls in the same order with the same "
                    "arguments."
              : ". What a rank sends the other receives in the same order: as many elements of the same "
                "type, with the same tag.");
}

}  // namespace pycomm::runtime
