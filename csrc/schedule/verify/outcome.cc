// The end of a rank's call in a symbolic run: what it must have heard, and what its buffers must hold.
#include <algorithm>

#include "schedule/verify/run.h"

namespace pycomm::schedule {

// The caller may now read and write its buffers; its next call comes after that.
void SymbolicRun::leave(int rank) {
  RankState& state = ranks_[rank];
  CallState& call = call_of(rank);
  const CallerMemory& buffers = call.buffers[rank];
  const Access access{rank, state.clock[rank], state.call, Access::kEnd, 0};
  auto take_back = [&](const char* buffer, int64_t begin, int64_t bytes) {
    if (bytes == 0 || fault_) return;
    if (auto conflict = call.memory[rank]->check_write(begin, begin + bytes, access, state.clock)) {
      race(rank, nullptr, std::string("its `") + buffer + "`", begin, true, *conflict);
    }
  };
  take_back("in", buffers.in_begin, buffers.in_bytes);
  take_back("out", buffers.out_begin, buffers.out_bytes);
  if (fault_) return;
  check_exchange(rank);
  check_encodes(rank);
  check_input(rank);
  check_output(rank);
  const Term after =
      expressions_.garbage("what rank " + std::to_string(rank) + "'s caller wrote after the end");
  for (const auto& [begin, bytes] :
       {std::pair{buffers.in_begin, buffers.in_bytes}, std::pair{buffers.out_begin, buffers.out_bytes}}) {
    if (bytes > 0) call.memory[rank]->put(begin, begin + bytes, {after.expr, 1, 0}, access);
  }
  if (++call.ended == n_) {
    check_same_results(state.call);
    check_crossings(state.call);
    call.memory.clear();
  }
  const bool last = state.call + 1 == static_cast<int32_t>(calls_.size());
  state.phase = last ? Phase::done : Phase::outside;
  if (!last) ++state.call;
}

void SymbolicRun::check_exchange(int rank) {
  const CallState& call = call_of(rank);
  const bool barrier = synchronises(call.plan->call.world.collective);
  if (!call.plan->full_exchange && !barrier) return;
  for (int peer = 0; peer < n_; ++peer) {
    const int32_t entry = call.entry_epoch[peer];
    if (peer == rank || (!barrier && !call.plan->call.world.mapped(rank, peer))) continue;
    if (entry >= 0 && ranks_[rank].clock[peer] > entry) continue;
    fail(Kind::exchange, rank, -1,
         at_end(rank, ranks_[rank].call) + "nothing says that rank " + std::to_string(peer) +
             " has entered, but " + (barrier ? "this is a barrier" : "the plan claims a full exchange"));
    return;
  }
}

void SymbolicRun::check_input(int rank) {
  const CallState& call = call_of(rank);
  const CallerMemory& buffers = call.buffers[rank];
  const auto item = static_cast<int64_t>(size_of(call.plan->call.dtype));
  const int64_t in_end = buffers.in_begin + buffers.in_bytes, out_end = buffers.out_begin + buffers.out_bytes;
  const Term input = expressions_.leaf(rank);
  auto check = [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    for (const Memory::Piece& piece : call.memory[rank]->look(begin, end)) {
      if (piece.value == Value{input.expr, static_cast<int32_t>(item), buffers.in_begin}) continue;
      data_fault(rank, ranks_[rank].call,
                 "bytes [" + std::to_string(piece.begin - buffers.in_begin) + ", " +
                     std::to_string(piece.end - buffers.in_begin) + ") of `in` have changed");
    }
  };
  if (buffers.out_bytes == 0) return check(buffers.in_begin, in_end);
  check(buffers.in_begin, std::min(in_end, buffers.out_begin));
  check(std::max(buffers.in_begin, out_end), in_end);
}

void SymbolicRun::check_output(int rank) {
  CallState& call = call_of(rank);
  const CallerMemory& buffers = call.buffers[rank];
  const auto item = static_cast<int64_t>(size_of(call.plan->call.dtype));
  const int64_t out = buffers.out_begin;
  for (const Required& required : required_of(call.plan->call, rank)) {
    auto check = [&](int64_t begin, int64_t end) {  // elements of `out`
      if (begin >= end) return;
      const auto pieces = call.memory[rank]->look(out + begin * item, out + end * item);
      std::vector<Elements> held = elements(pieces, out + begin * item, item, end - begin, rank, nullptr);
      for (Elements& part : held)
        part = {part.begin + begin, part.end + begin, {part.term.expr, part.term.delta - begin}};
      check_required(rank, required, held);
      if (required.source == Required::kReduced || call.plan->call.coded()) {
        call.results[rank].insert(call.results[rank].end(), held.begin(), held.end());
      }
    };
    // What only left-out trips write is not looked at.
    int64_t begin = required.begin;
    for (const ByteRange& gap : call.trips.left_out[rank]) {
      const int64_t gap_begin = (gap.begin - out + item - 1) / item, gap_end = (gap.end - out) / item;
      if (gap_end <= begin || gap_begin >= required.end) continue;
      check(begin, gap_begin);
      begin = gap_end;
    }
    check(begin, required.end);
  }
}

void SymbolicRun::check_required(int rank, const Required& required, const std::vector<Elements>& held) {
  const bool reduced = required.source == Required::kReduced;
  std::vector<Term> leaves;
  for (int source = 0; reduced && options_.balanced && source < n_; ++source) {
    leaves.push_back(expressions_.lift(expressions_.leaf(source)));
  }
  for (const Elements& part : held) {
    std::string fault;
    bool right = part.term.delta == required.shift;
    const ExprId expr = expressions_.stripped(part.term.expr);
    if (reduced) {
      fault = expressions_.reduction_fault(expr, n_);
      if (fault.empty() && options_.balanced &&
          expr != expressions_.finish(expressions_.balanced(leaves.data(), leaves.size())).expr) {
        fault = "it does not associate as the balanced tree over ranks";
      }
      right = right && fault.empty();
    } else {
      right = right && expr == expressions_.leaf(required.source).expr;
    }
    if (right) continue;
    const std::string index = std::to_string(part.begin + required.shift);
    const std::string should = reduced ? "the reduction of every rank's element " + index
                                       : "in@" + std::to_string(required.source) + "[" + index + "]";
    data_fault(rank, ranks_[rank].call,
               "out[" + std::to_string(part.begin) + ":" + std::to_string(part.end) + "] holds " +
                   expressions_.words(part.term, part.begin) + ", but should hold " + should +
                   (fault.empty() ? "" : ": " + fault));
    return;
  }
}

// Each element is the same expression on all ranks: summed in the same order, encoded by the same encodes.
void SymbolicRun::check_same_results(int call_index) {
  CallState& call = calls_[call_index];
  if (!same_results(call.plan->call.world.collective)) return;
  for (int rank = 1; rank < n_; ++rank) {
    const auto &ours = call.results[rank], &first = call.results[0];
    for (size_t a = 0, b = 0; a < ours.size() && b < first.size();) {
      const int64_t begin = std::max(ours[a].begin, first[b].begin),
                    end = std::min(ours[a].end, first[b].end);
      if (begin < end && ours[a].term != first[b].term) {
        data_fault(rank, call_index,
                   "out[" + std::to_string(begin) + ":" + std::to_string(end) + "] holds " +
                       expressions_.words(ours[a].term, begin) + ", but rank 0's holds " +
                       expressions_.words(first[b].term, begin));
        return;
      }
      (ours[a].end < first[b].end ? a : b)++;
    }
  }
}

}  // namespace pycomm::schedule
