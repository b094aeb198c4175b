#include "schedule/verify/trips.h"

#include <algorithm>
#include <map>
#include <optional>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

namespace pycomm::schedule {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b > 0); }

using StepKind = Step::Kind;
using Cell = std::tuple<int, int, int>;  // writer, reader, index; of a channel sender, receiver, index

// Whether the step has operands; the others have a value, which counts signals or messages.
bool has_operands(const Step& step) {
  switch (step.kind) {
    case StepKind::combine:
    case StepKind::send:
    case StepKind::recv:
      return true;
    case StepKind::signal:
    case StepKind::wait:
    case StepKind::complete:
      return false;
  }
  return false;
}

Cell cell_of(int rank, const Step& step) {
  const bool from_here =
      step.kind == StepKind::signal || step.kind == StepKind::send || step.kind == StepKind::complete;
  return from_here ? Cell{rank, step.peer, step.cell} : Cell{step.peer, rank, step.cell};
}

std::span<const Step> steps_of(const Program& program, const Loop& loop) {
  return std::span(program.steps).subspan(loop.step, loop.num_steps);
}

bool same_loops(const Plan& plan) {
  const std::vector<Loop>* common = nullptr;
  for (const Program& program : plan.programs) {
    if (program.loops.empty()) continue;
    if (common == nullptr) common = &program.loops;
    const bool same = std::equal(common->begin(), common->end(), program.loops.begin(), program.loops.end(),
                                 [](const Loop& a, const Loop& b) {
                                   return a.first == b.first && a.trips == b.trips && a.stages == b.stages;
                                 });
    if (!same) return false;
  }
  return common != nullptr;
}

// How many trips a value can be away from its own trip's values, at most; nothing if steps of one cell do not
// count alike.
std::optional<int64_t> signal_distance(const Plan& plan) {
  std::map<Cell, int64_t> per_trip;
  int64_t distance = 0;
  for (size_t rank = 0; rank < plan.programs.size(); ++rank) {
    for (const Step& step : plan.programs[rank].steps) {
      if (has_operands(step)) continue;
      const auto known = per_trip.emplace(cell_of(static_cast<int>(rank), step), step.per_trip).first;
      if (step.per_trip < 1 || known->second != step.per_trip) return std::nullopt;
      distance = std::max(distance, ceil_div(std::abs(step.value), step.per_trip));
    }
  }
  return distance;
}

// What one loop does with a channel in a trip.
struct Exchange {
  std::vector<const Step*> sends, recvs, completes;
};

// Whether every trip receives as much as it sends, no earlier than it is sent, and every complete waits for
// what has been received by then.
bool exchange_is_even(const Exchange& exchange) {
  const std::vector<const Step*>&sends = exchange.sends, &recvs = exchange.recvs;
  if (sends.size() != recvs.size()) return false;
  for (size_t i = 0; i < sends.size(); ++i) {
    if (sends[i]->stage > recvs[i]->stage) return false;
  }
  return std::ranges::all_of(exchange.completes, [&](const Step* complete) {
    if (complete->per_trip != static_cast<int64_t>(recvs.size())) return false;
    for (size_t i = 0; i < recvs.size(); ++i) {
      const int64_t ahead = ceil_div(complete->value - static_cast<int64_t>(i + 1), complete->per_trip);
      if (ahead + recvs[i]->stage > complete->stage) return false;
    }
    return true;
  });
}

// Whether no step of this loop waits for a signal, a message or a receipt of a later iteration.
bool waits_for_the_past(const Plan& plan, size_t loop) {
  std::map<Cell, std::vector<const Step*>> signals;
  std::map<Cell, Exchange> exchanges;
  std::vector<std::pair<int, const Step*>> waits;
  for (int rank = 0; rank < static_cast<int>(plan.programs.size()); ++rank) {
    const Program& program = plan.programs[rank];
    if (program.loops.empty()) continue;
    for (const Step& step : steps_of(program, program.loops[loop])) {
      const Cell cell = cell_of(rank, step);
      switch (step.kind) {
        case StepKind::combine:
          break;
        case StepKind::signal:
          signals[cell].push_back(&step);
          break;
        case StepKind::wait:
          waits.emplace_back(rank, &step);
          break;
        case StepKind::send:
          exchanges[cell].sends.push_back(&step);
          break;
        case StepKind::recv:
          exchanges[cell].recvs.push_back(&step);
          break;
        case StepKind::complete:
          exchanges[cell].completes.push_back(&step);
          break;
      }
    }
  }
  const auto is_past = [&](const std::pair<int, const Step*>& rank_and_wait) {
    const int rank = rank_and_wait.first;
    const Step* const wait = rank_and_wait.second;
    return std::ranges::any_of(signals[cell_of(rank, *wait)], [&](const Step* signal) {
      return ceil_div(wait->value - signal->value, wait->per_trip) + signal->stage <= wait->stage;
    });
  };
  return std::ranges::all_of(waits, is_past) &&
         std::ranges::all_of(exchanges, [](const auto& entry) { return exchange_is_even(entry.second); });
}

// One operand's bytes in a rank's buffers over all trips of a loop.
struct Span {
  int64_t first_trip, trips;
  int64_t begin, bytes;  // at trip 0
  int64_t stride;
  size_t loop;
  bool write;
  int64_t lowest() const { return begin + (first_trip + (stride < 0 ? trips - 1 : 0)) * stride; }
  int64_t end() const { return begin + (first_trip + (stride < 0 ? 0 : trips - 1)) * stride + bytes; }
};

std::vector<std::vector<Span>> spans_by_owner(const Plan& plan, const std::vector<CallerMemory>& buffers) {
  std::vector<std::vector<Span>> spans(plan.programs.size());
  for (const Program& program : plan.programs) {
    for (size_t loop = 0; loop < program.loops.size(); ++loop) {
      const Loop& l = program.loops[loop];
      for (int32_t s = 0; s < l.num_steps; ++s) {
        const Step& step = program.steps[l.step + s];
        if (!has_operands(step) || step.count == 0) continue;
        for (int32_t i = 0; i < step.num_dsts + step.num_srcs; ++i) {
          const Operand& operand = program.operands[step.operand + i];
          if (operand.space != Space::in && operand.space != Space::out) continue;
          const CallerMemory& owner = buffers[operand.rank];
          const int64_t base = operand.space == Space::in ? owner.in_begin : owner.out_begin;
          spans[operand.rank].push_back({l.first, l.trips, base + operand.offset,
                                         operand_bytes(plan.call, operand.format, step.count), operand.stride,
                                         loop, i < step.num_dsts});
        }
      }
    }
  }
  for (auto& owned : spans) {
    std::sort(owned.begin(), owned.end(),
              [](const Span& a, const Span& b) { return a.lowest() < b.lowest(); });
  }
  return spans;
}

// Whether the trips of this loop touch disjoint bytes of a rank's buffers. Spans that overlap over all trips
// form a group: it must belong to this loop alone, have one stride, and be no longer than the stride in a
// trip. Adds what the trips [from, to) write.
bool trips_are_disjoint(const std::vector<Span>& spans, size_t loop, int64_t from, int64_t to,
                        std::vector<ByteRange>& written) {
  for (size_t begin = 0; begin < spans.size();) {
    int64_t reach = spans[begin].end();
    bool in_loop = false, others = false, write = false, same_stride = true;
    int64_t lowest = INT64_MAX, highest = INT64_MIN;
    size_t end = begin;
    for (; end < spans.size() && (end == begin || spans[end].lowest() < reach); ++end) {
      const Span& span = spans[end];
      reach = std::max(reach, span.end());
      (span.loop == loop ? in_loop : others) = true;
      write = write || span.write;
      same_stride = same_stride && span.stride == spans[begin].stride;
      lowest = std::min(lowest, span.begin);
      highest = std::max(highest, span.begin + span.bytes);
    }
    const int64_t stride = spans[begin].stride;
    begin = end;
    if (!in_loop) continue;
    if (others || !same_stride || highest - lowest > stride) return false;
    if (write) written.push_back({lowest + from * stride, lowest + to * stride});
  }
  return true;
}

}  // namespace

TripSelection select_trips(const Plan& plan, const std::vector<CallerMemory>& buffers, bool all_trips) {
  const size_t n = plan.programs.size();
  TripSelection selection;
  selection.left_out.resize(n);
  const Program* model = nullptr;
  for (const Program& program : plan.programs) {
    std::vector<LoopTrips>& loops = selection.loops.emplace_back();
    for (const Loop& loop : program.loops) loops.push_back({loop.first, loop.trips, loop.trips, 0, 0});
    if (!program.loops.empty()) model = &program;
  }
  if (all_trips || model == nullptr || plan.slots < 1 || !same_loops(plan)) return selection;
  const std::optional<int64_t> distance = signal_distance(plan);
  if (!distance) return selection;

  std::vector<std::vector<Span>> spans;
  int64_t shift = 0;
  for (size_t loop = 0; loop < model->loops.size(); ++loop) {
    const Loop& l = model->loops[loop];
    const int64_t needed = plan.slots + *distance + l.stages + 2;
    const int64_t gap = std::max<int64_t>(0, l.trips - needed) / plan.slots * plan.slots;
    const int64_t head = needed - 1;
    bool cut = gap > 0 && waits_for_the_past(plan, loop);
    if (cut) {
      if (spans.empty()) spans = spans_by_owner(plan, buffers);
      auto left_out = selection.left_out;
      for (size_t rank = 0; cut && rank < n; ++rank) {
        cut = trips_are_disjoint(spans[rank], loop, l.first + head, l.first + head + gap, left_out[rank]);
      }
      if (cut) selection.left_out = std::move(left_out);
    }
    for (auto& loops : selection.loops) {
      if (loops.empty()) continue;
      loops[loop] = cut ? LoopTrips{l.first - shift, l.trips - gap, head, shift, gap}
                        : LoopTrips{l.first - shift, l.trips, l.trips, shift, 0};
    }
    if (cut) shift += gap;
  }
  for (auto& ranges : selection.left_out) {
    std::sort(ranges.begin(), ranges.end(),
              [](const ByteRange& a, const ByteRange& b) { return a.begin < b.begin; });
  }
  return selection;
}

}  // namespace pycomm::schedule
