#include "runtime/binder.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "common/error.h"
#include "common/hash.h"
#include "runtime/coding.h"
#include "runtime/select.h"
#include "schedule/cursor.h"
#include "schedule/lower/layout.h"
#include "transport/arena.h"

namespace pycomm::runtime {

// All ranks must find the same. A rank's own slot of the other buffer lies elsewhere on every rank; what
// only the root has (gather, scatter, the output of reduce), and empty blocks, may lie anywhere: these are
// plain.
Binder::Sides Binder::sides_in_reach(const schedule::Call& call, bool in_place) const {
  const schedule::Traits& traits = call.world.traits();
  if (size() == 1 || call.coded() || traits.between_two() || call.ragged ||
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

Bound Binder::bind(Request& request) {
  if (request.call.world.traits().reduces) {
    require(request.call.dtype, request.call.op);
  } else {
    request.call.op = any_op(request.call.dtype);
  }
  Bound bound;
  bound.timeout_s = request.timeout_s < 0 ? timeout_s_ : request.timeout_s;
  bound.bases = {static_cast<const char*>(request.in), static_cast<char*>(request.out), 0, 0};
  schedule::Call& call = request.call;
  if (request.coding) {
    check_coding(request);
    call.codec = request.coding->codec;
    call.codec.seed = 0;
    bound.coding = request.coding;
    bound.bases.coding = bound.coding.get();
  }
  int plan_rank = rank();
  Heap::Place in, out;
  if (call.world.traits().between_two()) {
    bound.src = call.world.root;
    bound.dst = call.world.peer;
    plan_rank = rank() == bound.src ? 0 : 1;
    const auto& nodes = domain_.group().nodes;
    const bool mapped = nodes.empty() || nodes[bound.src] == nodes[bound.dst];
    call.world = {.collective = call.world.collective, .size = 2, .root = 0, .peer = 1, .nodes = {}};
    if (!mapped) call.world.nodes = {0, 1};
  } else {
    call.world.size = size();
    call.world.nodes = domain_.group().nodes;
    if (!heap_.empty()) {
      const auto [in_reach, out_reach] = sides_in_reach(call, call.in_place);
      const auto item = static_cast<int64_t>(size_of(call.dtype));
      if (in_reach) in = heap_.find(request.in, schedule::in_elements(call, rank()) * item);
      if (out_reach) out = heap_.find(request.out, schedule::out_elements(call, rank()) * item);
      if (in.distance) call.in = schedule::Placement::symmetric;
      if (out.distance) call.out = schedule::Placement::symmetric;
      bound.bases.in_distance = in.distance;
      bound.bases.out_distance = out.distance;
    }
  }
  bound.prepared = plans_.prepare(call, request.algorithm, plan_rank);
  bound.record = bound.prepared->record;
  if (request.coding) finish_coding(request, rank(), bound);
  if (request.part_of) {
    const uint64_t fingerprint = bound.record.fingerprint;
    bound.record = *request.part_of;
    bound.record.fingerprint = Hasher(bound.record.fingerprint).add(fingerprint).digest() | 1;
  }
  if (bound.src >= 0) {
    const bool sends = rank() == bound.src;
    bound.record.side = sends ? CallRecord::Side::sends : CallRecord::Side::receives;
    bound.record.peer = static_cast<int16_t>(sends ? bound.dst : bound.src);
  }
  if (in.distance || out.distance) {
    bound.record.symmetric_offset = in.distance ? in.offset : out.offset;
    bound.record.fingerprint = Hasher(bound.record.fingerprint).add(in.offset).add(out.offset).digest() | 1;
  }
  if (!request.tag.empty()) {
    std::strncpy(bound.record.tag, request.tag.c_str(), sizeof bound.record.tag - 1);
    bound.record.fingerprint = Hasher(bound.record.fingerprint).add(request.tag).digest() | 1;
  }
  if (call.ragged && size() > 1) agree_on_counts(bound);
  const bool alone = bound.src >= 0;
  // Parts of another call are about memory of the library's own.
  const bool asks = !alone && !request.part_of && sides_to_tell(call, false).any();
  auto reading = alone ? nullptr : prepare_reading(call, request.algorithm, plan_rank);
  if (asks || reading) {
    const Sides told = asks ? sides_to_tell(call, call.in_place) : Sides{};
    agree_on_places(bound, request.algorithm, told, std::move(reading));
  }
  if (request.coding) bound.set_step(request.coding->step);
  return bound;
}

// ---- what ranks agree on first ----

// The exchange of words: all to all, or all of them to everybody. A part of the call that it is for, also to
// the others, whose record this is. `words` must live as long as the plan.
BoundPlan Binder::exchange(const CallRecord& record, Collective kind, Agreement& words) {
  const auto mine = static_cast<int64_t>(words.mine.size());
  const bool gathers = kind == Collective::all_gather;
  words.all.resize(static_cast<size_t>(gathers ? mine * size() : mine));
  Request request;
  request.call.world = {.collective = kind, .size = size()};
  request.call.dtype = DType::int64;
  request.call.counts = schedule::uniform_counts(request.call.world, gathers ? mine : 1);
  request.in = words.mine.data();
  request.out = words.all.data();
  BoundPlan plan = bind(request);
  plan.record = record;
  plan.record.fingerprint = Hasher(record.fingerprint).add(size()).digest() | 1;
  return plan;
}

// Pairwise counts are not in the fingerprint (a rank knows only its row and its column), so ranks exchange
// them first.
void Binder::agree_on_counts(Bound& bound) {
  const schedule::Call& call = bound.prepared->plan.call;
  std::vector<int64_t> sent, expected;  // elements, by peer
  for (int r = 0; r < size(); ++r) {
    sent.push_back(call.counts[rank() * size() + r]);
    expected.push_back(call.counts[r * size() + rank()]);
  }
  const auto agreement = std::make_shared<Agreement>(Agreement{std::move(sent), {}});
  bound.preludes.push_back({.plan = exchange(bound.record, Collective::all_to_all, *agreement)});
  bound.conclude = [this, expected, agreement](const BoundPlan& own) -> const BoundPlan& {
    const std::vector<int64_t>& coming = agreement->all;
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

// The plan that reads inputs where they lie; null if there is none, or it does not pay.
std::shared_ptr<const Prepared> Binder::prepare_reading(const schedule::Call& call,
                                                        const std::string& algorithm, int rank) {
  if (!fabric_.single_copy || call.coded() || call.in != schedule::Placement::plain ||
      !single_copy_pays(call, fabric_.profile))
    return nullptr;
  schedule::Call other = call;
  other.in = schedule::Placement::reachable;
  auto prepared = plans_.prepare(other, algorithm, rank);
  // In place, this rank has to say no to what the others can do.
  if (!prepared->reachable && call.in_place) {
    other.in_place = false;
    prepared = plans_.prepare(other, algorithm, rank);
  }
  return prepared->reachable ? prepared : nullptr;
}

// Which plain buffers of a call are worth a word. Ranks may differ in working in place, but not in asking.
Binder::Sides Binder::sides_to_tell(const schedule::Call& call, bool in_place) const {
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
struct Binder::Places {
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
  Agreement words{std::vector<int64_t>(kWords), {}};
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
void Binder::agree_on_places(Bound& bound, const std::string& algorithm, Sides told,
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
bool Binder::reaches_arenas() {
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
const BoundPlan& Binder::use_told(const BoundPlan& own, Places& places, bool in, bool out) {
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

// ---- in words ----

std::string Binder::explain(const Request& request) {
  schedule::Call call = request.call;
  call.world.size = size();
  call.world.nodes = domain_.group().nodes;
  if (call.world.traits().reduces) {
    require(call.dtype, call.op);
  } else {
    call.op = any_op(call.dtype);
  }
  if (call.codec.kind != CodecKind::none && !call.world.traits().takes_codec) {
    throw ValueError(std::string(call.world.traits().name) +
                     " takes no codec: " + schedule::codec_collectives() + " do");
  }
  if (call.codec.kind != CodecKind::none) check_floats(call, pycomm::name(call.codec.kind));
  const Choice choice = request.algorithm.empty() ? select(call, fabric_.profile, fabric_.policy.yield)
                                                  : Choice{request.algorithm, "named by the caller"};
  const auto prepared = plans_.prepare(call, request.algorithm, rank());
  const schedule::Plan& plan = prepared->plan;
  const schedule::Program& program = prepared->program(rank());
  int64_t waits = 0, moved = 0, trips = 0;
  for (const schedule::Loop& loop : program.loops) trips += loop.trips;
  schedule::Cursor().walk(program, [&](const schedule::Step& step, int64_t) {
    if (step.kind == schedule::Step::Kind::wait) ++waits;
    if (step.kind == schedule::Step::Kind::combine) {
      for (int32_t i = step.operand; i < step.operand + step.num_dsts + step.num_srcs; ++i) {
        moved += schedule::operand_bytes(plan.call, program.operands[i].format, step.count);
      }
    }
    return true;
  });
  CallRecord record = prepared->record;
  record.count = call.counts[0];  // as it was asked: one block's, which an all_to_all's record adds up
  if (call.codec.kind != CodecKind::none) tell(record, codec_words(call.codec), false);
  std::string text = describe(record) + " on " + std::to_string(size()) + " ranks\n";
  if (call.world.traits().moves()) {
    text += "buffers    `in` of " + std::to_string(schedule::in_elements(plan.call, rank())) +
            " elements, `out` of " + std::to_string(schedule::out_elements(plan.call, rank())) +
            (call.world.traits().one_block() ? "" : "; a block has " + std::to_string(call.counts[0])) + "\n";
  }
  text += "algorithm  " + choice.algorithm + ": " + choice.reason + "\n";
  text += "plan       " + std::to_string(program.steps.size()) + " steps, " + std::to_string(trips) +
          " trip" + (trips == 1 ? "" : "s") + ", " + std::to_string(waits) +
          (waits == 1 ? " wait, " : " waits, ") + std::to_string(moved) + " bytes read and written by rank " +
          std::to_string(rank()) + "\n";
  if (const auto reading = prepare_reading(call, request.algorithm, rank())) {
    text += "instead    where all ranks' inputs lie in huge pages: " +
            std::to_string(reading->program(rank()).steps.size()) +
            " steps that read them through the kernel, with one copy and no window\n";
  }
  if (const Sides told = sides_to_tell(call, call.in_place); told.any()) {
    if (told.in) call.in = schedule::Placement::told;
    if (told.out) call.out = schedule::Placement::told;
    const auto instead = plans_.prepare(call, request.algorithm, rank());
    text += "shared     where all ranks' buffers are shared arrays: " + instead->plan.algorithm + ", " +
            std::to_string(instead->program(rank()).steps.size()) + " steps that use them in place\n";
  }
  text += "window     " + std::to_string(plan.slots) + " slot" + (plan.slots == 1 ? "" : "s") + " of " +
          std::to_string(plan.slot_bytes) + " bytes\n";
  return text + schedule::describe(plan, rank());
}

}  // namespace pycomm::runtime
