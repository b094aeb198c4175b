// The verifier on correct plans and on plans broken by hand; and a proof of every plan that lower() makes.
//
// Tests: schedule/lower/lower.cc, schedule/lower/lowering.cc, schedule/lower/emit.cc, schedule/lower/layout.cc.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "node_maps.h"
#include "schedule/lower/lower.h"
#include "schedule/verify/verify.h"

namespace {

using namespace pycomm;
using namespace pycomm::schedule;
using Kind = Counterexample::Kind;

// ---- Small plans by hand ----

Step combine(int operand, int num_dsts, int num_srcs, int64_t count, Format dst_format) {
  Step step;
  step.operand = operand;
  step.num_dsts = num_dsts;
  step.num_srcs = num_srcs;
  step.count = count;
  step.dst_format = dst_format;
  return step;
}

Step signal(int peer, int64_t value) {
  Step step;
  step.kind = Step::Kind::signal;
  step.peer = peer;
  step.value = value;
  return step;
}

Step wait(int peer, int64_t value) {
  Step step = signal(peer, value);
  step.kind = Step::Kind::wait;
  return step;
}

// one_shot of 8 float32 for 2 ranks: 0 copy in to the window, 1 signal, 2 wait, 3 sum.
Plan one_shot_by_hand() {
  Plan plan;
  plan.call.world.size = 2;
  plan.call.counts = {8};
  plan.slot_bytes = plan.bank_bytes = 64;
  plan.full_exchange = true;
  for (int rank = 0; rank < 2; ++rank) {
    Program program;
    program.operands = {{.space = Space::window, .rank = rank},
                        {.space = Space::in, .rank = rank},
                        {.space = Space::out, .format = Format::final, .rank = rank},
                        {.space = rank == 0 ? Space::in : Space::window, .rank = 0},
                        {.space = rank == 0 ? Space::window : Space::in, .rank = 1}};
    program.steps = {combine(0, 1, 1, 8, Format::raw), signal(1 - rank, 1), wait(1 - rank, 1),
                     combine(2, 1, 2, 8, Format::final)};
    program.loops = {{.num_steps = 4}};
    plan.programs.push_back(program);
  }
  return plan;
}

// broadcast of 4 float32 from rank 0 straight into rank 1's symmetric `out`: rank 1 says that it has entered.
Plan broadcast_by_hand() {
  Plan plan;
  plan.call.world = {Collective::broadcast, 2, 0, 0};
  plan.call.counts = {4};
  plan.call.out = Placement::symmetric;
  Program root, leaf;
  root.operands = {
      {.space = Space::out, .rank = 0}, {.space = Space::out, .rank = 1}, {.space = Space::in, .rank = 0}};
  root.steps = {wait(1, 1), combine(0, 2, 1, 4, Format::raw), signal(1, 1)};
  root.loops = {{.num_steps = 3}};
  leaf.steps = {signal(0, 1), wait(0, 1)};
  leaf.loops = {{.num_steps = 2}};
  plan.programs = {root, leaf};
  plan.full_exchange = true;
  return plan;
}

// all_gather of 4 float32 a rank: each reads the other's reachable `in`, and says when it has.
Plan all_gather_by_hand() {
  Plan plan;
  plan.call.world = {Collective::all_gather, 2, 0, 0};
  plan.call.counts = {4, 4};
  plan.call.in = Placement::reachable;
  plan.full_exchange = true;
  plan.slot_bytes = plan.bank_bytes = 64;
  for (int rank = 0; rank < 2; ++rank) {
    const int peer = 1 - rank;
    Program program;
    program.operands = {{.space = Space::out, .rank = rank, .offset = 16 * rank},
                        {.space = Space::in, .rank = rank},
                        {.space = Space::out, .rank = rank, .offset = 16 * peer},
                        {.space = Space::in, .rank = peer}};
    program.steps = {signal(peer, 1), combine(0, 1, 1, 4, Format::raw),
                     wait(peer, 1),   combine(2, 1, 1, 4, Format::raw),
                     signal(peer, 2), wait(peer, 2)};
    program.loops = {{.num_steps = 6}};
    plan.programs.push_back(program);
  }
  return plan;
}

Step message(Step::Kind kind, int peer, int64_t count) {
  Step step;
  step.kind = kind;
  step.peer = peer;
  step.count = count;
  (kind == Step::Kind::send ? step.num_srcs : step.num_dsts) = 1;
  return step;
}

// 4 float32 from rank 0 to rank 1 of another node, through rank 0's window.
Plan message_by_hand() {
  Plan plan;
  plan.call.world = {Collective::send_recv, 2, 0, 1, {0, 1}};
  plan.call.counts = {4};
  plan.slot_bytes = plan.bank_bytes = 64;
  plan.channels = 1;
  plan.full_exchange = true;
  Program sender, receiver;
  sender.operands = {{.space = Space::window, .rank = 0}, {.space = Space::in, .rank = 0}};
  sender.steps = {combine(0, 1, 1, 4, Format::raw), message(Step::Kind::send, 1, 4)};
  sender.loops = {{.num_steps = 2}};
  receiver.operands = {{.space = Space::out, .rank = 1}};
  receiver.steps = {message(Step::Kind::recv, 0, 4)};
  receiver.loops = {{.num_steps = 1}};
  plan.programs = {sender, receiver};
  return plan;
}

void expect(const std::optional<Counterexample>& found, Kind kind, int rank, int step,
            const std::vector<std::string>& words) {
  CHECK(found.has_value());
  if (!found) return;
  CHECK_EQ(found->kind, kind);
  CHECK_EQ(found->rank, rank);
  CHECK_EQ(found->step, step);
  for (const std::string& word : words) {
    if (found->what.find(word) == std::string::npos) {
      check::fail(__FILE__, __LINE__, "\"" + word + "\" is not in: " + found->what);
    }
  }
}

// ---- Calls ----

struct Buffering {
  Placement in, out;
  bool in_place;
};
constexpr Buffering kBufferings[] = {{Placement::plain, Placement::plain, false},
                                     {Placement::plain, Placement::plain, true},
                                     {Placement::symmetric, Placement::symmetric, false},
                                     {Placement::symmetric, Placement::symmetric, true},
                                     {Placement::plain, Placement::symmetric, false},
                                     {Placement::symmetric, Placement::plain, false},
                                     {Placement::reachable, Placement::plain, false},
                                     {Placement::reachable, Placement::plain, true},
                                     {Placement::reachable, Placement::symmetric, false},
                                     {Placement::told, Placement::told, false},
                                     {Placement::told, Placement::told, true},
                                     {Placement::plain, Placement::told, false},
                                     {Placement::told, Placement::plain, false}};

// `total` elements over all ranks, as evenly or unevenly as `even` says.
Call make_call(const World& world, int64_t total, bool even, const Buffering& buffering) {
  Call call;
  call.world = world;
  call.in = buffering.in;
  call.out = buffering.out;
  call.in_place = buffering.in_place;
  const int n = world.size;
  switch (world.collective) {
    case Collective::all_reduce:
    case Collective::broadcast:
    case Collective::reduce:
    case Collective::send_recv:
      call.counts = {total};
      break;
    case Collective::barrier:
      call.counts = {0};
      break;
    case Collective::all_gather:
    case Collective::reduce_scatter:
    case Collective::gather:
    case Collective::scatter:
      for (int rank = 0; rank < n; ++rank) {
        call.counts.push_back(even ? total / n
                                   : total * (rank + 1) / n - total * rank / n + (rank % 3 == 1 ? 7 : 0));
      }
      break;
    case Collective::all_to_all:  // in place, as much goes to a rank as comes from it
      for (int from = 0; from < n; ++from) {
        for (int to = 0; to < n; ++to) {
          const int share = from + (buffering.in_place ? to : 2 * to);
          call.counts.push_back(even ? total / n : total / n * (share % 5) / 2);
        }
      }
      break;
  }
  return call;
}

Geometry small_windows(int n) {
  Geometry geometry;
  geometry.bank_bytes = (64 << 10) * int64_t{std::max(n, 4)};
  geometry.trip_bytes = 8 << 10;
  geometry.payload_bytes = kPayloadBytes;
  return geometry;
}

std::string words(const Plan& plan) {
  std::string counts;
  for (int64_t count : plan.call.counts) counts += " " + std::to_string(count);
  std::string nodes;
  for (int node : plan.call.world.nodes) nodes += (nodes.empty() ? " on nodes " : " ") + std::to_string(node);
  return std::string(name(plan.call.world.collective)) + " " + plan.algorithm + " of " +
         std::to_string(plan.call.world.size) + " ranks" + nodes + ", root " +
         std::to_string(plan.call.world.root) + ", counts" + counts.substr(0, 60) +
         (plan.call.in == Placement::symmetric ? ", symmetric in" : "") +
         (plan.call.in == Placement::reachable ? ", reachable in" : "") +
         (plan.call.out == Placement::symmetric ? ", symmetric out" : "") +
         (plan.call.in == Placement::told ? ", told in" : "") +
         (plan.call.out == Placement::told ? ", told out" : "") + (plan.call.in_place ? ", in place" : "");
}

}  // namespace

// ---- What it finds, and how it says so ----

TEST(finds_a_cell_that_moves_from_trip_to_trip) {
  Call call{.world = {.collective = Collective::all_reduce, .size = 2}, .counts = {1}};
  Plan plan = make_plan("one_shot", call, small_windows(2));
  CHECK(!verify(plan));
  int moved = 0;
  for (Operand& operand : plan.programs[0].operands) {
    if (operand.space != Space::outgoing) continue;
    operand.stride = kCellBytes;
    ++moved;
  }
  CHECK(moved > 0);
  const auto found = verify(plan);
  CHECK(found && found->kind == Counterexample::Kind::malformed);
}

TEST(proves_plans_written_by_hand) {
  CHECK(!verify(one_shot_by_hand(), {.balanced = true}));
  CHECK(!verify(broadcast_by_hand()));
  CHECK(!verify(all_gather_by_hand()));
}

TEST(a_read_before_the_wait_is_a_race) {
  Plan plan = one_shot_by_hand();
  std::swap(plan.programs[1].steps[2], plan.programs[1].steps[3]);
  expect(verify(plan), Kind::race, 1, 2,
         {"rank 1 step 2: combine", "[0, 32)", "rank 0's window", "rank 0 step 0: combine",
          "may still be writing them", "no signal orders the two"});
}

TEST(a_write_that_the_callers_entry_does_not_precede_is_a_race) {
  Plan plan = broadcast_by_hand();
  plan.programs[0].steps[0].value = 0;  // no wait at all
  expect(verify(plan), Kind::race, 0, 1, {"rank 1's `out`", "caller may still be writing it"});
}

TEST(a_write_that_the_callers_end_does_not_follow_is_a_race) {
  Plan plan = broadcast_by_hand();
  plan.programs[1].steps[1].value = 0;
  plan.full_exchange = false;
  expect(verify(plan), Kind::race, 0, 1, {"rank 1's `out`", "already use them after its end"});
}

TEST(a_wrong_result_is_told_with_what_is_there) {
  Plan plan = one_shot_by_hand();
  plan.programs[1].operands[3] = plan.programs[1].operands[4];  // in + in
  expect(verify(plan), Kind::data, 1, -1,
         {"out[0:8] holds round(((in@1[0]) op (in@1[0])))", "sums rank 1 twice"});

  plan = one_shot_by_hand();
  plan.programs[0].steps[3].count = 7;
  expect(verify(plan), Kind::data, 0, -1, {"out[7:8]", "caller had left"});

  plan = one_shot_by_hand();
  plan.programs[1].operands[0].offset = 32;  // shown in another place than it is read
  expect(verify(plan), Kind::data, 0, -1, {"nobody has written in rank 1's window"});
}

TEST(formats_are_part_of_the_result) {
  Plan plan = one_shot_by_hand();
  plan.programs[0].operands[4].format = Format::partial;  // the peer's elements would not be scaled
  expect(verify(plan), Kind::data, 0, -1, {"not converted and scaled exactly once"});
  plan = one_shot_by_hand();
  plan.divisor = 2.0;
  expect(verify(plan), Kind::malformed, 0, -1, {"divided by 2.0"});
}

TEST(a_changed_input_is_a_wrong_result) {
  Plan plan = one_shot_by_hand();
  Program& program = plan.programs[0];
  program.operands.push_back({.space = Space::in, .format = Format::raw, .rank = 0});
  program.operands.push_back({.space = Space::window, .format = Format::raw, .rank = 1});
  program.steps.push_back(combine(5, 1, 1, 8, Format::raw));
  program.loops[0].num_steps = 5;
  expect(verify(plan), Kind::data, 0, -1, {"bytes [0, 32) of `in` have changed"});
}

TEST(ranks_must_associate_alike) {
  Plan plan = one_shot_by_hand();
  std::swap(plan.programs[1].operands[3], plan.programs[1].operands[4]);
  expect(verify(plan), Kind::data, 1, -1, {"but rank 0's holds"});
  std::swap(plan.programs[0].operands[3], plan.programs[0].operands[4]);
  CHECK(!verify(plan));
  expect(verify(plan, {.balanced = true}), Kind::data, 1, -1, {"balanced tree"});
}

TEST(a_deadlock_is_told_as_a_circle) {
  Plan plan = one_shot_by_hand();
  for (Program& program : plan.programs) std::swap(program.steps[1], program.steps[2]);
  expect(verify(plan), Kind::deadlock, 0, 1,
         {"rank 0 step 1: wait for rank 1", "holds 0", "rank 1 step 1: wait for rank 0", "in a circle"});
  plan = one_shot_by_hand();
  plan.programs[0].steps[2].value = 2;
  expect(verify(plan), Kind::deadlock, 0, 2,
         {"waits forever for 2 in a cell that holds 1", "rank 1 has ended"});
}

TEST(messages_are_not_buffered) {
  CHECK(!verify(message_by_hand()));
  // A send does not wait, its memory does.
  Plan plan = message_by_hand();
  Program& sender = plan.programs[0];
  sender.steps.push_back(sender.steps[0]);
  sender.loops[0].num_steps = 3;
  expect(verify(plan), Kind::race, 0, 2,
         {"writes bytes [0, 16) of its operand in rank 0's window",
          "step 1: send to rank 1, channel 0, window[0:16] may still be reading them",
          "nothing says that they have been received"});
  Step complete = message(Step::Kind::complete, 1, 0);
  complete.num_dsts = 0;
  complete.value = 1;
  sender.steps.insert(sender.steps.begin() + 2, complete);
  sender.loops[0].num_steps = 4;
  CHECK(!verify(plan));
  sender.steps[2].value = 2;
  expect(verify(plan), Kind::deadlock, 0, 2,
         {"waits forever until 2 are received; 1 are", "rank 1 has ended"});

  plan = message_by_hand();
  plan.programs[1].loops[0].num_steps = 0;
  expect(verify(plan), Kind::deadlock, 0, -1,
         {"rank 0 at its end: rank 1 never receives a message of channel 0"});
  plan = message_by_hand();
  plan.programs[0].loops[0].num_steps = 1;
  expect(verify(plan), Kind::deadlock, 1, 0, {"receive from rank 0", "nothing is sent"});
  plan = message_by_hand();
  plan.programs[1].steps[0].count = 3;
  expect(verify(plan), Kind::malformed, 1, 0, {"the message has 16 bytes, and there is room for 12"});
}

TEST(only_links_that_are_there_are_used) {
  Plan plan = message_by_hand();
  plan.call.world.nodes = {};
  expect(verify(plan), Kind::malformed, 0, 1, {"the two ranks have a mapped link"});
  plan = message_by_hand();
  plan.programs[0].steps[1] = signal(1, 1);
  expect(verify(plan), Kind::malformed, 0, 1, {"the two ranks have a message link"});
  plan = message_by_hand();
  plan.programs[0].operands[0].rank = 1;
  expect(verify(plan), Kind::malformed, 0, 0, {"it cannot reach rank 1's memory"});
  plan = message_by_hand();
  plan.programs[0].steps[1].cell = 1;
  expect(verify(plan), Kind::malformed, 0, 1, {"a pair has 1 channels"});
  plan = message_by_hand();
  plan.programs[0].operands[0].format = Format::wire;
  expect(verify(plan), Kind::malformed, 0, 1, {"is encoded, in a call without a codec"});
  plan = message_by_hand();
  plan.call.world.nodes = {0};
  expect(verify(plan), Kind::malformed, 0, -1, {"1 nodes for 2 ranks"});
  const Plan there = message_by_hand();
  plan.call.world.nodes = {1, 0};
  const Plan* calls[] = {&there, &plan};
  CHECK_THROWS(ValueError, verify_sequence(calls));
  Call call;
  call.world = {Collective::all_reduce, 3, 0, 0, {0, 1}};
  call.counts = {1};
  CHECK_THROWS(ValueError, make_plan("ring", call, small_windows(3)));
}

TEST(addresses_stay_in_their_buffers) {
  Plan plan = one_shot_by_hand();
  plan.programs[0].operands[0].offset = 36;
  expect(verify(plan), Kind::bounds, 0, 0, {"bytes [36, 68)", "rank 0's window", "64"});
  plan = broadcast_by_hand();
  plan.call.out = Placement::plain;
  expect(verify(plan), Kind::bounds, 0, 1, {"rank 1's `out`", "not symmetric"});
  plan = one_shot_by_hand();
  plan.slots = 2;
  expect(verify(plan), Kind::bounds, 0, -1, {"2 slots of 64 bytes"});
}

TEST(what_is_only_reachable_is_copied_bare) {
  const auto refused = [](const Plan& plan) {
    expect(verify(plan), Kind::bounds, 0, 3, {"rank 1's `in`", "only reachable", "bit for bit"});
  };
  Plan plan = all_gather_by_hand();
  plan.programs[0].operands.push_back({.space = Space::in, .rank = 0});
  plan.programs[0].steps[3].num_srcs = 2;  // a second source
  plan.programs[0].steps[3].dst_format = plan.programs[0].operands[2].format = Format::partial;
  refused(plan);
  plan = all_gather_by_hand();
  plan.programs[0].operands.push_back({.space = Space::window, .rank = 0});
  plan.programs[0].operands.push_back(plan.programs[0].operands[2]);
  plan.programs[0].operands.push_back(plan.programs[0].operands[3]);
  plan.programs[0].steps[3].operand = 4;
  plan.programs[0].steps[3].num_dsts = 2;  // a second destination
  refused(plan);
  for (const Format format : {Format::partial, Format::final}) {  // converted
    plan = all_gather_by_hand();
    plan.programs[0].steps[3].dst_format = plan.programs[0].operands[2].format = format;
    refused(plan);
  }
  plan = all_gather_by_hand();
  plan.programs[0].operands[2] = {.space = Space::window, .rank = 0};
  refused(plan);
  plan = all_gather_by_hand();
  plan.call.out = Placement::symmetric;
  plan.programs[0].operands[2].rank = 1;
  refused(plan);
  plan = all_gather_by_hand();
  std::swap(plan.programs[0].operands[2], plan.programs[0].operands[3]);  // written
  refused(plan);
  plan = all_gather_by_hand();
  plan.programs[0].operands[3].space = Space::out;
  expect(verify(plan), Kind::bounds, 0, 3, {"rank 1's `out`", "not symmetric"});
  plan = all_gather_by_hand();
  plan.call.out = Placement::reachable;
  expect(verify(plan), Kind::malformed, 0, -1, {"a reachable `out`"});
}

TEST(a_reachable_input_is_its_callers_again_when_it_has_been_read) {
  Plan plan = all_gather_by_hand();
  plan.programs[0].steps[5].value = 0;
  plan.full_exchange = false;
  expect(
      verify(plan), Kind::race, 0, -1,
      {"the caller may write bytes [0, 16) of its `in`", "rank 1 step 3: combine", "may still be reading"});
  plan = all_gather_by_hand();
  std::swap(plan.programs[1].steps[2], plan.programs[1].steps[3]);
  CHECK_EQ(verify(plan)->kind, Kind::race);
}

TEST(only_bare_copies_of_inputs_are_lowered_as_reachable) {
  const auto lowered = [](const char* name, const World& world, bool in_place = false) {
    Call call = make_call(world, 1000, true, {Placement::reachable, Placement::plain, in_place});
    return make_plan(name, call, small_windows(world.size)).call.in;
  };
  for (const Collective collective : {Collective::all_gather, Collective::broadcast, Collective::gather,
                                      Collective::scatter, Collective::all_to_all, Collective::send_recv}) {
    CHECK_EQ(lowered("direct", {collective, 4, 1, 2}), Placement::reachable);
    CHECK_EQ(lowered("direct", {collective, 1, 0, 0}), Placement::plain);  // nobody reads it
  }
  CHECK_EQ(lowered("ring", {Collective::all_gather, 4, 0, 0}), Placement::plain);
  CHECK_EQ(lowered("binomial", {Collective::broadcast, 4, 0, 0}), Placement::plain);
  CHECK_EQ(lowered("direct", {Collective::all_to_all, 4, 0, 0}, /*in_place=*/true), Placement::plain);
  CHECK_EQ(lowered("direct", {Collective::reduce_scatter, 4, 0, 0}), Placement::plain);
  CHECK_EQ(lowered("two_shot", {Collective::all_reduce, 4, 0, 0}), Placement::plain);
  Call call = make_call({Collective::all_gather, 2, 0, 0}, 8, true, kBufferings[0]);
  call.out = Placement::reachable;
  CHECK_THROWS(ValueError, make_plan("direct", call, small_windows(2)));
}

TEST(a_cell_only_grows) {
  Plan plan = one_shot_by_hand();
  plan.programs[0].steps.insert(plan.programs[0].steps.begin() + 2, signal(1, 1));
  plan.programs[0].loops[0].num_steps = 5;
  expect(verify(plan), Kind::malformed, 0, 2, {"only grows"});
}

TEST(a_full_exchange_must_be_one) {
  Plan plan = broadcast_by_hand();
  plan.call.out = Placement::plain;
  plan.slot_bytes = plan.bank_bytes = 64;
  plan.programs[0].operands[1] = {.space = Space::window, .rank = 0};
  plan.programs[0].steps[0].value = 0;
  plan.programs[1].operands = {{.space = Space::out, .rank = 1}, {.space = Space::window, .rank = 0}};
  plan.programs[1].steps.push_back(combine(0, 1, 1, 4, Format::raw));
  plan.programs[1].loops[0].num_steps = 3;
  expect(verify(plan), Kind::exchange, 0, -1, {"rank 1 has entered", "claims a full exchange"});
  plan.full_exchange = false;
  CHECK(!verify(plan));

  // A plan that is right alone and after itself may still be wrong between others: rank 0 may be two calls
  // ahead.
  const Plan sum = one_shot_by_hand();
  Plan boast = plan;
  boast.full_exchange = true;
  const Plan* honest[] = {&sum, &plan, &sum};
  const Plan* boasting[] = {&sum, &boast, &sum};
  CHECK(!verify_sequence(honest));
  expect(verify_sequence(boasting), Kind::exchange, 0, -1, {"call 1 (broadcast"});
}

TEST(ranks_that_have_told_have_come_but_not_entered) {
  Plan plan = broadcast_by_hand();
  plan.programs[0].steps[0].value = 0;  // the root waits for nothing
  plan.full_exchange = false;
  expect(verify(plan), Kind::race, 0, 1, {});
  plan.call.out = Placement::told;
  CHECK(!verify(plan));
  plan.full_exchange = true;
  expect(verify(plan), Kind::exchange, 0, -1, {"rank 1 has entered", "claims a full exchange"});

  // A rank that does not come keeps the others out: here it is caught in the call before.
  Plan stuck = broadcast_by_hand();
  stuck.programs[1].steps[1].value = 2;
  plan.full_exchange = false;
  const Plan* calls[] = {&stuck, &plan};
  expect(verify_sequence(calls), Kind::deadlock, 0, -1, {"until rank 1 has told where its buffers lie"});
}

// The first signals of symmetric buffers say that their ranks have come; that is known here.
TEST(a_call_on_told_buffers_needs_no_first_signals) {
  const auto signals = [](Placement placement, const char* algorithm) {
    const Call call{
        .world = {.size = 3}, .counts = {30}, .in = placement, .out = placement, .in_place = true};
    const Plan plan = make_plan(algorithm, call, {.bank_bytes = 1 << 16});
    CHECK(!verify(plan));
    return std::ranges::count(plan.programs[0].steps, Step::Kind::signal, &Step::kind);
  };
  CHECK_EQ(signals(Placement::symmetric, "two_shot"), 4);  // to each of two: come, and finished
  CHECK_EQ(signals(Placement::told, "two_shot"), 2);
}

TEST(windows_of_earlier_calls_hold_nothing) {
  // In call 2 rank 0 shows nothing: what call 0 left in the same bank must not pass for it.
  const Plan sum = one_shot_by_hand();
  Plan forgetful = one_shot_by_hand();
  forgetful.programs[0].steps[0].count = 0;
  const Plan* calls[] = {&sum, &sum, &forgetful};
  expect(verify_sequence(calls), Kind::data, 1, -1, {"call 2", "what call 0 left in rank 0's window"});
}

TEST(signals_fit_a_cell) {
  Plan plan = one_shot_by_hand();
  plan.programs[0].steps[1].value = plan.programs[1].steps[2].value = (int64_t{1} << 24) - 1;
  CHECK(!verify(plan));
  plan.programs[0].steps[1].value = plan.programs[1].steps[2].value = int64_t{1} << 24;
  expect(verify(plan), Kind::malformed, 0, 1, {"16777216 does not fit a cell"});

  Call call{.world = {.size = 64}, .dtype = DType::int8, .counts = {int64_t{1} << 36}};
  const Geometry geometry{.bank_bytes = 1 << 20};
  CHECK(!make_plan("two_shot", call, geometry, 0).programs[0].steps.empty());
  CHECK_THROWS(ValueError, make_plan("ring", call, geometry, 0));
}

TEST(nonsense_is_malformed) {
  Plan plan = one_shot_by_hand();
  plan.call.counts = {8, 8};
  expect(verify(plan), Kind::malformed, 0, -1, {"2 counts"});
  plan = one_shot_by_hand();
  plan.call.world.collective = Collective::all_to_all;
  plan.call.in_place = true;
  plan.call.counts = {1, 2, 3, 4};
  expect(verify(plan), Kind::malformed, 0, -1, {"rank 0 sends 2 elements to rank 1 and receives 3"});
  plan = one_shot_by_hand();
  plan.programs[0].steps[1].peer = 2;
  expect(verify(plan), Kind::malformed, 0, 1, {"no such peer"});
  plan = one_shot_by_hand();
  plan.programs[0].steps[3].operand = 4;
  expect(verify(plan), Kind::malformed, 0, 3, {"operands"});
  const Plan two = one_shot_by_hand();
  Plan alone = one_shot_by_hand();
  alone.call.world.size = 1;
  alone.programs.resize(1);
  alone.programs[0].steps = {};
  alone.programs[0].loops = {};
  const Plan* calls[] = {&two, &alone};
  CHECK_THROWS(ValueError, verify_sequence(calls));
}

// ---- What it proves ----

// Whether the next plan's counts are even.
bool even(const Algorithm& algorithm, long plans) { return plans % 2 == 0 || !algorithm.ragged; }

TEST(every_algorithm_is_proved) {
  long plans = 0;
  for (const Algorithm& algorithm : algorithms()) {
    for (int n : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 24, 32, 64}) {
      const Geometry geometry = small_windows(n);
      // Nothing, one element, fewer than ranks, one trip that does not divide, several windows.
      for (int64_t total :
           {int64_t{0}, int64_t{1}, int64_t{n - 1}, int64_t{1009}, int64_t{4001} * (n > 17 ? 8 : n)}) {
        for (const Buffering& buffering : kBufferings) {
          Call call = make_call({algorithm.collective, n, (n - 1) / 2, n - 1}, total, even(algorithm, plans),
                                buffering);
          call.dtype = plans % 3 == 0 ? DType::float16 : DType::float32;
          call.op = plans % 5 == 0 ? Op::avg : Op::sum;
          const Plan plan = make_plan(algorithm.name, call, geometry);
          if (plan.call.in != call.in) continue;  // lowered as plain
          ++plans;
          const auto found = verify(plan, {.balanced = algorithm.balanced});
          if (found) check::fail(__FILE__, __LINE__, words(plan) + ": " + found->what);
        }
      }
    }
  }
  std::printf("       %ld plans\n", plans);
}

TEST(every_algorithm_is_proved_between_nodes) {
  long plans = 0, sends = 0;
  for (const Algorithm& algorithm : algorithms()) {
    for (int n : {2, 3, 4, 5, 6, 7, 8, 12, 16}) {
      for (const std::vector<int>& nodes : node_maps(n)) {
        for (int64_t total : {int64_t{0}, int64_t{1}, int64_t{1009}, int64_t{4001} * n}) {
          for (const int turn : {0, 1}) {
            const Buffering& buffering = kBufferings[(plans / 2 + 3 * turn) % std::size(kBufferings)];
            Call call = make_call({algorithm.collective, n, (n - 1) / 2, n - 1, nodes}, total,
                                  even(algorithm, plans), buffering);
            call.dtype = plans % 3 == 0 ? DType::float16 : DType::float32;
            call.op = plans % 5 == 0 ? Op::avg : Op::sum;
            const Plan plan = make_plan(algorithm.name, call, small_windows(n));
            ++plans;
            for (const Program& program : plan.programs) {
              sends += std::ranges::count(program.steps, Step::Kind::send, &Step::kind);
            }
            const auto found = verify(plan, {.balanced = algorithm.balanced});
            if (found) check::fail(__FILE__, __LINE__, words(plan) + ": " + found->what);
          }
        }
      }
    }
  }
  std::printf("       %ld plans with %ld sends\n", plans, sends);
}

TEST(every_root_is_proved) {
  for (const Algorithm& algorithm : algorithms()) {
    for (int n : {2, 3, 5, 8}) {
      for (int root = 0; root < n; ++root) {
        const Call call = make_call({algorithm.collective, n, root, (root + 1) % n}, 1009, !algorithm.ragged,
                                    kBufferings[root % std::size(kBufferings)]);
        const Plan plan = make_plan(algorithm.name, call, small_windows(n));
        const auto found = verify(plan, {.balanced = algorithm.balanced});
        if (found) check::fail(__FILE__, __LINE__, words(plan) + ": " + found->what);
      }
    }
  }
}

// Every ordered pair of algorithms with a third call after it, so that both banks are used again.
TEST(sequences_of_calls_are_proved) {
  long sequences = 0;
  const std::vector<std::vector<int>> worlds = {{}, {}, {}, {0, 1}, {0, 0, 1}, {0, 1, 0, 2, 1}};
  const int sizes[] = {2, 3, 5, 2, 3, 5};
  for (size_t w = 0; w < worlds.size(); ++w) {
    const int n = sizes[w];
    std::vector<Plan> plans;
    for (const Algorithm& algorithm : algorithms()) {
      for (const Buffering& buffering : {kBufferings[0], kBufferings[3], kBufferings[7]}) {
        const Call call =
            make_call({algorithm.collective, n, 0, n - 1, worlds[w]}, 600 * n, !algorithm.ragged, buffering);
        Geometry geometry = small_windows(n);
        geometry.trip_bytes = 1 << 10;
        Plan plan = make_plan(algorithm.name, call, geometry);
        if (plan.call.in == call.in) plans.push_back(std::move(plan));
      }
    }
    for (const Plan& a : plans) {
      for (const Plan& b : plans) {
        const Plan* calls[] = {&a, &b, &a, &b};
        ++sequences;
        if (const auto found = verify_sequence(calls)) {
          check::fail(__FILE__, __LINE__, words(a) + ", " + words(b) + ": " + found->what);
        }
      }
    }
  }
  std::printf("       %ld sequences\n", sequences);
}

// Leaving trips out changes no verdict: neither of correct plans nor of those with a step less or a signal
// too early.
TEST(left_out_trips_hide_nothing) {
  long compared = 0, rejected = 0;
  for (const Algorithm& algorithm : algorithms()) {
    for (const auto& [n, nodes] : std::vector<std::pair<int, std::vector<int>>>{
             {2, {}}, {3, {}}, {4, {}}, {2, {0, 1}}, {3, {0, 1, 0}}, {4, {0, 1, 1, 2}}}) {
      for (const Buffering& buffering : {kBufferings[0], kBufferings[2], kBufferings[3]}) {
        const Call call =
            make_call({algorithm.collective, n, 0, n - 1, nodes}, 300 * n * n, !algorithm.ragged, buffering);
        Geometry geometry = small_windows(n);
        geometry.trip_bytes = 256;
        const Plan plan = make_plan(algorithm.name, call, geometry);
        for (int rank = 0; rank < n; ++rank) {
          for (size_t step = 0; step <= plan.programs[rank].steps.size(); ++step) {
            Plan changed = plan;
            if (step < plan.programs[rank].steps.size()) {
              Step& s = changed.programs[rank].steps[step];
              (s.kind == Step::Kind::combine ? s.count : s.value) -= 1;
            }
            const auto some = verify(changed), all = verify(changed, {.all_trips = true});
            ++compared;
            rejected += all.has_value();
            if (some.has_value() != all.has_value()) {
              check::fail(__FILE__, __LINE__, words(plan) + ": " + (some ? some->what : all->what));
            }
          }
        }
      }
    }
  }
  std::printf("       %ld plans compared, %ld rejected\n", compared, rejected);
  CHECK(rejected > compared / 2);
}
