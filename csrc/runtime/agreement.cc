#include "runtime/agreement.h"

#include <algorithm>
#include <array>
#include <utility>

#include "common/error.h"
#include "common/hash.h"
#include "runtime/select.h"
#include "schedule/lower/layout.h"
#include "transport/arena.h"

namespace pycomm::runtime {

Sides sides_in_reach(const schedule::Call& call, bool in_place) {
  const schedule::Traits& traits = call.world.traits();
  if (call.world.size == 1 || call.coded() || traits.between_two() || call.ragged ||
      (traits.rooted && !traits.one_block())) {
    return {};
  }
  const auto empty = std::count(call.counts.begin(), call.counts.end(), 0);
  const bool all_empty = empty == static_cast<std::ptrdiff_t>(call.counts.size());
  using schedule::Content;
  const auto reach = [&](const Content& side) {
    return side.holds == Content::Holds::own ? !in_place && empty == 0 : !all_empty;
  };
  return {reach(traits.in), reach(traits.out) && traits.out.on != Content::On::root};
}

void Agreement::complete(Bound& bound, const std::string& algorithm, bool part) {
  const schedule::Call& call = bound.prepared->plan.call;
  if (call.ragged && size() > 1) agree_on_counts(bound);
  const bool asks = !part && sides_to_tell(call, false).any();
  auto reading = prepare_reading(call, algorithm);
  if (!asks && !reading) return;
  agree_on_places(bound, algorithm, asks ? sides_to_tell(call, call.in_place) : Sides{}, std::move(reading));
}

// All to all, or all of them to everybody. A part of the call that it is for, also to the others, whose record
// this is. `words` must live as long as the plan.
BoundPlan Agreement::exchange(const CallRecord& record, Collective kind, Words& words) {
  const auto mine = static_cast<int64_t>(words.mine.size());
  const bool gathers = kind == Collective::all_gather;
  words.all.resize(static_cast<size_t>(gathers ? mine * size() : mine));
  schedule::Call call;
  call.world = {.collective = kind, .size = size(), .nodes = domain_.group().nodes};
  call.dtype = DType::int64;
  call.op = any_op(call.dtype);
  call.counts = schedule::uniform_counts(call.world, gathers ? mine : 1);
  BoundPlan plan;
  plan.prepared = plans_.prepare(call, "", rank());
  plan.bases.in = reinterpret_cast<const char*>(words.mine.data());
  plan.bases.out = reinterpret_cast<char*>(words.all.data());
  plan.record = record;
  plan.record.fingerprint = Hasher(record.fingerprint).add(size()).digest() | 1;
  return plan;
}

// Pairwise counts are not in the fingerprint (a rank knows only its row and its column), so ranks exchange
// them first.
void Agreement::agree_on_counts(Bound& bound) {
  const schedule::Call& call = bound.prepared->plan.call;
  std::vector<int64_t> sent, expected;  // elements, by peer
  for (int r = 0; r < size(); ++r) {
    sent.push_back(call.counts[rank() * size() + r]);
    expected.push_back(call.counts[r * size() + rank()]);
  }
  const auto words = std::make_shared<Words>(Words{std::move(sent), {}});
  bound.preludes.push_back({.plan = exchange(bound.record, Collective::all_to_all, *words)});
  bound.conclude = [this, expected, words](const BoundPlan& own) -> const BoundPlan& {
    const std::vector<int64_t>& coming = words->all;
    for (int r = 0; r < size(); ++r) {
      if (coming[r] == expected[r]) continue;
      domain_.board().fail(FailureKind::mismatch,
                           "rank " + std::to_string(r) + " sends " + std::to_string(coming[r]) +
                               " elements to rank " + std::to_string(rank()) + ", which expects " +
                               std::to_string(expected[r]) + ", in " + describe(own.record) +
                               ". What is in send_counts of one rank must be in recv_counts of the other.");
      domain_.board().raise_failure(transport::Board::Caller::under_way);
    }
    return own;
  };
}

std::shared_ptr<const Prepared> Agreement::prepare_reading(const schedule::Call& call,
                                                           const std::string& algorithm) {
  if (!fabric_.single_copy || call.coded() || call.in != schedule::Placement::plain ||
      !single_copy_pays(call, fabric_.profile))
    return nullptr;
  schedule::Call other = call;
  other.in = schedule::Placement::reachable;
  auto prepared = plans_.prepare(other, algorithm, rank());
  // In place, this rank has to say no to what the others can do.
  if (!prepared->reachable && call.in_place) {
    other.in_place = false;
    prepared = plans_.prepare(other, algorithm, rank());
  }
  return prepared->reachable ? prepared : nullptr;
}

Sides Agreement::sides_to_tell(const schedule::Call& call, bool in_place) const {
  if (!domain_.group().nodes.empty()) return {};
  Sides sides = sides_in_reach(call, in_place);
  sides.in = sides.in && call.in == schedule::Placement::plain;
  sides.out = sides.out && call.out == schedule::Placement::plain;
  // The same on all ranks, since none of these collectives has a root with a buffer of another size.
  const int64_t most = std::max(schedule::in_elements(call, 0), schedule::out_elements(call, 0));
  return most * static_cast<int64_t>(size_of(call.dtype)) >= fabric_.profile.told_bytes ? sides : Sides{};
}

namespace {

// What a rank says of its input, for those who would read it through the kernel: 0 if it is not fit for
// that, else 1 and where in a page the two buffers begin.
constexpr int64_t kPageBits = 12, kPage = int64_t{1} << kPageBits;

int64_t word_of(bool fit, const Bases& bases) {
  const auto in = static_cast<int64_t>(reinterpret_cast<uintptr_t>(bases.in) % kPage);
  const auto out = static_cast<int64_t>(reinterpret_cast<uintptr_t>(bases.out) % kPage);
  return fit ? 1 | in << 1 | out << (1 + kPageBits) : 0;
}

}  // namespace

// What the ranks say to each other of where the buffers of a call lie, and the plans for it. Used by one run
// at a time.
struct Agreement::Places {
  enum Word : uint8_t { fit, in, out, kWords };
  // Nothing was told, in the words of `in` and `out`; else the offset in the rank's arena, and whether the
  // rank works in place.
  static constexpr int64_t kUntold = -1;
  static int64_t told(int64_t offset, bool in_place) {
    return offset < 0 ? kUntold : offset << 1 | static_cast<int64_t>(in_place);
  }

  const Sides sides;
  const Bases bases;
  const int64_t in_bytes, out_bytes;
  const bool in_place;
  const std::string algorithm;
  const CallRecord record;
  Words words{std::vector<int64_t>(kWords), {}};
  std::unique_ptr<BoundPlan> exchange, reading;     // apart: most calls need none of these
  std::array<std::unique_ptr<BoundPlan>, 4> plans;  // by the sides that are told
  std::vector<char*> everyones;                     // Bases::told

  // Where this rank's buffer lies in its arena; -1: not there, or not to be told.
  int64_t offset(Word side) const {
    const transport::Arena* const arena = transport::Arena::if_any();
    if (!arena || !arena->used() || !(side == in ? sides.in : sides.out)) return -1;
    return side == in ? arena->offset_of(bases.in, in_bytes) : arena->offset_of(bases.out, out_bytes);
  }
  int64_t word(int rank, Word which) const { return words.all[rank * kWords + which]; }
  // All ranks have told, and work in place or not alike: so are plans proved.
  bool all_told(Word side, int size) const {
    for (int rank = 0; rank < size; ++rank) {
      if (word(rank, side) == kUntold || ((word(rank, side) ^ word(0, side)) & 1) != 0) return false;
    }
    return true;
  }
  // The kernel copies by `rep movsb`, which Zen 3 and Zen 4 run many times slower where the destination lies
  // 1 to 31 bytes beyond the source modulo 4 KiB.
  bool reads_fast(const schedule::Call& call) const {
    const auto item = static_cast<int64_t>(size_of(call.dtype));
    for (int to = 0; to < call.world.size; ++to) {
      for (int from = 0; from < call.world.size; ++from) {
        if (from == to) continue;
        const int64_t in = word(from, fit) >> 1 & (kPage - 1), out = word(to, fit) >> (1 + kPageBits);
        const int block = call.world.traits().in.holds == schedule::Content::Holds::own ? from : to;
        const int64_t source = schedule::block_offset(call, from, schedule::Buffer::in, block) * item;
        const int64_t landing = schedule::block_offset(call, to, schedule::Buffer::out, from) * item;
        const int64_t beyond = (out + landing - in - source) & (kPage - 1);
        if (beyond > 0 && beyond < 32) return false;
      }
    }
    return true;
  }
  bool reads() const {
    if (!reading) return false;
    const schedule::Call& call = reading->prepared->plan.call;
    for (int rank = 0; rank < call.world.size; ++rank) {
      if (word(rank, fit) == 0) return false;
    }
    return reads_fast(call);
  }
};

namespace {
// Another plan for what `own` is for.
BoundPlan instead_of(const BoundPlan& own, std::shared_ptr<const Prepared> prepared) {
  BoundPlan other = own;
  other.record.in = prepared->record.in;
  other.record.out = prepared->record.out;
  std::ranges::copy(prepared->record.algorithm, other.record.algorithm);
  other.record.fingerprint = Hasher(own.record.fingerprint).add(prepared->record.fingerprint).digest() | 1;
  other.prepared = std::move(prepared);
  return other;
}
}  // namespace

// Whether a buffer is fit to be read where it lies, or lies where others can use it, its owner alone knows.
void Agreement::agree_on_places(Bound& bound, const std::string& algorithm, Sides told,
                                std::shared_ptr<const Prepared> reading) {
  const schedule::Call& call = bound.prepared->plan.call;
  const auto item = static_cast<int64_t>(size_of(call.dtype));
  const auto places =
      std::make_shared<Places>(Places{.sides = told,
                                      .bases = bound.bases,
                                      .in_bytes = schedule::in_elements(call, rank()) * item,
                                      .out_bytes = schedule::out_elements(call, rank()) * item,
                                      .in_place = call.in_place,
                                      .algorithm = algorithm,
                                      .record = bound.record});
  Prelude& prelude = bound.preludes.emplace_back();
  // Else `out` would be written over `in`.
  const bool kept = reading && reading->plan.call.in_place == call.in_place;
  if (reading) {
    prelude.plan = exchange(places->record, Collective::all_gather, places->words);
    places->reading = std::make_unique<BoundPlan>(instead_of(bound, std::move(reading)));
  } else {
    prelude.wanted = [this, places](uint64_t number) -> const BoundPlan* {
      if (places->offset(Places::in) >= 0 || places->offset(Places::out) >= 0) domain_.wish_to_tell(number);
      if (!domain_.tells(number)) return nullptr;
      if (!places->exchange) {
        places->exchange =
            std::make_unique<BoundPlan>(exchange(places->record, Collective::all_gather, places->words));
      }
      return places->exchange.get();
    };
  }
  prelude.before = [this, places, kept] {
    const bool fit = kept && domain_.group().node->fit_to_read(places->bases.in, places->in_bytes);
    int64_t in = places->offset(Places::in), out = places->offset(Places::out);
    if ((in >= 0 || out >= 0) && !reaches_arenas()) in = out = -1;
    places->words.mine = {word_of(fit, places->bases), Places::told(in, places->in_place),
                          Places::told(out, places->in_place)};
  };
  bound.conclude = [this, places](const BoundPlan& own) -> const BoundPlan& {
    const bool in = places->all_told(Places::in, size()), out = places->all_told(Places::out, size());
    if (!in && places->reads()) return *places->reading;
    return in || out ? use_told(own, *places, in, out) : own;
  };
}

// The arenas of all, by rank. False if one cannot be mapped here.
bool Agreement::reaches_arenas() {
  if (!arenas_.empty()) return true;
  std::vector<char*> arenas;
  for (const int rank : domain_.group().node_ranks) {
    arenas.push_back(domain_.group().node->arena_of(rank));
    if (!arenas.back()) return false;
  }
  arenas_ = std::move(arenas);
  return true;
}

// The others may have begun: what goes wrong here is the group's failure.
const BoundPlan& Agreement::use_told(const BoundPlan& own, Places& places, bool in, bool out) {
  // A rank that has given the call up may have its array back: touch it no more, if that is known.
  if (domain_.board().failed()) domain_.board().raise_failure(transport::Board::Caller::under_way);
  try {
    std::unique_ptr<BoundPlan>& plan = places.plans[in + 2 * out];
    if (!plan) {
      schedule::Call call = own.prepared->plan.call;
      if (in) call.in = schedule::Placement::told;
      if (out) call.out = schedule::Placement::told;
      plan = std::make_unique<BoundPlan>(instead_of(own, plans_.prepare(call, places.algorithm, rank())));
      places.everyones.resize(2 * static_cast<size_t>(size()));
    }
    const Bases& bases = own.bases;
    for (int r = 0; r < size(); ++r) {
      places.everyones[r] = in ? arenas_[r] + (places.word(r, Places::in) >> 1)
                               : const_cast<char*>(bases.in) + (r - rank()) * bases.in_distance;
      places.everyones[size() + r] = out ? arenas_[r] + (places.word(r, Places::out) >> 1)
                                         : bases.out + (r - rank()) * bases.out_distance;
    }
    plan->bases.told = places.everyones.data();
    return *plan;
  } catch (const std::exception& error) {
    domain_.board().fail(
        FailureKind::aborted,
        "rank " + std::to_string(rank()) + " could not prepare a call on shared arrays: " + error.what());
    domain_.board().raise_failure(transport::Board::Caller::under_way);
  }
}

}  // namespace pycomm::runtime
