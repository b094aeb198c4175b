// What is chosen if the caller names no algorithm: by the built-in profile, and by one that is made here.
//
// Tests: runtime/profile.cc.
#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "runtime/select.h"
#include "schedule/algorithms.h"
#include "schedule/lower/layout.h"

using namespace pycomm;
using namespace pycomm::runtime;
using schedule::Call;
using schedule::Collective;
using schedule::Placement;

namespace {

const Profile kBuiltIn = built_in_profile({.l2 = 512 << 10, .last = 32 << 20, .sharers = 8});

Call call_of(Collective collective, int ranks, int64_t count) {
  Call call;
  call.world = {.collective = collective, .size = ranks};
  call.counts = schedule::uniform_counts(call.world, count);
  return call;
}

}  // namespace

// An all_reduce of float32 turns at so many bytes of all others' data.
TEST(all_reduce_turns_where_synchronisations_cost_less_than_bytes) {
  struct Case {
    int ranks;
    bool crowded, symmetric;
    int64_t last_bytes;  // of a rank's data, up to which there are few synchronisations
    const char* small;
  };
  for (const Case& c : {Case{2, false, false, 2048, "one_shot"},
                        {5, false, false, 512, "one_shot"},
                        {2, false, true, 512, "one_shot"},
                        {2, true, false, 48 << 10, "one_shot"},
                        {2, true, true, 48 << 10, "one_shot"},
                        {4, true, false, 16 << 10, "recursive_doubling"}}) {
    const auto chosen = [&](int64_t bytes) {
      Call call = call_of(Collective::all_reduce, c.ranks, bytes / 4);
      if (c.symmetric) call.in = call.out = Placement::symmetric;
      const Choice choice = select(call, kBuiltIn, c.crowded);
      CHECK(!choice.reason.empty());
      if (c.symmetric) {  // how peers find a buffer changes nothing
        call.out = Placement::told;
        CHECK_EQ(select(call, kBuiltIn, c.crowded).algorithm, choice.algorithm);
      }
      return choice.algorithm;
    };
    CHECK_EQ(chosen(c.last_bytes), c.small);
    CHECK_EQ(chosen(4), c.small);
    CHECK_EQ(chosen(c.last_bytes + 4), "two_shot");
    CHECK_EQ(chosen(1 << 30), "two_shot");
  }
  CHECK_EQ(select(call_of(Collective::all_reduce, 1, 1 << 20), kBuiltIn, false).algorithm, "one_shot");
}

// Whatever is chosen exists, carries a codec where there is one, and sums in order where that is asked for. On
// several nodes it is the one that is written for them, where the collective has it.
TEST(every_call_gets_an_algorithm_that_can) {
  for (int i = 0; i < schedule::kNumCollectives; ++i) {
    const auto collective = static_cast<Collective>(i);
    const bool has_hierarchical =
        std::ranges::count(schedule::algorithm_names(collective), "hierarchical") > 0;
    for (const int ranks : {1, 2, 3, 8}) {
      for (const int64_t count : {0, 1, 1000, 1 << 20}) {
        for (const bool nodes : {false, true}) {
          for (const bool crowded : {false, true}) {
            Call call = call_of(collective, ranks, count);
            if (nodes && ranks > 1) call.world.nodes.assign(ranks, 0), call.world.nodes.back() = 1;
            const auto chosen = [&] {
              return schedule::find_algorithm(collective, select(call, kBuiltIn, crowded).algorithm);
            };
            CHECK_EQ(std::string(chosen().name) == "hierarchical",
                     has_hierarchical && !call.world.nodes.empty());
            if (call.world.traits().pairwise) {
              call.ragged = true;
              CHECK(chosen().ragged);
              call.ragged = false;
            }
            if (call.world.traits().reduces) {
              call.deterministic = true;
              CHECK(chosen().balanced);
            }
            if (!call.world.traits().takes_codec) continue;
            call.codec.kind = CodecKind::int8;
            CHECK(chosen().codecs != schedule::Algorithm::Codecs::none);
            call.codec.links = Links::wire;
            CHECK(chosen().wire || !call.coded());
          }
        }
      }
    }
  }
}

// The first rule that fits counts; every condition of a rule can keep it from fitting.
TEST(a_profile_is_data) {
  Profile mine{.rules = {{.collective = Collective::all_reduce,
                          .nodes = false,
                          .coded = false,
                          .crowded = false,
                          .symmetric = false,
                          .min_ranks = 3,
                          .max_bytes = 800,
                          .deterministic = false,
                          .algorithm = "ring",
                          .reason = "so it was measured"},
                         {.collective = Collective::all_reduce, .algorithm = "tree"}}};
  const Call fits = call_of(Collective::all_reduce, 3, 100);
  CHECK_EQ(select(fits, mine, false).algorithm, "ring");
  CHECK_EQ(select(fits, mine, false).reason, "so it was measured");
  CHECK_EQ(select(fits, mine, true).algorithm, "tree");
  const auto otherwise = [&](auto change) {
    Call call = fits;
    change(call);
    CHECK_EQ(select(call, mine, false).algorithm, "tree");
  };
  otherwise([](Call& call) { call.world.nodes = {0, 0, 1}; });
  otherwise([](Call& call) { call.codec.kind = CodecKind::int8; });
  otherwise([](Call& call) { call.in = call.out = Placement::symmetric; });
  otherwise([](Call& call) { call.in = call.out = Placement::told; });
  otherwise([](Call& call) { call.world.size = 2; });
  otherwise([](Call& call) { call.counts = {101}; });
  otherwise([](Call& call) { call.deterministic = true; });
  CHECK_THROWS(ValueError, select(call_of(Collective::barrier, 3, 0), mine, false));

  Call wire = fits;
  wire.codec = {.kind = CodecKind::int8, .links = Links::wire};
  CHECK(!Rule{.links = Links::wire}.fits(wire, false));  // nothing crosses
  wire.world.nodes = {0, 0, 1};
  CHECK(Rule{.links = Links::wire}.fits(wire, false));
  CHECK(!Rule{.links = Links::all}.fits(wire, false));
  Call pairs = call_of(Collective::all_to_all, 3, 100);
  CHECK(Rule{.ragged = false}.fits(pairs, false));
  pairs.ragged = true;
  CHECK(!Rule{.ragged = false}.fits(pairs, false));
}

TEST(single_copy_and_geometry_are_the_profiles) {
  const int64_t block = 2 << 20;
  for (int i = 0; i < schedule::kNumCollectives; ++i) {
    const auto collective = static_cast<Collective>(i);
    const bool one_of_two = collective == Collective::all_gather || collective == Collective::all_to_all;
    CHECK_EQ(single_copy_pays(call_of(collective, 2, block / 4), kBuiltIn), one_of_two);
    CHECK(!single_copy_pays(call_of(collective, 2, block / 4 - 1), kBuiltIn));
  }
  Call ragged = call_of(Collective::all_to_all, 2, block);
  ragged.ragged = true;
  CHECK(!single_copy_pays(ragged, kBuiltIn));
  Profile mine = kBuiltIn;
  mine.single_copy = {Collective::broadcast};
  mine.single_copy_bytes = 8;
  mine.trip_bytes = 4096;
  CHECK(single_copy_pays(call_of(Collective::broadcast, 2, 2), mine));
  CHECK(!single_copy_pays(call_of(Collective::all_gather, 2, block), mine));
  CHECK_EQ(host_geometry(2, mine).trip_bytes, 4096);
  CHECK_EQ(host_geometry(2, kBuiltIn).trip_bytes, 448 << 10);
  CHECK_EQ(host_geometry(4, kBuiltIn).stream_bytes, past_cache_bytes(4, kBuiltIn.caches));
}
