#include "runtime/binder.h"

#include <algorithm>
#include <cstring>

#include "common/error.h"
#include "common/hash.h"
#include "runtime/coding.h"
#include "runtime/select.h"
#include "schedule/cursor.h"

namespace pycomm::runtime {

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
  if (bound.src < 0) agreement_.complete(bound, request.algorithm, request.part_of.has_value());
  if (request.coding) bound.set_step(request.coding->step);
  return bound;
}

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
  const auto& nodes = call.world.nodes;
  const int num_nodes = nodes.empty() ? 1 : 1 + *std::ranges::max_element(nodes);
  std::string text = describe(record) + " on " + std::to_string(size()) + " ranks" +
                     (num_nodes > 1 ? " of " + std::to_string(num_nodes) + " nodes\n" : "\n");
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
  if (const auto reading = agreement_.prepare_reading(call, request.algorithm)) {
    text += "instead    where all ranks' inputs lie in huge pages: " +
            std::to_string(reading->program(rank()).steps.size()) +
            " steps that read them through the kernel, with one copy and no window\n";
  }
  if (const Sides told = agreement_.sides_to_tell(call, call.in_place); told.any()) {
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
