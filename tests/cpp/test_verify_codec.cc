// What the verifier finds in plans with codecs, and how it says so. (test_mutation has every small change.)
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
