#include "runtime/binder.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/error.h"
#include "common/hash.h"
#include "runtime/coding.h"
#include "runtime/select.h"
#include "schedule/cursor.h"
#include "schedule/lower/layout.h"

namespace pycomm::runtime {

// All ranks must find the same. A rank's own slot of the other buffer lies elsewhere on every rank; what
// only the root has (gather, scatter, the output of reduce), and empty blocks, may lie anywhere: these are
// plain.
void Binder::find_symmetric(const Request& request, Heap::Place& in, Heap::Place& out) const {
  const schedule::Call& call = request.call;
  const schedule::Traits& traits = call.world.traits();
  if ((traits.rooted && !traits.one_block()) || call.ragged) return;
  const auto item = static_cast<int64_t>(size_of(call.dtype));
  const bool empty_blocks = std::count(call.counts.begin(), call.counts.end(), 0) > 0;
  const bool all_empty = std::count(call.counts.begin(), call.counts.end(), 0) ==
                         static_cast<std::ptrdiff_t>(call.counts.size());
  using schedule::Content;
  const bool own_block_in = traits.in.holds == Content::Holds::own,
             own_block_out = traits.out.holds == Content::Holds::own;
  if (!(own_block_in ? call.in_place || empty_blocks : all_empty)) {
    in = heap_.find(request.in, schedule::in_elements(call, rank()) * item);
  }
  if (!(own_block_out ? call.in_place || empty_blocks : all_empty || traits.out.on == Content::On::root)) {
    out = heap_.find(request.out, schedule::out_elements(call, rank()) * item);
  }
}

Bound Binder::bind(Request& request) {
  if (request.call.world.traits().reduces) {
    require(request.call.dtype, request.call.op);
  } else {
    request.call.op = any_op(request.call.dtype);
  }
  Bound bound;
  bound.timeout_s = request.timeout_s < 0 ? timeout_s_ : request.timeout_s;
  bound.buffers = {static_cast<const char*>(request.in), static_cast<char*>(request.out), 0, 0};
  schedule::Call& call = request.call;
  if (request.coding) {
    check_coding(request);
    call.codec = request.coding->codec;
    call.codec.seed = 0;
    bound.coding = request.coding;
    bound.buffers.coding = bound.coding.get();
  }
  int plan_rank = rank();
  Heap::Place in, out;
  if (call.world.traits().between_two()) {
    bound.src = call.world.root;
    bound.dst = call.world.peer;
    plan_rank = rank() == bound.src ? 0 : 1;
    const auto& nodes = domain_.nodes();
    const bool mapped = nodes.empty() || nodes[bound.src] == nodes[bound.dst];
    call.world = {.collective = call.world.collective, .size = 2, .root = 0, .peer = 1, .nodes = {}};
    if (!mapped) call.world.nodes = {0, 1};
  } else {
    call.world.size = size();
    call.world.nodes = domain_.nodes();
    if (!heap_.empty() && size() > 1 && !call.coded()) {
      find_symmetric(request, in, out);
      if (in.distance) call.in = schedule::Placement::symmetric;
      if (out.distance) call.out = schedule::Placement::symmetric;
      bound.buffers.in_distance = in.distance;
      bound.buffers.out_distance = out.distance;
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
  if (auto reading = prepare_reading(call, request.algorithm, plan_rank)) {
    agree_on_reading(bound, std::move(reading));
  }
  if (request.coding) bound.set_step(request.coding->step);
  return bound;
}

// ---- what ranks agree on first ----

// A part of the call that it is for, also to the others. Gives the word of each rank, or to each, as they
// are when the prelude has run.
std::shared_ptr<Binder::Agreement> Binder::agree(Bound& bound, Collective kind, std::vector<int64_t> mine) {
  const auto agreement =
      std::make_shared<Agreement>(Agreement{std::move(mine), std::vector<int64_t>(size())});
  Request request;
  request.call.world = {.collective = kind, .size = size()};
  request.call.dtype = DType::int64;
  request.call.counts = schedule::uniform_counts(request.call.world, 1);
  request.in = agreement->mine.data();
  request.out = agreement->all.data();
  Prelude prelude{.before = nullptr, .plan = bind(request)};
  prelude.plan.record = bound.record;
  prelude.plan.record.fingerprint = Hasher(bound.record.fingerprint).add(size()).digest() | 1;
  bound.preludes.push_back(std::move(prelude));
  return agreement;
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
  const auto agreement = agree(bound, Collective::all_to_all, std::move(sent));
  bound.conclude = [this, expected, agreement](const BoundPlan& own) -> const BoundPlan& {
    const std::vector<int64_t>& coming = agreement->all;
    for (int r = 0; r < size(); ++r) {
      if (coming[r] == expected[r]) continue;
      domain_.fail(FailureKind::mismatch,
                   "rank " + std::to_string(r) + " sends " + std::to_string(coming[r]) +
                       " elements to rank " + std::to_string(rank()) + ", which expects " +
                       std::to_string(expected[r]) + ", in " + describe(own.record) +
                       ". What is in send_counts of one rank must be in recv_counts of the other.");
      domain_.raise_failure(Domain::Caller::under_way);
    }
    return own;
  };
}

// The plan that reads inputs where they lie; null if there is none, or it does not pay.
std::shared_ptr<const Prepared> Binder::prepare_reading(const schedule::Call& call,
                                                        const std::string& algorithm, int rank) {
  if (!fabric_.single_copy || call.coded() ||
      call.in != schedule::Placement::plain || !single_copy_pays(call, fabric_.profile))
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

namespace {

// What a rank says of its buffers: 0 if its input is not fit to be read, else 1 and where in a page the two
// begin.
constexpr int64_t kPageBits = 12, kPage = int64_t{1} << kPageBits;

int64_t word_of(bool fit, const Buffers& buffers) {
  const auto in = static_cast<int64_t>(reinterpret_cast<uintptr_t>(buffers.in) % kPage);
  const auto out = static_cast<int64_t>(reinterpret_cast<uintptr_t>(buffers.out) % kPage);
  return fit ? 1 | in << 1 | out << (1 + kPageBits) : 0;
}

// The kernel copies by `rep movsb`, which Zen 3 and Zen 4 run many times slower where the destination lies
// 1 to 63 bytes beyond the source modulo 4 KiB.
bool reads_fast(const schedule::Call& call, const std::vector<int64_t>& words) {
  const auto item = static_cast<int64_t>(size_of(call.dtype));
  for (int to = 0; to < call.world.size; ++to) {
    for (int from = 0; from < call.world.size; ++from) {
      if (from == to) continue;
      const int64_t in = words[from] >> 1 & (kPage - 1), out = words[to] >> (1 + kPageBits);
      const int block = call.world.traits().in.holds == schedule::Content::Holds::own ? from : to;
      const int64_t source = schedule::block_offset(call, from, schedule::Buffer::in, block) * item;
      const int64_t landing = schedule::block_offset(call, to, schedule::Buffer::out, from) * item;
      const int64_t beyond = (out + landing - in - source) & (kPage - 1);
      if (beyond > 0 && beyond < 32) return false;
    }
  }
  return true;
}

}  // namespace

// Whether an input is fit to be read where it lies, its owner alone knows.
void Binder::agree_on_reading(Bound& bound, std::shared_ptr<const Prepared> prepared) {
  const schedule::Call& call = bound.prepared->plan.call;
  const int64_t bytes = schedule::in_elements(call, rank()) * static_cast<int64_t>(size_of(call.dtype));
  const bool kept = prepared->plan.call.in_place == call.in_place;  // else `out` would be written over `in`
  const auto agreement = agree(bound, Collective::all_gather, {0});
  bound.preludes.back().before = [this, bytes, kept, agreement, buffers = bound.buffers] {
    const bool fit = kept && domain_.node().fit_to_read(buffers.in, bytes);
    agreement->mine[0] = word_of(fit, buffers);
  };
  BoundPlan reading = bound;
  reading.record.in = schedule::Placement::reachable;
  reading.record.fingerprint =
      Hasher(bound.record.fingerprint).add(prepared->record.fingerprint).digest() | 1;
  reading.prepared = std::move(prepared);
  bound.conclude = [agreement, reading = std::move(reading)](const BoundPlan& own) -> const BoundPlan& {
    const std::vector<int64_t>& words = agreement->all;
    const bool fit = std::count(words.begin(), words.end(), 0) == 0;
    return fit && reads_fast(reading.prepared->plan.call, words) ? reading : own;
  };
}

// ---- in words ----

std::string Binder::explain(const Request& request) {
  schedule::Call call = request.call;
  call.world.size = size();
  call.world.nodes = domain_.nodes();
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
  if (call.codec.kind != CodecKind::none) tell(record, codec_words(call.codec), false);
  std::string text = describe(record) + " on " + std::to_string(size()) + " ranks\n";
  text += "algorithm  " + choice.algorithm + ": " + choice.reason + "\n";
  text += "plan       " + std::to_string(program.steps.size()) + " steps, " + std::to_string(trips) +
          " trip" + (trips == 1 ? "" : "s") + ", " + std::to_string(waits) + " waits, " +
          std::to_string(moved) + " bytes read and written by rank " + std::to_string(rank()) + "\n";
  if (const auto reading = prepare_reading(call, request.algorithm, rank())) {
    text += "instead    where all ranks' inputs lie in huge pages: " +
            std::to_string(reading->program(rank()).steps.size()) +
            " steps that read them through the kernel, with one copy and no window\n";
  }
  text += "window     " + std::to_string(plan.slots) + " slot" + (plan.slots == 1 ? "" : "s") + " of " +
          std::to_string(plan.slot_bytes) + " bytes\n";
  for (const schedule::Step& step : program.steps)
    text += "  " + schedule::describe(plan, rank(), step) + "\n";
  return text;
}

}  // namespace pycomm::runtime
