// Messages in a symbolic run. One run still covers all interleavings: a channel has one sender and one
// receiver, and delivers in order.
#include <algorithm>

#include "schedule/verify/run.h"

namespace pycomm::schedule {

void SymbolicRun::send(int rank, const Step& step, int64_t trip) {
  std::vector<Span> spans;
  if (!resolve(rank, step, trip, spans)) return;
  RankState& state = ranks_[rank];
  const size_t index = channel_at(rank, step.peer, step.cell);
  Channel& channel = channels_[index];
  channel.before.resize(std::max<size_t>(channel.before.size(), state.call + 1), channel.sent.size());
  ++state.clock[rank];
  const Span& span = spans[0];
  const auto at_step = static_cast<int32_t>(&step - call_of(rank).plan->programs[rank].steps.data());
  const Access access{reader(index), static_cast<int32_t>(channel.sent.size()), state.call, at_step, trip};
  Sent sent{state.call, span.end - span.begin, {}, state.clock};
  if (sent.bytes > 0) {
    if (auto conflict = span.memory->read(span.begin, span.end, access, state.clock, sent.pieces)) {
      return race(rank, &step, place(rank, *span.operand), span.begin, false, *conflict);
    }
    note_crossing(rank, span, sent.pieces);
  }
  for (Memory::Piece& piece : sent.pieces) {
    if (piece.call != state.call && !expressions_.is_garbage(piece.value.expr)) {
      const Term left = expressions_.garbage("what call " + std::to_string(piece.call) + " left in " +
                                             place(rank, *span.operand));
      piece.value = {left.expr, 1, 0};
    }
    piece.begin -= span.begin;
    piece.end -= span.begin;
    piece.value.origin -= span.begin;
  }
  channel.sent.push_back(std::move(sent));
}

bool SymbolicRun::receive(int rank, const Step& step, int64_t trip) {
  const size_t index = channel_at(step.peer, rank, step.cell);
  Channel& channel = channels_[index];
  if (channel.received == channel.sent.size()) return false;
  const Sent& sent = channel.sent[channel.received];
  RankState& state = ranks_[rank];
  const auto at_step = static_cast<int32_t>(&step - call_of(rank).plan->programs[rank].steps.data());
  const auto refuse = [&](const std::string& why) {
    fail(Kind::malformed, rank, at_step, at(rank, &step) + ": " + why);
    return true;
  };
  if (sent.call != state.call) return refuse("the message is of call " + std::to_string(sent.call));
  std::vector<Span> spans;
  if (!resolve(rank, step, trip, spans)) return true;
  const Span& span = spans[0];
  if (span.end - span.begin != sent.bytes) {
    return refuse("the message has " + std::to_string(sent.bytes) + " bytes, and there is room for " +
                  std::to_string(span.end - span.begin));
  }
  ++channel.received;
  hear(rank, sent.clock);
  const Access access{rank, state.clock[rank], state.call, at_step, trip};
  if (sent.bytes > 0) {
    if (auto conflict = span.memory->check_write(span.begin, span.end, access, state.clock)) {
      race(rank, &step, place(rank, *span.operand), span.begin, true, *conflict);
      return true;
    }
  }
  for (const Memory::Piece& piece : sent.pieces) {
    Value value = piece.value;
    value.origin += span.begin;
    span.memory->put(span.begin + piece.begin, span.begin + piece.end, value, access);
  }
  // Whoever hears of this rank from here on knows that the sender's memory is free.
  state.clock[reader(index)] = static_cast<int32_t>(channel.received);
  ++state.clock[rank];
  return true;
}

bool SymbolicRun::complete(int rank, const Step& step, int64_t trip) {
  const int64_t value = step.value + trip * step.per_trip;
  if (value <= 0) return true;
  const size_t index = channel_at(rank, step.peer, step.cell);
  Channel& channel = channels_[index];
  RankState& state = ranks_[rank];
  channel.before.resize(std::max<size_t>(channel.before.size(), state.call + 1), channel.sent.size());
  const int64_t target = static_cast<int64_t>(channel.before[state.call]) + value;
  if (static_cast<int64_t>(channel.received) < target) return false;
  auto& known = state.clock[reader(index)];
  known = std::max(known, static_cast<int32_t>(target));
  return true;
}

// The bank of a call is written again two calls later: what was sent from it must have been received.
bool SymbolicRun::earlier_received(int rank) {
  RankState& state = ranks_[rank];
  if (state.call < 2) return true;
  for (int to = 0; to < n_; ++to) {
    for (int index = 0; index < num_channels_; ++index) {
      const size_t at = channel_at(rank, to, index);
      Channel& channel = channels_[at];
      channel.before.resize(std::max<size_t>(channel.before.size(), state.call), channel.sent.size());
      const size_t earlier = channel.before[state.call - 1];
      if (channel.received < earlier) return false;
      state.clock[reader(at)] = std::max(state.clock[reader(at)], static_cast<int32_t>(earlier));
    }
  }
  return true;
}

void SymbolicRun::check_all_received() {
  for (size_t at = 0; at < channels_.size(); ++at) {
    const Channel& channel = channels_[at];
    if (channel.received == channel.sent.size()) continue;
    const int sender = sender_of(reader(at)), receiver = static_cast<int>(at) / num_channels_ % n_;
    fault_ = {Kind::deadlock, sender, channel.sent[channel.received].call, -1,
              at_end(sender, channel.sent[channel.received].call) + "rank " + std::to_string(receiver) +
                  " never receives a message of channel " + std::to_string(at % num_channels_)};
    return;
  }
}

}  // namespace pycomm::schedule
