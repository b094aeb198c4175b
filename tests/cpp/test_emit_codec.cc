// Plans of calls with codecs: every plan that an algorithm is lowered to is proved, and the table of
// algorithms lists exactly the combinations that work.
//
// Tests: schedule/lower/encodes.cc.
#include <algorithm>
#include <cstdio>
#include <set>

#include "check.h"
#include "common/error.h"
#include "node_maps.h"
#include "schedule/algorithms.h"
#include "schedule/lower/layout.h"
#include "schedule/lower/lower.h"
#include "schedule/verify/verify.h"

using namespace pycomm;
using namespace pycomm::schedule;

namespace {

// Every placement that a caller may have; lowering takes them all for plain.
struct Buffers {
  Placement in, out;
  bool in_place;
};
constexpr Buffers kBuffers[] = {{Placement::plain, Placement::plain, false},
                                {Placement::plain, Placement::plain, true},
                                {Placement::symmetric, Placement::symmetric, true},
                                {Placement::reachable, Placement::plain, false}};
constexpr int kWorlds[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 24, 32};

bool takes_codecs(Collective collective) {
  return collective == Collective::all_reduce || collective == Collective::reduce_scatter ||
         collective == Collective::all_gather;
}

Call call_of(const Algorithm& algorithm, int n, CodecKind kind, int64_t count,
             const Buffers& buffers = kBuffers[0]) {
  Call call{.world = {.collective = algorithm.collective, .size = n},
            .counts = {},
            .in = buffers.in,
            .out = buffers.out,
            .in_place = buffers.in_place};
  call.counts = uniform_counts(call.world, count);
  call.codec.kind = kind;
  return call;
}

// Counts that differ from block to block, none a number of tiles, some zero.
void make_uneven(Call& call) {
  for (size_t b = 0; b < call.counts.size(); ++b) {
    call.counts[b] =
        b % 5 == 1 ? 0 : call.counts[b] * static_cast<int64_t>(b % 3 + 1) / 3 + static_cast<int64_t>(b % 4);
  }
}

// `tiles` of a block go through the window in one trip.
Geometry trips_of(const Call& call, int64_t tiles) {
  Geometry geometry;
  geometry.trip_bytes = tiles * tile_bytes(call.codec.kind) * num_blocks(call.world);
  geometry.bank_bytes = int64_t{1} << 40;
  geometry.payload_bytes = kPayloadBytes;
  return geometry;
}

std::string title(const Call& call, const std::string& algorithm, const Geometry& geometry) {
  return algorithm + " " + name(call.world.collective) + ", " + name(call.codec.kind) + ", " +
         std::to_string(call.world.size) + " ranks, " + std::to_string(call.counts[0]) +
         " elements, trips of " + std::to_string(geometry.trip_bytes) + " bytes" +
         (call.in_place ? ", in place" : "");
}

// Proves one plan, or says what is wrong. Returns its trips.
int64_t prove(const Algorithm& algorithm, const Call& call, const Geometry& geometry) {
  const Plan plan = make_plan(algorithm.name, call, geometry);
  const auto wrong = verify(plan, {.balanced = algorithm.balanced});
  if (wrong) check::fail(__FILE__, __LINE__, title(call, algorithm.name, geometry) + ": " + wrong->what);
  if (call.world.size > 1 && algorithm.codecs == Algorithm::Codecs::any_once) CHECK(plan.encodes_once);
  int64_t trips = 0;
  for (const Loop& loop : plan.programs[0].loops) trips += loop.trips;
  return trips;
}

void prove_all(const Algorithm& algorithm, int n) {
  for (CodecKind kind : {CodecKind::bf16, CodecKind::int8, CodecKind::int4}) {
    for (const Buffers& buffers : kBuffers) {
      if (n > 8 && buffers.in != Placement::plain) continue;
      Call call = call_of(algorithm, n, kind, 0, buffers);
      const bool blocks = num_blocks(call.world) > 1;
      const int64_t share = blocks ? 1 : n;  // of a block, in parts that algorithms may cut it into
      for (int64_t count : {int64_t{0}, int64_t{1}, kTile, kTile * share + 5, 3 * kTile * share - 7}) {
        if (n > 17 && count < kTile) continue;
        call.counts = uniform_counts(call.world, count);
        prove(algorithm, call, trips_of(call, 8 * share));
      }
      call.counts = uniform_counts(call.world, 12 * kTile * share + 37);
      const int64_t trips = prove(algorithm, call, trips_of(call, share));
      if (n > 1) CHECK(trips > 6);  // more than there are slots, so that each is used again
      call.counts = uniform_counts(call.world, 5 * kTile * share + 1000);
      prove(algorithm, call, trips_of(call, share + 1));
      if (!blocks) continue;
      call.counts = uniform_counts(call.world, 3 * kTile + 5);
      make_uneven(call);
      prove(algorithm, call, trips_of(call, 8));
      prove(algorithm, call, trips_of(call, 1));
    }
  }
}

}  // namespace

TEST(codec_plans_are_proved) {
  for (const Algorithm& algorithm : algorithms()) {
    if (algorithm.codecs == Algorithm::Codecs::none) continue;
    for (int n : kWorlds) prove_all(algorithm, n);
  }
}

// What the table does not promise, some plan breaks.
TEST(the_table_leaves_nothing_out) {
  for (const Algorithm& algorithm : algorithms()) {
    if (!takes_codecs(algorithm.collective)) {
      CHECK(algorithm.codecs == Algorithm::Codecs::none);
      Call call = call_of(algorithm, 2, CodecKind::int8, 3000);
      CHECK_THROWS(ValueError, make_plan(algorithm.name, call, trips_of(call, 8)));
      continue;
    }
    bool carried = true, once = true;
    for (int n = 2; n <= 9; ++n) {
      const Call call = call_of(algorithm, n, CodecKind::int8, kTile * n);
      const Plan plan = make_plan(algorithm.name, call, trips_of(call, 2 * n));
      carried = carried && !verify(plan);
      once = once && plan.encodes_once;
    }
    CHECK_EQ(carried, algorithm.codecs != Algorithm::Codecs::none);
    if (algorithm.codecs == Algorithm::Codecs::any_once) CHECK(once);
    const std::string names = algorithms_that(
        algorithm.collective, [](const Algorithm& a) { return a.codecs != Algorithm::Codecs::none; });
    CHECK_EQ(carried, names.find(algorithm.name) != std::string::npos);
  }
}

// A reduce_scatter pays what a rank owes of its own share by itself (runtime/coding.cc): no plan encodes it.
void check_own_share(const Plan& plan) {
  if (plan.call.world.collective != Collective::reduce_scatter) return;
  for (int rank = 0; rank < plan.call.world.size; ++rank) {
    const Program& program = plan.programs[rank];
    const int64_t begin = block_offset(plan.call, rank, Buffer::in, rank),
                  end = begin + plan.call.counts[rank];
    for (const Step& step : program.steps) {
      if (step.kind != Step::Kind::combine || !encodes(program, step)) continue;
      const int64_t element = program.transcodes[step.transcode].element;
      CHECK(element < begin || element >= end);
    }
  }
}

// On nodes, with codecs on all links and on message links alone: plans are proved where the table says so,
// and some plan is not where it does not.
TEST(the_table_is_right_between_nodes) {
  long plans = 0;
  for (const Algorithm& algorithm : algorithms()) {
    if (!takes_codecs(algorithm.collective)) continue;
    for (const Links links : {Links::all, Links::wire}) {
      bool carried = true, once = true;
      std::string first;
      for (int n = 2; n <= 8; ++n) {
        for (const std::vector<int>& nodes : node_maps(n)) {
          for (const bool in_place : {false, true}) {
            Call call = call_of(algorithm, n, plans % 2 == 0 ? CodecKind::int8 : CodecKind::sign, 0,
                                {.in_place = in_place});
            call.world.nodes = nodes;
            call.codec.links = links;
            call.dtype = plans % 3 == 0 ? DType::bfloat16 : DType::float32;
            if (call.world.traits().reduces && plans % 5 == 0) call.op = Op::avg;
            for (const int64_t count : {int64_t{1}, kTile * n + 5, 9 * kTile * n - 7}) {
              call.counts = uniform_counts(call.world, count);
              if (plans % 2 == 1) make_uneven(call);
              Geometry geometry = trips_of(call, n);
              if (links == Links::wire) geometry.trip_bytes *= 32;  // windows hold no wire form
              const Plan plan = make_plan(algorithm.name, call, geometry);
              const auto wrong = verify(plan, {.balanced = algorithm.balanced});
              ++plans;
              if (wrong && first.empty()) first = title(call, algorithm.name, geometry) + ": " + wrong->what;
              carried = carried && !wrong;
              once = once && plan.encodes_once;
              if (algorithm.codecs == Algorithm::Codecs::any_once) check_own_share(plan);
            }
          }
        }
      }
      if (links == Links::all) {
        CHECK_EQ(carried && once, algorithm.codecs == Algorithm::Codecs::any_once);
      }
      const bool promised =
          links == Links::wire ? algorithm.wire : algorithm.codecs != Algorithm::Codecs::none;
      if (carried != promised) {
        check::fail(__FILE__, __LINE__,
                    std::string(algorithm.name) + " " + name(algorithm.collective) +
                        (links == Links::wire ? " @wire " : " ") + first);
      }
    }
  }
  std::printf("       %ld plans\n", plans);
}

// All pairs with plain calls and with each other, since they share windows.
TEST(sequences_with_codecs_are_proved) {
  const struct {
    std::vector<int> nodes;
    Links links;
    int n;
  } worlds[] = {{{}, Links::all, 2},      {{}, Links::all, 3},         {{}, Links::all, 5},
                {{0, 1}, Links::wire, 2}, {{0, 1, 0}, Links::wire, 3}, {{0, 0, 1, 1, 2}, Links::wire, 5}};
  for (const auto& [nodes, links, n] : worlds) {
    std::vector<Plan> coded, all;
    for (const Algorithm& algorithm : algorithms()) {
      Call call = call_of(algorithm, n, CodecKind::int8, 5 * kTile * n + 9);
      call.world.nodes = nodes;
      call.codec.links = links;
      const Geometry geometry = trips_of(call, n);
      const bool carries = algorithm.codecs != Algorithm::Codecs::none;
      if (links == Links::all ? carries : algorithm.wire) {
        coded.push_back(make_plan(algorithm.name, call, geometry));
      }
      call.codec = {};
      call.counts = uniform_counts(call.world, 1000);
      all.push_back(make_plan(algorithm.name, call, {.bank_bytes = int64_t{1} << 40, .trip_bytes = 240 * n}));
    }
    const auto check_sequence = [&](const std::vector<const Plan*>& calls) {
      const auto wrong = verify_sequence(calls);
      if (!wrong) return;
      std::string names;
      for (const Plan* plan : calls) names += title(plan->call, plan->algorithm, {}) + "; ";
      check::fail(__FILE__, __LINE__, names + "call " + std::to_string(wrong->call) + ": " + wrong->what);
    };
    for (const Plan& a : coded) {
      for (const Plan& b : coded) check_sequence({&a, &b, &a});
      for (const Plan& b : all) {
        check_sequence({&a, &b, &a});
        check_sequence({&b, &a, &b});
      }
    }
  }
}

// A window holds the wire form, and a rank as much of it as the algorithm promises.
TEST(windows_hold_wire_form) {
  for (const Algorithm& algorithm : algorithms()) {
    if (algorithm.codecs == Algorithm::Codecs::none) continue;
    for (CodecKind kind : {CodecKind::fp16, CodecKind::int8, CodecKind::sign}) {
      const Call call = call_of(algorithm, 4, kind, 64 * kTile);
      const Plan plan = make_plan(algorithm.name, call, trips_of(call, 16));
      CHECK(plan.slot_bytes % tile_bytes(kind) < 64);
      for (const Program& program : plan.programs) {
        for (const Operand& operand : program.operands) {
          CHECK_EQ(operand.format == Format::wire, operand.space == Space::window);
          if (operand.format == Format::wire) CHECK_EQ(operand.offset % tile_bytes(kind), 0);
        }
      }
    }
  }
}

// What crosses is what docs/algorithms.md says, in wire bytes.
TEST(wire_bytes_cross) {
  const struct {
    Collective collective;
    const char* algorithm;
    int64_t shares;  // of n, each way together
  } cases[] = {{Collective::all_reduce, "two_shot", 2 * 3},
               {Collective::all_reduce, "one_shot", 4 * 3},
               {Collective::all_reduce, "ring", 2 * 3},
               {Collective::reduce_scatter, "direct", 3},
               {Collective::all_gather, "direct", 3}};
  constexpr int n = 4;
  constexpr int64_t share = 32 * kTile;
  for (const auto& c : cases) {
    for (CodecKind kind : {CodecKind::bf16, CodecKind::int8, CodecKind::int4}) {
      const bool blocks = c.collective != Collective::all_reduce;
      const Call call =
          call_of(find_algorithm(c.collective, c.algorithm), n, kind, blocks ? share : n * share);
      const Plan plan = make_plan(c.algorithm, call, trips_of(call, 16));
      for (int rank = 0; rank < n; ++rank) {
        const Program& program = plan.programs[rank];
        int64_t bytes = 0;
        for (const Loop& loop : program.loops) {
          for (int s = loop.step; s < loop.step + loop.num_steps; ++s) {
            const Step& step = program.steps[s];
            for (int o = step.operand; o < step.operand + step.num_dsts + step.num_srcs; ++o) {
              const Operand& operand = program.operands[o];
              if (operand.rank != rank) bytes += loop.trips * operand_bytes(call, operand.format, step.count);
            }
          }
        }
        CHECK_EQ(bytes, c.shares * wire_bytes(kind, share));
      }
    }
  }
}

// Of two_shot's encodes: those of shown chunks in turn 0, the owner's in turn 1; each counts from where its
// chunk is.
TEST(encodes_know_where_they_are) {
  const Call call =
      call_of(find_algorithm(Collective::all_reduce, "two_shot"), 2, CodecKind::int8, 7 * kTile);
  const Plan plan = make_plan("two_shot", call, trips_of(call, 4));
  for (int rank = 0; rank < 2; ++rank) {
    const Program& program = plan.programs[rank];
    std::set<std::vector<int64_t>> found;  // turn, trip, index
    for (const Loop& loop : program.loops) {
      for (int s = loop.step; s < loop.step + loop.num_steps; ++s) {
        const Step& step = program.steps[s];
        if (step.kind != Step::Kind::combine || !encodes(program, step)) continue;
        const Transcode& how = program.transcodes[step.transcode];
        CHECK_EQ(how.divides, how.turn == 1);
        CHECK_EQ(how.index, how.element);
        for (int64_t trip = loop.first; trip < loop.first + loop.trips; ++trip)
          found.insert({how.turn, trip, how.index + trip * how.stride});
      }
    }
    // Trips of four tiles and three; rank 0 owns the first two and the first one.
    const int64_t own[2][2] = {{0, 4 * kTile}, {2 * kTile, 5 * kTile}};
    CHECK(found == std::set<std::vector<int64_t>>{{0, 0, own[1 - rank][0]},
                                                  {0, 1, own[1 - rank][1]},
                                                  {1, 0, own[rank][0]},
                                                  {1, 1, own[rank][1]}});
  }
}

// Blocks of a reduce_scatter begin with a tile in what codecs see, wherever they lie.
TEST(blocks_begin_with_tiles) {
  Call call = call_of(find_algorithm(Collective::reduce_scatter, "direct"), 3, CodecKind::int8, 0);
  call.counts = {5, 1024, 3000};
  CHECK_EQ(data_index(call, 0, 3), 3);
  CHECK_EQ(data_index(call, 1, 0), 1024);
  CHECK_EQ(data_index(call, 2, 1024), 3072);
  call.world.collective = Collective::all_gather;
  CHECK_EQ(data_index(call, 2, 1024), 1024);
}

TEST(codec_steps_are_told_in_words) {
  const Call call =
      call_of(find_algorithm(Collective::all_reduce, "two_shot"), 2, CodecKind::int8, 8 * kTile);
  const Plan plan = make_plan("two_shot", call, trips_of(call, 4));
  const auto words = [&](int step) { return describe(plan, 0, plan.programs[0].steps[step]); };
  CHECK_EQ(
      words(0),
      "rank 0 step 0: combine window[2080:4160] wire <- in[8192:16384] + 16384w, encoded from element 2048 + "
      "4096w in turn 0");
}
