#include "runtime/profile.h"

#include <algorithm>
#include <numeric>

#include "runtime/domain.h"
#include "schedule/lower/layout.h"

namespace pycomm::runtime {

namespace {

using schedule::Collective;

// Bytes that a rank reads (all others' data) up to which few synchronisations beat little data. A symmetric
// buffer needs no copy in two_shot, so there the turn comes sooner; where ranks share cores a synchronisation
// costs switches of processes, so there it comes later.
constexpr int64_t kFewSyncs = 2 << 10, kFewSyncsSymmetric = 512, kFewSyncsCrowded = 48 << 10;

std::vector<Rule> built_in_rules() {
  std::vector<Rule> rules;
  for (const Collective collective :
       {Collective::all_reduce, Collective::reduce_scatter, Collective::all_gather, Collective::broadcast,
        Collective::reduce, Collective::all_to_all}) {
    rules.push_back({.collective = collective,
                     .nodes = true,
                     .ragged = false,
                     .coded = false,
                     .deterministic = false,
                     .algorithm = "hierarchical",
                     .reason = "on several nodes, what crosses between them crosses once"});
  }
  for (const Collective collective :
       {Collective::all_reduce, Collective::reduce_scatter, Collective::all_gather}) {
    rules.push_back(
        {.collective = collective,
         .links = Links::wire,
         .deterministic = false,
         .algorithm = "hierarchical",
         .reason = "what crosses between nodes is encoded, crosses once, and is summed exactly before"});
  }
  const auto all_reduce = [&](Rule rule) {
    rule.collective = Collective::all_reduce;
    rules.push_back(std::move(rule));
  };
  all_reduce({.coded = true,
              .algorithm = "two_shot",
              .reason = "of all that carry codecs it encodes least: an element twice, whatever the number of "
                        "ranks"});
  const std::string few = "of so few bytes, to read everything costs less than a second synchronisation";
  all_reduce({.crowded = true,
              .min_ranks = 3,
              .max_bytes = kFewSyncsCrowded,
              .algorithm = "recursive_doubling",
              .reason = "ranks share cores: a rank waits for one peer at a time, and for few"});
  all_reduce({.crowded = true, .max_bytes = kFewSyncsCrowded, .algorithm = "one_shot", .reason = few});
  all_reduce({.crowded = false,
              .symmetric = true,
              .max_bytes = kFewSyncsSymmetric,
              .algorithm = "one_shot",
              .reason = few});
  all_reduce(
      {.crowded = false, .symmetric = false, .max_bytes = kFewSyncs, .algorithm = "one_shot", .reason = few});
  all_reduce({.algorithm = "two_shot",
              .reason =
                  "on a node every rank can read all others at once: two synchronisations and the least "
                  "bytes"});
  rules.push_back({.collective = Collective::barrier,
                   .algorithm = "dissemination",
                   .reason = "the fewest rounds: log2 of the ranks"});
  rules.push_back({.algorithm = "direct", .reason = "on a node every rank can read all others at once"});
  return rules;
}

}  // namespace

bool Rule::fits(const schedule::Call& call, bool is_crowded) const {
  const auto is = [](const auto& wanted, auto value) { return !wanted || *wanted == value; };
  const int64_t bytes = std::accumulate(call.counts.begin(), call.counts.end(), int64_t{0}) *
                        static_cast<int64_t>(size_of(call.dtype));
  const bool both = schedule::in_reach(call.in) && schedule::in_reach(call.out);
  return is(collective, call.world.collective) && is(nodes, !call.world.nodes.empty()) &&
         is(ragged, is_ragged(call)) && is(coded, call.coded()) && (!links || call.coded_on(*links)) &&
         is(crowded, is_crowded) && is(symmetric, both) && call.world.size >= min_ranks &&
         bytes * (call.world.size - 1) <= max_bytes && (deterministic || !call.deterministic);
}

// What follows was measured on cores that share a last level of 32 MiB, with an L2 of 1 MiB (Zen 5) and of
// 512 KiB (Zen 3), where the host moves the cores of a virtual machine near and far from each other.
// docs/benchmarks.md has the figures.
//
// One copy by the kernel replaces two through the window, from a block on that outlives the L2 by far: both
// processors turn at 2 MiB, in huge pages alone (Node::fit_to_read). Where one rank shows what others take,
// both work at once through the window, and the copies cost no more.
//
// Ranks tell each other where their buffers lie in a small all_gather, which costs a fraction of a microsecond:
// a tenth of an all_reduce of 64 KiB in place.
//
// A trip is as long as the bank's two slots allow, if the windows take no more than a quarter of the last
// level: fewer signals, and data that has left the writer's L2 for the last level is read faster than out of
// another core's L2. From 32 KiB to 2 MiB the worst regret of this was 1.2, and 1.5 in a run that did not
// tell near cores from far ones.
Profile built_in_profile(const Caches& found) {
  return {.rules = built_in_rules(),
          .single_copy = {Collective::all_gather, Collective::all_to_all},
          .single_copy_bytes = found.last / 16,
          .told_bytes = 64 << 10,
          .trip_bytes = std::clamp<int64_t>(found.last / 64, 64 << 10, 448 << 10),
          .caches = found};
}

Geometry host_geometry(int ranks, const Profile& profile) {
  return {.bank_bytes = kBankBytes,
          .trip_bytes = profile.trip_bytes,
          .stream_bytes = past_cache_bytes(ranks, profile.caches),
          .max_cells = kCellsPerPair,
          .payload_bytes = schedule::kPayloadBytes};
}

}  // namespace pycomm::runtime
