// Codecs in a symbolic run. A wire location holds one value for each tile: what its maker encoded.
//
// A right encode takes whole tiles of the data (the last one may be short) and counts from the right place in
// the data and in the rank's residuals; any other makes garbage. So does a decode beyond the data's end.
#include <algorithm>

#include "schedule/verify/run.h"

namespace pycomm::schedule {

namespace {

// A part of the inputs, in elements, that is cut into tiles from its begin on.
struct Section {
  int64_t begin = 0, end = 0;
  int64_t index = 0;  // where its begin must count from: Transcode::index of an encode there
};

// The section of `element` of a rank's input; an empty one if there is none.
Section section_of(const Call& call, int rank, int64_t element) {
  switch (call.world.collective) {
    case Collective::all_reduce:
      return {0, call.counts[0], 0};
    case Collective::all_gather:
      return {0, call.counts[rank], 0};
    case Collective::reduce_scatter: {  // every block begins with a tile
      Section section;
      for (const int64_t count : call.counts) {
        section.end = section.begin + count;
        if (element >= section.begin && element < section.end) return section;
        section.begin = section.end;
        section.index += (count + kTile - 1) / kTile * kTile;
      }
      return {};
    }
    case Collective::broadcast:
    case Collective::reduce:
    case Collective::gather:
    case Collective::scatter:
    case Collective::all_to_all:
    case Collective::barrier:
    case Collective::send_recv:
      break;  // not encodable()
  }
  return {};
}

}  // namespace

// How many elements a tile has.
int64_t SymbolicRun::tile_length(const Call& call, Term tile) const {
  const int64_t first = expressions_.first_element(tile);
  const Section section = section_of(call, expressions_.some_rank(tile.expr), first);
  return std::clamp<int64_t>(section.end - first, 0, kTile);
}

std::vector<SymbolicRun::Elements> SymbolicRun::copied_tiles(const Call& call,
                                                             const std::vector<Elements>& tiles,
                                                             int64_t count) {
  std::vector<Elements> result;
  for (const Elements& part : tiles) {
    for (int64_t t = part.begin; t < part.end; ++t) {
      const Term tile{part.term.expr, part.term.delta + t};
      const bool whole = expressions_.is_garbage(tile.expr) || count - t * kTile >= tile_length(call, tile);
      result.push_back({t, t + 1, whole ? part.term : expressions_.garbage("a part of a tile")});
    }
  }
  return result;
}

std::vector<SymbolicRun::Elements> SymbolicRun::decoded(const Call& call, const std::vector<Elements>& tiles,
                                                        int64_t count) {
  std::vector<Elements> result;
  for (const Elements& part : tiles) {
    const Term elements = expressions_.decode(part.term);
    for (int64_t t = part.begin; t < part.end; ++t) {
      const int64_t begin = t * kTile, end = std::min(begin + kTile, count);
      const int64_t length = expressions_.is_garbage(part.term.expr)
                                 ? kTile
                                 : tile_length(call, {part.term.expr, part.term.delta + t});
      if (length > 0) result.push_back({begin, std::min(begin + length, end), elements});
      if (begin + length < end) {
        result.push_back({begin + length, end, expressions_.garbage("elements beyond the data's end")});
      }
    }
  }
  return result;
}

std::vector<SymbolicRun::Elements> SymbolicRun::encoded(int rank, const Step& step, int64_t trip,
                                                        const std::vector<Elements>& elements) {
  CallState& call = call_of(rank);
  const Program& program = call.plan->programs[rank];
  const Transcode& how = program.transcodes[step.transcode];
  const auto step_index = static_cast<int>(&step - program.steps.data());
  std::vector<Elements> result;
  size_t part = 0;
  for (int64_t t = 0; t * kTile < step.count; ++t) {
    const int64_t begin = t * kTile, end = std::min(begin + kTile, step.count);
    while (elements[part].end <= begin) ++part;
    size_t last = part;
    while (elements[last].end < end && elements[last + 1].term == elements[part].term) ++last;
    const Term term = elements[part].term;
    Term tiles = expressions_.garbage("an encode of several things in one tile");
    if (elements[last].end >= end) tiles = expressions_.encode(term, rank, how.turn);
    const int64_t shift = trip * how.stride + begin;
    if (!expressions_.is_garbage(tiles.expr)) {
      const int64_t first = term.delta + begin;
      const Section section = section_of(call.plan->call, expressions_.some_rank(term.expr), first);
      if (first < section.begin || first >= section.end || (first - section.begin) % kTile != 0 ||
          end - begin != std::min(kTile, section.end - first)) {
        tiles = expressions_.garbage("an encode of what is no tile of the data");
      } else if (how.index + shift != section.index + first - section.begin || how.element + shift != first) {
        tiles = expressions_.garbage("an encode that takes element " + std::to_string(first) +
                                     " for another one");
      }
    }
    const int64_t at = how.element + shift;  // the residual there is used, right or wrong
    call.encoded[rank].push_back({at, at + end - begin, how.turn, tiles.expr, step_index});
    result.push_back({t, t + 1, tiles});
  }
  return result;
}

std::vector<SymbolicRun::Elements> SymbolicRun::compute_coded(int rank, const Step& step, int64_t trip,
                                                              std::vector<std::vector<Elements>> sources) {
  const Plan& plan = *call_of(rank).plan;
  const Program& program = plan.programs[rank];
  const Operand* operands = &program.operands[step.operand + step.num_dsts];
  if (step.dst_format == Format::wire && !encodes(program, step)) {
    return copied_tiles(plan.call, sources[0], step.count);
  }
  for (int32_t s = 0; s < step.num_srcs; ++s) {
    if (operands[s].format == Format::wire) sources[s] = decoded(plan.call, sources[s], step.count);
  }
  std::vector<Elements> result = combined(step, operands, sources);
  const bool divides = program.transcodes[step.transcode].divides, wire = step.dst_format == Format::wire;
  for (Elements& part : result) {
    if (step.dst_format == Format::partial) break;
    if (!wire) part.term = divides ? expressions_.finish(part.term) : expressions_.round(part.term);
    if (wire && divides) part.term = expressions_.divide(part.term);
  }
  return wire ? encoded(rank, step, trip, result) : result;
}

void SymbolicRun::note_crossing(int rank, const Span& span, const std::vector<Memory::Piece>& pieces) {
  CallState& call = call_of(rank);
  if (!call.plan->call.coded_on(Links::wire)) return;
  for (const Elements& part : elements(pieces, span.begin, span.item, span.count, rank, span.operand)) {
    for (int64_t t = part.begin; t < part.end; ++t)
      call.crossed.insert({part.term.expr, part.term.delta + t});
  }
}

// With a codec on message links alone, every encode in a result must be of what was sent between nodes. (That
// all that is sent there is encoded, verify.cc checks for each send.)
void SymbolicRun::check_crossings(int call_index) {
  CallState& call = calls_[call_index];
  if (!call.plan->call.coded_on(Links::wire)) return;
  for (int rank = 0; rank < n_; ++rank) {
    for (const Elements& part : call.results[rank]) {
      if (expressions_.is_garbage(part.term.expr)) continue;
      for (const Term& encode : expressions_.encodes_in(part.term)) {
        const int64_t last = expressions_.tile_of(encode.expr, part.end - 1 + encode.delta);
        for (int64_t t = expressions_.tile_of(encode.expr, part.begin + encode.delta); t <= last; ++t) {
          if (call.crossed.contains({encode.expr, t})) continue;
          return data_fault(rank, call_index,
                            "out[" + std::to_string(part.begin) + ":" + std::to_string(part.end) +
                                "] holds " + expressions_.words(part.term, part.begin) +
                                ": an encode in it is of what never crossed between nodes");
        }
      }
    }
  }
}

// Checks Plan::encodes_once, and that no two different encodes of an element use the same random bits.
void SymbolicRun::check_encodes(int rank) {
  const CallState& call = call_of(rank);
  std::vector<Encoded> encoded = call.encoded[rank];
  std::ranges::sort(encoded, {}, &Encoded::begin);
  for (size_t a = 0; a < encoded.size(); ++a) {
    for (size_t b = a + 1; b < encoded.size() && encoded[b].begin < encoded[a].end; ++b) {
      const bool clash = encoded[a].turn == encoded[b].turn && encoded[a].expr != encoded[b].expr;
      if (!call.plan->encodes_once && !clash) continue;
      return fail(Kind::malformed, rank, encoded[b].step,
                  at_end(rank, ranks_[rank].call) + "element " + std::to_string(encoded[b].begin) +
                      " was encoded twice" +
                      (clash ? " in turn " + std::to_string(encoded[a].turn)
                             : ", but the plan claims that each is encoded once"));
    }
  }
}

}  // namespace pycomm::schedule
