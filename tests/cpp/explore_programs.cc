#include "explore_programs.h"

#include <algorithm>

namespace explore {

// Gives every buffer its addresses in one flat memory.
void Programs::lay_out() {
  int64_t bank = 0;
  for (const Plan* plan : calls_) {
    bank = std::max(bank, plan->bank_bytes);
    cells_per_pair_ = std::max(cells_per_pair_, plan->cells);
    channels_per_pair_ = std::max(channels_per_pair_, plan->channels);
    if (plan->slots < 1 || plan->slots * plan->slot_bytes > plan->bank_bytes)
      throw Impossible{"slots exceed the bank"};
  }
  for (int i = 0; i < n_ * 2; ++i, top_ += bank) windows_.push_back(top_);
  for (int i = 0; i < n_ * 2; ++i, top_ += n_ * cells_per_pair_ * kPayloadBytes) payloads_.push_back(top_);
  for (const Plan* plan : calls_) {
    const Call& call = plan->call;
    auto& places = places_.emplace_back();
    for (int rank = 0; rank < n_; ++rank) {
      Place place;
      place.in_bytes = in_elements(call, rank) * item(*plan);
      place.out_bytes = out_elements(call, rank) * item(*plan);
      place.in = place.out = top_;
      const Collective kind = call.world.collective;
      if (!call.in_place) {
        place.out += place.in_bytes;
      } else if (kind == Collective::all_gather || kind == Collective::gather) {
        place.in += before(call, rank) * item(*plan);
      } else if (kind == Collective::reduce_scatter || kind == Collective::scatter) {
        place.out += before(call, rank) * item(*plan);
      }
      top_ = std::max(place.in + place.in_bytes, place.out + place.out_bytes);
      places.push_back(place);
    }
  }
}

void Programs::write_out(int rank) {
  std::vector<Move>& moves = moves_.emplace_back();
  sent_by_.emplace_back();
  came_.emplace_back();
  sent_before_.assign(static_cast<size_t>(n_) * n_ * channels_per_pair_, 0);
  for (int c = 0; c < static_cast<int>(calls_.size()); ++c) {
    const Plan& plan = *calls_[c];
    const Place& place = places_[c][rank];
    const std::vector<Span> buffers = {{place.in, place.in + place.in_bytes, true},
                                       {place.out, place.out + place.out_bytes, true}};
    came_.back().push_back(moves.size());
    moves.push_back({.kind = Move::Kind::caller_writes, .call = c, .spans = buffers, .last_conflict = {}});
    sent_by_.back().push_back(sent_before_);
    if (c > 0 && !calls_[c - 1]->full_exchange) {
      moves.push_back({.kind = Move::Kind::gate, .call = c, .spans = {}, .last_conflict = {}});
    }
    if (c > 1 && channels_per_pair_ > 0) {
      moves.push_back({.kind = Move::Kind::drain, .call = c, .spans = {}, .last_conflict = {}});
    }
    const bool told = plan.call.in == Placement::told || plan.call.out == Placement::told;
    if (told) moves.push_back({.kind = Move::Kind::meet, .call = c, .spans = {}, .last_conflict = {}});
    moves.push_back({.kind = Move::Kind::enter, .call = c, .spans = {}, .last_conflict = {}});
    const Program& program = plan.programs.at(rank);
    for (const Loop& loop : program.loops) {
      if (loop.first < 0 || loop.trips < 0 || loop.stages < 1) throw Impossible{"a loop that is none"};
      for (int64_t i = 0; i < loop.trips + loop.stages - 1; ++i) {
        for (int32_t s = 0; s < loop.num_steps; ++s) {
          const Step& step = program.steps.at(loop.step + s);
          const int64_t trip = i - step.stage;
          if (trip >= 0 && trip < loop.trips) moves.push_back(write_out(rank, c, step, loop.first + trip));
        }
      }
    }
    for (const Move& move : moves) {
      if (move.kind == Move::Kind::send && move.call == c) ++sent_before_[move.cell];
    }
    moves.push_back(
        {.kind = Move::Kind::caller_takes_back, .call = c, .spans = buffers, .last_conflict = {}});
  }
}

Move Programs::write_out(int rank, int c, const Step& step, int64_t trip) {
  const Plan& plan = *calls_[c];
  Move move{.kind = Move::Kind::combine, .call = c, .spans = {}, .step = &step, .last_conflict = {}};
  const World& world = plan.call.world;
  if (step.kind == Step::Kind::send || step.kind == Step::Kind::recv || step.kind == Step::Kind::complete) {
    return write_out_message(rank, c, step, trip);
  }
  if (step.kind != Step::Kind::combine) {
    const bool signals = step.kind == Step::Kind::signal;
    if (step.peer < 0 || step.peer >= n_ || step.peer == rank || step.cell >= plan.cells ||
        !world.mapped(rank, step.peer)) {
      throw Impossible{"no such cell"};
    }
    move.kind = signals ? Move::Kind::signal : Move::Kind::wait;
    const int reader = signals ? step.peer : rank, writer = signals ? rank : step.peer;
    move.cell = (reader * n_ + writer) * cells_per_pair_ + step.cell;
    const int64_t value = step.value + trip * step.per_trip;
    move.word = (int64_t{c} << 32) + value;
    if (!signals && value <= 0) move.word = -1;
    if (signals && value < 0) throw Impossible{"a negative signal"};
    return move;
  }
  const int operands = step.num_dsts + step.num_srcs;
  const Program& program = plan.programs[rank];
  if (step.num_dsts < 1 || step.num_srcs < 1 || step.operand < 0 || step.count < 0 ||
      step.operand + operands > static_cast<int>(program.operands.size())) {
    throw Impossible{"a combine without operands"};
  }
  move.operands = &program.operands[step.operand];
  move.trip = trip;
  if (step.transcode >= 0) {
    if (step.transcode >= static_cast<int>(program.transcodes.size())) throw Impossible{"no transcode"};
    move.transcode = &program.transcodes[step.transcode];
  }
  if (step.count == 0) return move;
  bool wire = false, partials = false;
  for (int i = 0; i < operands; ++i) {
    wire = wire || move.operands[i].format == Format::wire;
    partials = partials || move.operands[i].format == Format::partial;
  }
  const bool exact_windows = plan.call.codec.links == Links::wire;
  if (wire != (move.transcode != nullptr) || (wire && ((partials && !exact_windows) || tile(plan) == 0))) {
    throw Impossible{"wire form where none can be"};
  }
  const bool copy = step.num_srcs == 1 && move.operands[step.num_dsts].format == step.dst_format;
  if (!copy && step.dst_format == Format::raw) throw Impossible{"formats"};
  for (int i = 0; i < operands; ++i) {
    const Format format = move.operands[i].format;
    if (i < step.num_dsts ? format != step.dst_format : !copy && format == Format::final) {
      throw Impossible{"formats"};
    }
  }
  write_out_operands(rank, step, trip, move);
  for (int a = 0; a < step.num_dsts; ++a) {
    for (int b = a + 1; b < operands; ++b) {
      const Span &x = move.spans[a], &y = move.spans[b];
      const bool same = b >= step.num_dsts && x.begin == y.begin && x.end == y.end;
      if (!same && overlap(x, y)) throw Impossible{"operands overlap"};
    }
  }
  return move;
}

// Where each operand lies at this trip.
void Programs::write_out_operands(int rank, const Step& step, int64_t trip, Move& move) {
  const int c = move.call;
  const Plan& plan = *calls_[c];
  const int operands = step.num_dsts + step.num_srcs;
  for (int i = 0; i < operands; ++i) {
    const Operand& operand = move.operands[i];
    const bool dst = i < step.num_dsts;
    if (operand.rank < 0 || operand.rank >= n_) throw Impossible{"no such rank"};
    if (!plan.call.world.mapped(rank, operand.rank)) throw Impossible{"no way to this rank"};
    const Place& place = places_[c][operand.rank];
    const int64_t bytes = bytes_of(plan, operand.format, step.count);
    int64_t base = 0, offset = operand.offset, room = 0;
    if (operand.format == Format::wire && operand.space != Space::window) throw Impossible{"wire form"};
    if (operand.format == Format::wire && operand.rank != rank && plan.call.codec.links == Links::wire) {
      throw Impossible{"wire form inside a node"};
    }
    switch (operand.space) {
      case Space::in:
        base = place.in, room = place.in_bytes, offset += trip * operand.stride;
        break;
      case Space::out:
        base = place.out, room = place.out_bytes, offset += trip * operand.stride;
        break;
      case Space::window:
        base = windows_[operand.rank * 2 + c % 2] + trip % plan.slots * plan.slot_bytes;
        room = plan.slot_bytes;
        break;
      case Space::outgoing:
      case Space::incoming: {
        const bool outgoing = operand.space == Space::outgoing;
        const int reader = outgoing ? operand.rank : rank, writer = outgoing ? rank : operand.rank;
        const int64_t index = offset / kCellBytes;
        if (outgoing != dst || reader == writer || offset < 0 || index >= plan.cells) {
          throw Impossible{"no cell of its own"};
        }
        base = payloads_[reader * 2 + c % 2] + (writer * cells_per_pair_ + index) * kPayloadBytes;
        room = kPayloadBytes;
        offset %= kCellBytes;
        break;
      }
    }
    if (operand.rank != rank && ((operand.space == Space::in && plan.call.in == Placement::plain) ||
                                 (operand.space == Space::out && plan.call.out == Placement::plain))) {
      throw Impossible{"another rank's plain buffer"};
    }
    if (operand.rank != rank && operand.space == Space::in && plan.call.in == Placement::reachable) {
      const Operand& to = move.operands[0];
      if (dst || operands != 2 || to.rank != rank || to.space != Space::out || to.format != Format::raw ||
          operand.format != Format::raw) {
        throw Impossible{"no bare copy of another rank's reachable buffer"};
      }
      move.asks = operand.rank;
    }
    if (operand.rank != rank && operand.space == Space::out && plan.call.out == Placement::reachable) {
      throw Impossible{"another rank's reachable output"};
    }
    if (offset < 0 || offset + bytes > room) throw Impossible{"out of bounds"};
    move.spans.push_back({base + offset, base + offset + bytes, dst});
  }
}

Move Programs::write_out_message(int rank, int c, const Step& step, int64_t trip) {
  const Plan& plan = *calls_[c];
  const Program& program = plan.programs[rank];
  if (step.peer < 0 || step.peer >= n_ || step.peer == rank || step.cell >= plan.channels ||
      plan.call.world.mapped(rank, step.peer)) {
    throw Impossible{"no such channel"};
  }
  const bool sends = step.kind == Step::Kind::send, receives = step.kind == Step::Kind::recv;
  Move move{.kind = sends      ? Move::Kind::send
                    : receives ? Move::Kind::recv
                               : Move::Kind::complete,
            .call = c,
            .spans = {},
            .step = &step,
            .last_conflict = {}};
  move.cell = receives ? channel(step.peer, rank, step.cell) : channel(rank, step.peer, step.cell);
  if (!sends && !receives) {
    const int64_t value = step.value + trip * step.per_trip;
    move.word = value <= 0 ? 0 : sent_before_[move.cell] + value;
    return move;
  }
  if (step.num_dsts != receives || step.num_srcs != sends || step.operand < 0 || step.count < 0 ||
      step.operand >= static_cast<int>(program.operands.size())) {
    throw Impossible{"a message without an operand"};
  }
  move.operands = &program.operands[step.operand];
  if (move.operands->rank != rank) throw Impossible{"a message in another rank's memory"};
  if (tile(plan) > 0 && move.operands->format != Format::wire)
    throw Impossible{"a message that is not encoded"};
  write_out_operands(rank, step, trip, move);
  return move;
}

// The k-th message of a channel is its sender's k-th send: a receipt reads where that lies.
void Programs::pair_messages() {
  sends_.resize(static_cast<size_t>(n_) * n_ * channels_per_pair_);
  for (const std::vector<Move>& moves : moves_) {
    for (const Move& move : moves) {
      if (move.kind == Move::Kind::send) sends_[move.cell].push_back(&move);
    }
  }
  std::vector<size_t> received(sends_.size(), 0);
  for (std::vector<Move>& moves : moves_) {
    for (Move& move : moves) {
      if (move.kind != Move::Kind::recv) continue;
      const size_t number = received[move.cell]++;
      if (number >= sends_[move.cell].size()) continue;  // it waits for ever
      const Span& source = sends_[move.cell][number]->spans[0];
      move.spans.push_back({source.begin, source.end, false});
    }
  }
}

void Programs::write_out() {
  lay_out();
  for (int rank = 0; rank < n_; ++rank) write_out(rank);
  pair_messages();
}

}  // namespace explore
