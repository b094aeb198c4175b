#include "schedule/verify/run.h"

#include <algorithm>

namespace pycomm::schedule {

SymbolicRun::SymbolicRun(std::span<const Plan* const> plans, const VerifyOptions& options)
    : options_(options), n_(plans[0]->call.world.size), num_cells_(1) {
  for (const Plan* plan : plans) {
    CallState& call = calls_.emplace_back();
    call.plan = plan;
    for (int rank = 0; rank < n_; ++rank) call.buffers.push_back(buffers_of(plan->call, rank));
    call.trips = select_trips(*plan, call.buffers, options.all_trips);
    call.memory.resize(n_);
    call.arrival.resize(n_);
    call.entry_epoch.assign(n_, -1);
    call.entry_clock.resize(n_);
    call.results.resize(n_);
    call.encoded.resize(n_);
    num_cells_ = std::max(num_cells_, plan->cells);
    num_channels_ = std::max(num_channels_, plan->channels);
  }
  for (int rank = 0; rank < n_; ++rank) {
    const Term nothing =
        expressions_.garbage("what nobody has written in rank " + std::to_string(rank) + "'s window");
    windows_.emplace_back(kBanks, Memory({nothing.expr, 1, 0}));
  }
  cells_.resize(static_cast<size_t>(n_) * n_ * num_cells_);
  ranks_.resize(n_);
  channels_.resize(static_cast<size_t>(n_) * n_ * num_channels_);
  for (RankState& state : ranks_) state.clock.assign(n_ + channels_.size(), 0);
}

std::optional<Counterexample> SymbolicRun::run() {
  for (bool moved = true; moved && !fault_;) {
    moved = false;
    for (int rank = 0; rank < n_ && !fault_; ++rank) {
      while (!fault_ && advance(rank)) moved = true;
    }
  }
  for (int rank = 0; rank < n_ && !fault_; ++rank) {
    if (ranks_[rank].phase == Phase::done) continue;
    const Step* step = ranks_[rank].phase == Phase::inside ? current(rank).step : nullptr;
    const auto* steps = call_of(rank).plan->programs[rank].steps.data();
    fail(Kind::deadlock, rank, step ? static_cast<int>(step - steps) : -1, deadlock_words(rank));
  }
  if (!fault_) check_all_received();
  return fault_ ? fault_ : data_fault_;
}

bool SymbolicRun::advance(int rank) {
  switch (ranks_[rank].phase) {
    case Phase::outside:
      arrive(rank);
      return true;
    case Phase::gate:
      return pass_gate(rank);
    case Phase::inside:
      return execute(rank);
    case Phase::done:
      return false;
  }
  return false;
}

// The caller has written its buffers.
void SymbolicRun::arrive(int rank) {
  RankState& state = ranks_[rank];
  CallState& call = call_of(rank);
  const CallerMemory& buffers = call.buffers[rank];
  const auto item = static_cast<int32_t>(size_of(call.plan->call.dtype));
  const Term before =
      expressions_.garbage("what rank " + std::to_string(rank) + "'s caller had left in `out`");
  const Access access{rank, state.clock[rank], state.call, Access::kEntry, 0};
  call.memory[rank] = std::make_unique<Memory>(Value{before.expr, 1, 0});
  auto fill = [&](int64_t begin, int64_t bytes, const Value& value) {
    if (bytes > 0) call.memory[rank]->put(begin, begin + bytes, value, access);
  };
  fill(buffers.out_begin, buffers.out_bytes, {before.expr, 1, 0});
  fill(buffers.in_begin, buffers.in_bytes, {expressions_.leaf(rank).expr, item, buffers.in_begin});
  ++state.clock[rank];
  call.arrival[rank] = state.clock;
  state.phase = Phase::gate;
  state.cursor = {};
}

// A rank goes on when all ranks of its node have entered the call before (after a full exchange it knows that
// already), and when all ranks have come to this one, if they tell each other where their buffers lie.
bool SymbolicRun::pass_gate(int rank) {
  RankState& state = ranks_[rank];
  if (!earlier_received(rank)) return false;
  if (state.call > 0 && !calls_[state.call - 1].plan->full_exchange) {
    const CallState& previous = calls_[state.call - 1];
    for (int peer = 0; peer < n_; ++peer) {
      if (previous.entry_epoch[peer] < 0 && call_of(rank).plan->call.world.mapped(rank, peer)) return false;
    }
    for (int peer = 0; peer < n_; ++peer) {
      if (call_of(rank).plan->call.world.mapped(rank, peer)) hear(rank, previous.entry_clock[peer]);
    }
  }
  const CallState& call = call_of(rank);
  if (call.plan->call.told()) {
    if (std::ranges::any_of(call.arrival, &Clock::empty)) return false;
    for (const Clock& clock : call.arrival) hear(rank, clock);
  }
  enter(rank);
  return true;
}

// The entry record tells this to every rank that reads it.
void SymbolicRun::enter(int rank) {
  RankState& state = ranks_[rank];
  CallState& call = call_of(rank);
  call.entry_epoch[rank] = state.clock[rank]++;
  call.entry_clock[rank] = state.clock;
  state.phase = Phase::inside;
}

void SymbolicRun::hear(int rank, const Clock& clock) {
  Clock& mine = ranks_[rank].clock;
  for (size_t i = 0; i < mine.size(); ++i) mine[i] = std::max(mine[i], clock[i]);
}

SymbolicRun::Current SymbolicRun::current(int rank, Cursor& cursor) const {
  const CallState& call = calls_[ranks_[rank].call];
  const std::vector<LoopTrips>& loops = call.trips.loops[rank];
  Current now{};
  now.step = cursor.at(call.plan->programs[rank], now.trip,
                       [&](size_t i) { return Trips{loops[i].first, loops[i].count}; });
  if (now.step) now.plan_trip = loops[cursor.loop].plan_trip(now.trip);
  return now;
}

bool SymbolicRun::execute(int rank) {
  RankState& state = ranks_[rank];
  const auto [step, trip, plan_trip] = current(rank, state.cursor);
  if (!step) {
    leave(rank);
    return true;
  }
  switch (step->kind) {
    case Step::Kind::wait:
      if (!wait(rank, *step, trip)) return false;
      break;
    case Step::Kind::signal:
      signal(rank, *step, trip);
      break;
    case Step::Kind::combine:
      combine(rank, *step, plan_trip);
      break;
    case Step::Kind::send:
      send(rank, *step, plan_trip);
      break;
    case Step::Kind::recv:
      if (!receive(rank, *step, plan_trip)) return false;
      break;
    case Step::Kind::complete:
      if (!complete(rank, *step, trip)) return false;
      break;
  }
  state.cursor.next();
  return true;
}

bool SymbolicRun::wait(int rank, const Step& step, int64_t trip) {
  RankState& state = ranks_[rank];
  const int64_t value = step.value + trip * step.per_trip;
  if (value <= 0) return true;
  const std::vector<Signal>& seen = cell(rank, step.peer, step.cell);
  const auto found = std::partition_point(seen.begin(), seen.end(), [&](const Signal& signal) {
    return signal.call < state.call || (signal.call == state.call && signal.value < value);
  });
  if (found == seen.end()) return false;
  hear(rank, found->clock);
  return true;
}

void SymbolicRun::signal(int rank, const Step& step, int64_t trip) {
  RankState& state = ranks_[rank];
  const int64_t value = step.value + trip * step.per_trip;
  std::vector<Signal>& seen = cell(step.peer, rank, step.cell);
  const int64_t last = !seen.empty() && seen.back().call == state.call ? seen.back().value : 0;
  if (value <= last) {
    return fail(Kind::malformed, rank,
                static_cast<int>(&step - call_of(rank).plan->programs[rank].steps.data()),
                at(rank, &step) + ": stores " + std::to_string(value) + " in a cell that holds " +
                    std::to_string(last) + "; a cell only grows");
  }
  ++state.clock[rank];
  seen.push_back({state.call, value, state.clock});
}

void SymbolicRun::combine(int rank, const Step& step, int64_t trip) {
  if (step.count == 0) return;
  std::vector<Span> spans;
  spans.reserve(step.num_dsts + step.num_srcs);
  if (!formats_allowed(rank, step) || !resolve(rank, step, trip, spans) || overlaps(rank, step, spans))
    return;
  const RankState& state = ranks_[rank];
  const auto index = static_cast<int32_t>(&step - call_of(rank).plan->programs[rank].steps.data());
  const Access access{rank, state.clock[rank], state.call, index, trip};

  const Operand* operands = &call_of(rank).plan->programs[rank].operands[step.operand + step.num_dsts];
  std::vector<std::vector<Elements>> sources;
  sources.reserve(step.num_srcs);
  std::vector<Memory::Piece> pieces;
  for (int32_t s = step.num_dsts; s < step.num_dsts + step.num_srcs; ++s) {
    const Span& span = spans[s];
    if (auto conflict = span.memory->read(span.begin, span.end, access, state.clock, pieces)) {
      return race(rank, &step, place(rank, *span.operand), span.begin, false, *conflict);
    }
    sources.push_back(elements(pieces, span.begin, span.item, span.count, rank, span.operand));
  }
  const std::vector<Elements> result = step.transcode < 0
                                           ? compute(step, operands, sources)
                                           : compute_coded(rank, step, trip, std::move(sources));
  for (int32_t d = 0; d < step.num_dsts; ++d) {
    const Span& span = spans[d];
    if (auto conflict = span.memory->check_write(span.begin, span.end, access, state.clock)) {
      return race(rank, &step, place(rank, *span.operand), span.begin, true, *conflict);
    }
    for (const Elements& part : result) {
      const Value value{part.term.expr, static_cast<int32_t>(span.item),
                        span.begin - part.term.delta * span.item};
      span.memory->put(span.begin + part.begin * span.item, span.begin + part.end * span.item, value, access);
    }
  }
}

bool SymbolicRun::formats_allowed(int rank, const Step& step) {
  const CallState& call = call_of(rank);
  const Program& program = call.plan->programs[rank];
  const Operand* operands = &program.operands[step.operand];
  const bool copy = step.num_srcs == 1 && operands[step.num_dsts].format == step.dst_format;
  bool allowed = copy || step.dst_format != Format::raw;
  bool wire = false, partial = false;
  for (int32_t i = 0; i < step.num_dsts + step.num_srcs; ++i) {
    const Format format = operands[i].format;
    allowed = allowed && (i < step.num_dsts ? format == step.dst_format : copy || format != Format::final);
    wire = wire || format == Format::wire;
    partial = partial || format == Format::partial;
  }
  allowed = allowed && wire == (step.transcode >= 0) && !(wire && !call.plan->call.coded()) &&
            !(wire && partial && call.plan->call.coded_on(Links::all));
  const bool divides = step.transcode >= 0 && program.transcodes[step.transcode].divides;
  allowed = allowed && !(divides && step.dst_format == Format::partial);
  if (!allowed) {
    fail(Kind::malformed, rank, static_cast<int>(&step - program.steps.data()),
         at(rank, &step) + ": no kernel takes these formats");
  }
  return allowed;
}

// The cells' data lies in the windows' address space, beyond all slots.
constexpr int64_t kCellsFrom = int64_t{1} << 60;

// What the operating system can do for a rank: copy another's `in`, bit for bit, to the rank's own `out`.
bool SymbolicRun::is_bare_copy(int rank, const Step& step) {
  if (step.num_dsts != 1 || step.num_srcs != 1) return false;
  const Operand* operands = &call_of(rank).plan->programs[rank].operands[step.operand];
  return operands[0].rank == rank && operands[0].space == Space::out && operands[0].format == Format::raw &&
         operands[1].space == Space::in && operands[1].format == Format::raw;
}

// Finds each operand's bytes at this trip, and checks that the rank may use them.
bool SymbolicRun::resolve(int rank, const Step& step, int64_t trip, std::vector<Span>& spans) {
  CallState& call = call_of(rank);
  const Plan& plan = *call.plan;
  const Program& program = plan.programs[rank];
  for (int32_t i = 0; i < step.num_dsts + step.num_srcs; ++i) {
    const Operand& operand = program.operands[step.operand + i];
    const bool wire = operand.format == Format::wire;
    const int64_t size = operand_bytes(plan.call, operand.format, 1);
    auto refuse = [&](Kind kind, const std::string& why) {
      fail(kind, rank, static_cast<int>(&step - program.steps.data()), at(rank, &step) + ": " + why);
      return false;
    };
    int64_t begin = operand.offset, room = plan.slot_bytes, base = 0;
    const bool outgoing = operand.space == Space::outgoing,
               cell = outgoing || operand.space == Space::incoming;
    if (cell) {
      if (operand.rank == rank || outgoing != (i < step.num_dsts)) {
        return refuse(Kind::malformed,
                      "it may only write outgoing cells and read incoming ones, of other ranks");
      }
      if (operand.stride != 0) {
        return refuse(Kind::malformed,
                      "a cell is at the same place in every trip, but the operand has a stride");
      }
      const int64_t index = begin / kCellBytes;
      room = index < plan.cells ? index * kCellBytes + kPayloadBytes : 0;
      base = kCellsFrom + (outgoing ? rank : operand.rank) * int64_t{num_cells_} * kCellBytes;
    } else if (operand.space == Space::window) {
      base = trip % plan.slots * plan.slot_bytes;
    } else {
      const bool is_in = operand.space == Space::in;
      if (wire) return refuse(Kind::malformed, "callers' buffers hold no wire form");
      const Placement placement = is_in ? plan.call.in : plan.call.out;
      if (operand.rank != rank && placement == Placement::plain) {
        return refuse(Kind::bounds, place(rank, operand) + " is not symmetric: other ranks cannot reach it");
      }
      if (operand.rank != rank && placement == Placement::reachable && !is_bare_copy(rank, step)) {
        return refuse(Kind::bounds, place(rank, operand) +
                                        " is only reachable: other ranks may copy it to their own `out`, bit "
                                        "for bit, and do nothing else with it");
      }
      const int32_t shown = call.entry_epoch[operand.rank];
      if (operand.rank != rank && placement == Placement::reachable &&
          (shown < 0 || ranks_[rank].clock[operand.rank] <= shown)) {
        return refuse(Kind::race,
                      place(rank, operand) +
                          " lies where its rank may not have shown yet: no signal says that it has entered");
      }
      const CallerMemory& buffers = call.buffers[operand.rank];
      begin += trip * operand.stride;
      room = is_in ? buffers.in_bytes : buffers.out_bytes;
      base = is_in ? buffers.in_begin : buffers.out_begin;
    }
    const int64_t bytes = operand_bytes(plan.call, operand.format, step.count), end = begin + bytes;
    if (begin < 0 || end > room) {
      return refuse(Kind::bounds, "bytes [" + std::to_string(begin) + ", " + std::to_string(end) + ") of " +
                                      place(rank, operand) + ", which has " + std::to_string(room) +
                                      (operand.space == Space::window ? " in a slot" : ""));
    }
    Memory* memory = nullptr;
    if (cell) {
      memory = &windows_[outgoing ? operand.rank : rank][ranks_[rank].call % kBanks];
    } else if (operand.space == Space::window) {
      memory = &windows_[operand.rank][ranks_[rank].call % kBanks];
    } else {
      memory = call.memory[operand.rank].get();
      if (memory == nullptr) {
        return refuse(Kind::race,
                      "touches " + place(rank, operand) + " while rank " + std::to_string(operand.rank) +
                          "'s caller may still be writing it (no signal says that it has entered)");
      }
    }
    spans.push_back({memory, base + begin, base + end, size, bytes / size, &operand});
  }
  return true;
}

bool SymbolicRun::overlaps(int rank, const Step& step, const std::vector<Span>& spans) {
  for (int32_t d = 0; d < step.num_dsts; ++d) {
    for (size_t other = d + 1; other < spans.size(); ++other) {
      const Span &a = spans[d], &b = spans[other];
      if (a.memory != b.memory || a.begin >= b.end || b.begin >= a.end) continue;
      const bool in_place =
          static_cast<int32_t>(other) >= step.num_dsts && a.begin == b.begin && a.item == b.item;
      if (in_place) continue;
      fail(Kind::malformed, rank, static_cast<int>(&step - call_of(rank).plan->programs[rank].steps.data()),
           at(rank, &step) + ": its operands overlap in " + place(rank, *a.operand));
      return true;
    }
  }
  return false;
}

std::vector<SymbolicRun::Elements> SymbolicRun::elements(const std::vector<Memory::Piece>& pieces,
                                                         int64_t begin, int64_t item, int64_t count, int rank,
                                                         const Operand* operand) {
  const int32_t call = ranks_[rank].call;
  const auto where = [&] { return operand ? place(rank, *operand) : "its `out`"; };
  std::vector<Elements> result;
  int64_t next = 0;
  auto fill_until = [&](int64_t until) {
    if (until <= next) return;
    result.push_back({next, until,
                      expressions_.garbage("bytes in " + where() + " that are no whole element of " +
                                           std::to_string(item) + " bytes")});
    next = until;
  };
  for (const Memory::Piece& piece : pieces) {
    const int64_t first = (piece.begin - begin + item - 1) / item, last = (piece.end - begin) / item;
    if (first >= last) continue;
    Term term{piece.value.expr, 0};
    if (!expressions_.is_garbage(piece.value.expr)) {
      if (piece.value.size != item || (begin - piece.value.origin) % item != 0) continue;
      term.delta = (begin - piece.value.origin) / item;
      if (piece.call != call) {
        term = expressions_.garbage("what call " + std::to_string(piece.call) + " left in " + where());
      }
    }
    fill_until(first);
    result.push_back({first, last, term});
    next = last;
  }
  fill_until(count);
  return result;
}

// What the kernel makes of the sources.
std::vector<SymbolicRun::Elements> SymbolicRun::compute(const Step& step, const Operand* operands,
                                                        const std::vector<std::vector<Elements>>& sources) {
  const bool copy = step.num_srcs == 1 && operands[0].format == step.dst_format;
  if (copy) return sources[0];
  std::vector<Elements> result = combined(step, operands, sources);
  for (Elements& part : result) {
    if (step.dst_format == Format::final) part.term = expressions_.finish(part.term);
  }
  return result;
}

std::vector<SymbolicRun::Elements> SymbolicRun::combined(const Step& step, const Operand* operands,
                                                         const std::vector<std::vector<Elements>>& sources) {
  std::vector<Elements> result;
  std::vector<size_t> at(sources.size(), 0);
  std::vector<Term> terms(sources.size());
  for (int64_t begin = 0; begin < step.count;) {
    int64_t end = step.count;
    for (size_t s = 0; s < sources.size(); ++s) {
      while (sources[s][at[s]].end <= begin) ++at[s];
      end = std::min(end, sources[s][at[s]].end);
      terms[s] = sources[s][at[s]].term;
      if (operands[s].format == Format::raw) terms[s] = expressions_.lift(terms[s]);
    }
    result.push_back({begin, end, expressions_.balanced(terms.data(), terms.size())});
    begin = end;
  }
  return result;
}

}  // namespace pycomm::schedule
