#include "schedule/plan.h"

namespace pycomm::schedule {

namespace {

// Elements of a rank's buffer on this side. If there is a count for each pair, the rank's own begin at
// rank * first and are `step` apart.
int64_t elements(const Call& call, const Content& side, int rank, int first, int step) {
  if (!call.world.has(side, rank)) return 0;
  switch (side.holds) {
    case Content::Holds::nothing:
      return 0;
    case Content::Holds::whole:
      return call.counts[0];
    case Content::Holds::own:
      return call.counts[rank];
    case Content::Holds::blocks:
      break;
  }
  const bool pairs = call.world.traits().pairwise;
  int64_t total = 0;
  for (int block = 0; block < call.world.size; ++block) {
    total += call.counts[pairs ? rank * first + block * step : block];
  }
  return total;
}

std::string describe_operand(const Plan& plan, int rank, const Operand& operand, int64_t count) {
  const char* spaces[] = {"in", "out", "window", "outgoing", "incoming"};
  std::string text = std::string(" ") + spaces[static_cast<int>(operand.space)];
  if (operand.rank != rank) text += "@" + std::to_string(operand.rank);
  text += "[" + std::to_string(operand.offset) + ":" +
          std::to_string(operand.offset + operand_bytes(plan.call, operand.format, count)) + "]";
  if (operand.format == Format::partial) text += " partial";
  if (operand.format == Format::wire) text += " wire";
  if (operand.stride != 0) text += " + " + std::to_string(operand.stride) + "w";
  return text;
}

std::string describe_operands(const Plan& plan, int rank, const Step& combine) {
  const Program& program = plan.programs[rank];
  std::string text;
  for (int32_t i = 0; i < combine.num_dsts + combine.num_srcs; ++i) {
    if (i == combine.num_dsts) text += " <-";
    text += describe_operand(plan, rank, program.operands.at(combine.operand + i), combine.count);
  }
  if (combine.transcode < 0) return text;
  const Transcode& transcode = program.transcodes.at(combine.transcode);
  if (transcode.divides) text += ", finished";
  if (!encodes(program, combine)) return text;
  text += ", encoded from element " + std::to_string(transcode.index);
  if (transcode.stride != 0) text += " + " + std::to_string(transcode.stride) + "w";
  return text + " in turn " + std::to_string(transcode.turn);
}

}  // namespace

bool takes_codec(DType dtype) {
  return dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16;
}

void add(Hasher& hasher, const Call& call) {
  // Structured bindings name every field: with a new one, this does not compile until it is added.
  const auto& [world, dtype, op, counts, in, out, in_place, prescale, deterministic, ragged, codec] = call;
  const auto& [collective, size, root, peer, nodes] = world;
  const auto& [kind, rounding, ceil_scale, hadamard, seed, links] = codec;
  hasher.add(collective).add(size).add(root).add(peer).add(dtype).add(op).add(counts.size());
  for (int64_t count : counts) hasher.add(count);
  hasher.add(nodes.size());
  for (int node : nodes) hasher.add(node);
  hasher.add(in).add(out).add(in_place).add(prescale).add(deterministic).add(ragged);
  hasher.add(kind).add(rounding).add(ceil_scale).add(hadamard).add(seed).add(links);
}

bool encodes(const Program& program, const Step& step) {
  return step.dst_format == Format::wire &&
         (step.num_srcs > 1 || program.operands[step.operand + step.num_dsts].format != Format::wire);
}

Average factors_of(const Call& call) {
  if (call.op != Op::avg) return {call.prescale, 1.0};
  if (call.coded()) return {call.prescale, static_cast<double>(call.world.size)};
  const auto [prescale, divisor] = average(call.dtype, call.world.size);
  return {call.prescale * prescale, divisor};
}

int64_t operand_bytes(const Call& call, Format format, int64_t count) {
  switch (format) {
    case Format::raw:
    case Format::final:
      return count * static_cast<int64_t>(size_of(call.dtype));
    case Format::partial:
      return count * static_cast<int64_t>(size_of(accumulator(call.dtype)));
    case Format::wire:
      return (count + kTile - 1) / kTile * tile_bytes(call.codec.kind);
  }
  return 0;
}

std::string describe(const Plan& plan, int rank) {
  const Program& program = plan.programs[rank];
  std::string text =
      "steps      combine: destinations <- sources; in[0:8] + 64w: bytes 0 to 7, 64 further each trip w;\n"
      "           @1: rank 1's; partial: not rounded yet; wait: until the rank has signalled the value\n";
  if (plan.call.coded()) {
    text += "           wire: encoded; finished: divided, if avg; turn: number of an element's encode\n";
  }
  for (const Loop& loop : program.loops) {
    text += "  trip" + (loop.trips == 1 ? " " : "s " + std::to_string(loop.first) + " to ") +
            std::to_string(loop.first + loop.trips - 1) + "\n";
    for (int32_t step = loop.step; step < loop.step + loop.num_steps; ++step) {
      text += "  " + describe(plan, rank, program.steps[step]) + "\n";
    }
  }
  return text;
}

std::string describe(const Plan& plan, int rank, const Step& step) {
  const Program& program = plan.programs[rank];
  std::string text = "rank " + std::to_string(rank);
  const auto index = &step - program.steps.data();
  if (index >= 0 && index < static_cast<std::ptrdiff_t>(program.steps.size())) {
    text += " step " + std::to_string(index);
  }
  const auto rank_and = [&](const char* what) {
    return " rank " + std::to_string(step.peer) + ", " + what + " " + std::to_string(step.cell);
  };
  switch (step.kind) {
    case Step::Kind::combine:
      return text + ": combine" + describe_operands(plan, rank, step);
    case Step::Kind::send:
    case Step::Kind::recv:
      text += (step.kind == Step::Kind::send ? ": send to" : ": receive from") + rank_and("channel");
      return text + "," + describe_operand(plan, rank, program.operands.at(step.operand), step.count);
    case Step::Kind::complete:
      text += ": complete sends to" + rank_and("channel");
      break;
    case Step::Kind::signal:
      text += ": signal to" + rank_and("cell");
      break;
    case Step::Kind::wait:
      text += ": wait for" + rank_and("cell");
      break;
  }
  text += ", value " + std::to_string(step.value);
  if (step.per_trip != 0) text += " + " + std::to_string(step.per_trip) + "w";
  return text;
}

int64_t in_elements(const Call& call, int rank) {
  return elements(call, call.world.traits().in, rank, call.world.size, 1);
}

int64_t out_elements(const Call& call, int rank) {
  return elements(call, call.world.traits().out, rank, 1, call.world.size);
}

}  // namespace pycomm::schedule
