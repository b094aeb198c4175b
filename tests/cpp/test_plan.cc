// Calls: the sizes of each rank's buffers, what ranks agree on, how calls are distinguished.
//
// Tests: schedule/collective.cc.
#include <functional>
#include <vector>

#include "check.h"
#include "schedule/plan.h"

namespace {
using namespace pycomm;
using namespace pycomm::schedule;

Call call_of(Collective collective, int size, int root, int peer, std::vector<int64_t> counts) {
  Call call;
  call.world = {collective, size, root, peer};
  call.counts = std::move(counts);
  return call;
}
}  // namespace

TEST(buffers_hold_what_the_collective_moves) {
  const struct {
    Call call;
    int64_t in[3], out[3];  // by rank
  } cases[] = {
      {call_of(Collective::all_reduce, 3, 0, 0, {5}), {5, 5, 5}, {5, 5, 5}},
      {call_of(Collective::reduce, 3, 1, 0, {5}), {5, 5, 5}, {0, 5, 0}},
      {call_of(Collective::broadcast, 3, 1, 0, {5}), {0, 5, 0}, {5, 5, 5}},
      {call_of(Collective::reduce_scatter, 3, 0, 0, {1, 2, 4}), {7, 7, 7}, {1, 2, 4}},
      {call_of(Collective::all_gather, 3, 0, 0, {1, 2, 4}), {1, 2, 4}, {7, 7, 7}},
      {call_of(Collective::gather, 3, 2, 0, {1, 2, 4}), {1, 2, 4}, {0, 0, 7}},
      {call_of(Collective::scatter, 3, 2, 0, {1, 2, 4}), {0, 0, 7}, {1, 2, 4}},
      {call_of(Collective::all_to_all, 3, 0, 0, {1, 2, 3, 10, 20, 30, 100, 200, 300}),
       {6, 60, 600},
       {111, 222, 333}},
      {call_of(Collective::barrier, 3, 0, 0, {0}), {0, 0, 0}, {0, 0, 0}},
      {call_of(Collective::send_recv, 3, 2, 0, {5}), {0, 0, 5}, {5, 0, 0}},
  };
  for (const auto& c : cases) {
    for (int rank = 0; rank < 3; ++rank) {
      CHECK_EQ(in_elements(c.call, rank), c.in[rank]);
      CHECK_EQ(out_elements(c.call, rank), c.out[rank]);
    }
  }
}

TEST(calls_are_equal_in_all_that_a_plan_depends_on) {
  const Call call = call_of(Collective::reduce, 3, 1, 0, {5});
  CHECK(call == Call(call));
  const auto differs = [&](auto change) {
    Call other = call;
    change(other);
    return !(other == call);
  };
  CHECK(differs([](Call& c) { c.world.collective = Collective::broadcast; }));
  CHECK(differs([](Call& c) { c.world.size = 4; }));
  CHECK(differs([](Call& c) { c.world.root = 0; }));
  CHECK(differs([](Call& c) { c.world.peer = 1; }));
  CHECK(differs([](Call& c) { c.dtype = DType::float64; }));
  CHECK(differs([](Call& c) { c.op = Op::max; }));
  CHECK(differs([](Call& c) { c.counts = {6}; }));
  CHECK(differs([](Call& c) { c.in = Placement::symmetric; }));
  CHECK(differs([](Call& c) { c.in = Placement::reachable; }));
  CHECK(differs([](Call& c) { c.in = Placement::told; }));
  CHECK(differs([](Call& c) { c.out = Placement::symmetric; }));
  CHECK(differs([](Call& c) { c.in_place = true; }));
  CHECK(differs([](Call& c) { c.prescale = 0.5; }));
  CHECK(differs([](Call& c) { c.deterministic = true; }));
  CHECK(differs([](Call& c) { c.codec.kind = CodecKind::int8; }));
  CHECK(differs([](Call& c) { c.codec.rounding = Rounding::stochastic; }));
}

TEST(steps_are_told_in_words) {
  Plan plan;
  plan.call = call_of(Collective::all_reduce, 2, 0, 0, {256});
  plan.call.dtype = DType::float16;
  Program program;
  program.operands = {{.space = Space::out, .format = Format::final, .rank = 0, .offset = 64, .stride = 1024},
                      {.space = Space::window, .format = Format::partial, .rank = 1, .offset = 0},
                      {.space = Space::in, .rank = 0, .offset = 0, .stride = 1024}};
  Step combine{.dst_format = Format::final, .num_dsts = 1, .num_srcs = 2, .count = 16};
  Step signal{.kind = Step::Kind::signal, .cell = 1, .peer = 1, .value = 2, .per_trip = 3};
  Step wait{.kind = Step::Kind::wait, .peer = 1, .value = 1};
  program.steps = {combine, signal, wait};
  plan.programs = {program};
  const auto words = [&](int step) { return describe(plan, 0, plan.programs[0].steps[step]); };
  CHECK_EQ(words(0), "rank 0 step 0: combine out[64:96] + 1024w <- window@1[0:64] partial in[0:32] + 1024w");
  CHECK_EQ(words(1), "rank 0 step 1: signal to rank 1, cell 1, value 2 + 3w");
  CHECK_EQ(words(2), "rank 0 step 2: wait for rank 1, cell 0, value 1");
}

TEST(every_field_of_a_call_counts) {
  const auto digest = [](const Call& call) {
    Hasher hasher;
    add(hasher, call);
    return hasher.digest();
  };
  const Call call{.counts = {7}};
  const std::vector<std::function<void(Call&)>> changes = {
      [](Call& c) { c.world.collective = Collective::broadcast; },
      [](Call& c) { c.world.size = 2; },
      [](Call& c) { c.world.root = 1; },
      [](Call& c) { c.world.peer = 1; },
      [](Call& c) { c.dtype = DType::float64; },
      [](Call& c) { c.op = Op::max; },
      [](Call& c) { c.counts = {8}; },
      [](Call& c) { c.counts = {7, 0}; },
      [](Call& c) { c.in = Placement::symmetric; },
      [](Call& c) { c.out = Placement::symmetric; },
      [](Call& c) { c.in_place = true; },
      [](Call& c) { c.prescale = 0.5; },
      [](Call& c) { c.deterministic = true; },
      [](Call& c) { c.ragged = true; },
      [](Call& c) { c.codec.kind = CodecKind::int8; },
      [](Call& c) { c.codec.rounding = Rounding::stochastic; },
      [](Call& c) { c.codec.ceil_scale = true; },
      [](Call& c) { c.codec.hadamard = true; },
      [](Call& c) { c.codec.seed = 1; },
  };
  for (const auto& change : changes) {
    Call other = call;
    change(other);
    CHECK(!(other == call));
    CHECK(digest(other) != digest(call));
  }
}
