// What the verifier finds in plans with codecs, and its messages. (test_mutation.cc makes every small
// change.)
#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "check.h"
#include "schedule/lower/lower.h"
#include "schedule/verify/verify.h"

using namespace pycomm;
using namespace pycomm::schedule;
using Kind = Counterexample::Kind;

namespace {

// two_shot of 2 ranks, two tiles and a tail: rank 0 owns the first tile. 0 encode what the other owns, 1
// signal, 2 wait, 3 sum and encode, 4 decode, 5 signal, 6 wait, 7 decode what the other has written.
Plan two_shot(int64_t count = 2 * kTile + 100) {
  Call call{.world = {.size = 2}, .op = Op::avg, .counts = {count}};
  call.codec.kind = CodecKind::int8;
  return make_plan("two_shot", call, {.bank_bytes = 1 << 20});
}

Plan one_shot() {
  Call call{.world = {.size = 2}, .counts = {kTile}};
  call.codec.kind = CodecKind::int8;
  return make_plan("one_shot", call, {.bank_bytes = 1 << 20});
}

Step& combine_of(Plan& plan, int rank, int which) {
  for (Step& step : plan.programs[rank].steps) {
    if (step.kind == Step::Kind::combine && which-- == 0) return step;
  }
  check::fail(__FILE__, __LINE__, "no such combine");
  return plan.programs[rank].steps[0];
}

Transcode& transcode_of(Plan& plan, int rank, int which) {
  return plan.programs[rank].transcodes[combine_of(plan, rank, which).transcode];
}

Operand& operand_of(Plan& plan, int rank, int which, int operand) {
  return plan.programs[rank].operands[combine_of(plan, rank, which).operand + operand];
}

void expect(const Plan& plan, Kind kind, const std::vector<std::string>& words) {
  const auto found = verify(plan);
  CHECK(found.has_value());
  if (!found) return;
  CHECK_EQ(found->kind, kind);
  for (const std::string& word : words) {
    if (found->what.find(word) == std::string::npos) {
      check::fail(__FILE__, __LINE__, "\"" + word + "\" is not in: " + found->what);
    }
  }
}

}  // namespace

TEST(an_encode_knows_its_place) {
  CHECK(!verify(two_shot()));
  Plan plan = two_shot();
  transcode_of(plan, 1, 0).index += kTile;
  expect(plan, Kind::data, {"takes element 0 for another one"});
  plan = two_shot();
  plan.encodes_once = false;
  transcode_of(plan, 1, 0).element += kTile;
  expect(plan, Kind::data, {"takes element 0 for another one"});
  plan = two_shot();
  operand_of(plan, 1, 0, 1).offset += 4;
  expect(plan, Kind::data, {"what is no tile of the data"});
  plan = two_shot();
  combine_of(plan, 0, 0).count -= 1;
  expect(plan, Kind::data, {"what is no tile of the data"});
}

// One rank takes its own result before it was encoded: a little better than the others'.
TEST(ranks_must_decode_the_same) {
  Plan plan = one_shot();
  CHECK(!verify(plan, {.balanced = true}));
  Operand& own = operand_of(plan, 0, 1, 1);
  CHECK(own.format == Format::wire);
  own = {.space = Space::in, .format = Format::raw, .rank = 0};
  expect(plan, Kind::data, {"holds round(", "turn 0 of rank 0", "but rank 0's holds"});
}

TEST(a_result_is_divided_once) {
  Plan plan = two_shot();
  transcode_of(plan, 0, 1).divides = false;
  expect(plan, Kind::data, {"not a finished result"});
  plan = two_shot();
  transcode_of(plan, 0, 2).divides = true;
  expect(plan, Kind::data, {"out[0:1024] holds", "converted and scaled"});
}

TEST(wire_form_is_not_for_callers) {
  Plan plan = two_shot();
  Operand& out = operand_of(plan, 0, 2, 0);
  out.format = Format::wire;
  combine_of(plan, 0, 2).dst_format = Format::wire;
  expect(plan, Kind::malformed, {"callers' buffers hold no wire form"});
  plan = two_shot();
  combine_of(plan, 0, 2).transcode = -1;
  expect(plan, Kind::malformed, {"no kernel takes these formats"});
}

TEST(windows_hold_whole_tiles) {
  Plan plan = one_shot();
  operand_of(plan, 0, 1, 2).offset += 16;
  expect(plan, Kind::data, {"no whole element"});
  plan = two_shot();
  plan.slot_bytes -= 960;  // the tail's tile counts in full
  expect(plan, Kind::bounds, {"in a slot"});
}

TEST(claims_of_encodes_are_checked) {
  Call call{.world = {.size = 4}, .counts = {4 * kTile}};
  call.codec.kind = CodecKind::int8;
  Plan plan = make_plan("halving_doubling", call, {.bank_bytes = 1 << 20});
  CHECK(!verify(plan));
  CHECK(!plan.encodes_once);
  plan.encodes_once = true;
  expect(plan, Kind::malformed, {"encoded twice", "claims"});
  plan.encodes_once = false;
  for (Program& program : plan.programs) {
    for (Transcode& transcode : program.transcodes) transcode.turn = 0;
  }
  expect(plan, Kind::malformed, {"encoded twice in turn 0"});
}

TEST(codecs_are_of_float_sums) {
  Plan plan = two_shot();
  plan.call.dtype = DType::int32;
  expect(plan, Kind::malformed, {"a codec of int32"});
  plan = two_shot();
  plan.call.op = Op::max;
  plan.divisor = 1;
  expect(plan, Kind::malformed, {"float32, max"});
  plan = two_shot();
  plan.call.in = Placement::symmetric;
  expect(plan, Kind::malformed, {"not plain"});
}

// ---- on message links alone ----

namespace {

// reduce_scatter of 3 ranks, a tile each, of which two share a node: inside it they exchange exact values.
Plan on_the_wire() {
  Call call{.world = {.collective = Collective::reduce_scatter, .size = 3, .nodes = {0, 0, 1}},
            .counts = {kTile, kTile, kTile}};
  call.codec = {.kind = CodecKind::int8, .links = Links::wire};
  return make_plan("direct", call, {.bank_bytes = 1 << 20});
}

// The rank's first combine that writes its own window from `in`, and does not encode.
Step& exact_copy_of(Plan& plan, int rank) {
  Program& program = plan.programs[rank];
  const auto exact = std::ranges::find_if(program.steps, [&](const Step& step) {
    return step.kind == Step::Kind::combine && step.transcode < 0 &&
           program.operands[step.operand].space == Space::window;
  });
  CHECK(exact != program.steps.end());
  return *exact;
}

}  // namespace

TEST(what_crosses_between_nodes_is_encoded) {
  Plan plan = on_the_wire();
  CHECK(!verify(plan));
  for (Program& program : plan.programs) {
    for (const Step& step : program.steps) {
      if (step.kind != Step::Kind::send) continue;
      Plan raw = plan;
      const auto rank = &program - plan.programs.data();
      raw.programs[rank].operands[step.operand].format = Format::raw;
      expect(raw, Kind::malformed, {"step ", "what crosses between nodes is not encoded"});
    }
  }
  // A whole plan that is right but for that it encodes nothing.
  Call call = plan.call;
  call.codec = {};
  Plan exact = make_plan("direct", call, {.bank_bytes = 1 << 20});
  CHECK(!verify(exact));
  exact.call.codec = plan.call.codec;
  expect(exact, Kind::malformed, {"what crosses between nodes is not encoded"});
}

TEST(what_stays_in_a_node_is_not_encoded) {
  // A peer reads wire form from the window.
  Plan plan = on_the_wire();
  Step& step = exact_copy_of(plan, 0);
  Program& program = plan.programs[0];
  const Operand window = program.operands[step.operand], in = program.operands[step.operand + 1];
  program.operands[step.operand].format = step.dst_format = Format::wire;
  step.transcode = static_cast<int32_t>(program.transcodes.size());
  program.transcodes.push_back({.index = kTile, .element = kTile});
  for (Operand& operand : plan.programs[1].operands) {
    if (operand.rank == 0 && operand.space == Space::window) operand.format = Format::wire;
  }
  for (Step& other : plan.programs[1].steps) {
    if (other.kind == Step::Kind::combine && other.num_srcs > 1) other.transcode = 0;
  }
  expect(plan, Kind::malformed, {"what ranks of one node exchange is encoded"});

  // Or it gets exact bytes, of what was encoded and decoded for nothing.
  plan = on_the_wire();
  const int64_t spare = plan.slot_bytes;
  plan.slot_bytes += 2 * kTile;
  plan.bank_bytes += 2 * kTile;
  Program& lossy = plan.programs[0];
  Step& copy = exact_copy_of(plan, 0);
  const auto at = &copy - lossy.steps.data();
  const Operand tile{.space = Space::window, .format = Format::wire, .rank = 0, .offset = spare};
  Step decode = copy;
  decode.dst_format = Format::final;
  decode.operand = static_cast<int32_t>(lossy.operands.size());
  decode.transcode = static_cast<int32_t>(lossy.transcodes.size());
  lossy.operands.insert(lossy.operands.end(), {window, tile, tile, in});
  lossy.operands[decode.operand].format = Format::final;
  lossy.transcodes.insert(lossy.transcodes.end(), {{}, {.index = kTile, .element = kTile}});
  Step encode = decode;
  encode.dst_format = Format::wire;
  encode.operand += 2;
  ++encode.transcode;
  lossy.steps[at] = encode;
  lossy.steps.insert(lossy.steps.begin() + at + 1, decode);
  ++lossy.loops[0].num_steps;
  expect(plan, Kind::data, {"rank 1", "turn 0 of rank 0", "what never crossed between nodes"});
}

// On one node nothing crosses: the plan is that without a codec.
TEST(on_one_node_there_is_nothing_to_encode) {
  Call call = on_the_wire().call;
  call.world.nodes = {};
  const Plan plan = make_plan("direct", call, {.bank_bytes = 1 << 20});
  CHECK(!plan.call.coded());
  CHECK(!verify(plan));
  for (const Program& program : plan.programs) CHECK(program.transcodes.empty());
}

// Trips that the proof leaves out say nothing else than all of them do.
TEST(left_out_trips_of_codecs_hide_nothing) {
  int compared = 0, rejected = 0;
  for (const char* algorithm : {"two_shot", "ring", "tree"}) {
    for (int n : {2, 3}) {
      Call call{.world = {.size = n}, .counts = {30 * n * kTile + 9}};
      call.codec.kind = CodecKind::sign;
      const Plan plan = make_plan(algorithm, call, {.bank_bytes = 1 << 20, .trip_bytes = 160 * n});
      const auto compare = [&](const Plan& changed) {
        const auto some = verify(changed), all = verify(changed, {.all_trips = true});
        ++compared;
        rejected += all.has_value();
        if (some.has_value() != all.has_value()) {
          check::fail(__FILE__, __LINE__, std::string(algorithm) + ": " + (some ? some->what : all->what));
        }
      };
      compare(plan);
      for (size_t t = 0; t < plan.programs[0].transcodes.size(); ++t) {
        for (const auto& change : std::vector<std::function<void(Transcode&)>>{
                 [](Transcode& how) { how.stride += kTile; }, [](Transcode& how) { how.index += kTile; },
                 [](Transcode& how) { how.divides = !how.divides; }, [](Transcode& how) { ++how.turn; }}) {
          Plan changed = plan;
          change(changed.programs[0].transcodes[t]);
          compare(changed);
        }
      }
    }
  }
  std::printf("       %d plans compared, %d rejected\n", compared, rejected);
  CHECK(rejected > compared / 4 && rejected < compared);
}
