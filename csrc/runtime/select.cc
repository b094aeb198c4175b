#include "runtime/select.h"

#include <algorithm>
#include <numeric>

#include "runtime/domain.h"

namespace pycomm::runtime {

namespace {
// Bytes that a rank reads (all others' data) up to which few synchronisations beat little data. A symmetric
// buffer needs no copy in two_shot, so there the turn comes sooner; where ranks share cores a synchronisation
// costs switches of processes, so there it comes later.
constexpr int64_t kFewSyncs = 2 << 10, kFewSyncsSymmetric = 512, kFewSyncsCrowded = 48 << 10;

Choice select_all_reduce(const schedule::Call& call, int64_t bytes, bool crowded) {
  const int64_t n = call.world.size;
  if (n == 1) return {"one_shot", "one rank has nobody to exchange with"};
  const bool symmetric =
      call.in == schedule::Placement::symmetric && call.out == schedule::Placement::symmetric;
  const int64_t limit = crowded ? kFewSyncsCrowded : symmetric ? kFewSyncsSymmetric : kFewSyncs;
  if (bytes * (n - 1) > limit) {
    return {"two_shot",
            "on a node every rank can read all others at once: two synchronisations and the least bytes"};
  }
  if (crowded && n > 2) {
    return {"recursive_doubling", "ranks share cores: a rank waits for one peer at a time, and for few"};
  }
  return {"one_shot", "at " + std::to_string(bytes) +
                          " bytes a second synchronisation costs more than reading everything"};
}
}  // namespace

Choice select(const schedule::Call& call, bool crowded) {
  const int64_t bytes = std::accumulate(call.counts.begin(), call.counts.end(), int64_t{0}) *
                        static_cast<int64_t>(size_of(call.dtype));
  if (!call.world.nodes.empty() && !call.coded() && !call.deterministic) {
    switch (call.world.collective) {
      case Collective::all_reduce:
      case Collective::reduce_scatter:
      case Collective::all_gather:
      case Collective::broadcast:
      case Collective::reduce:
        return {"hierarchical", "on several nodes, what crosses between them crosses once"};
      default:
        break;
    }
  }
  if (call.coded() && call.world.collective == Collective::all_reduce) {
    return {"two_shot",
            "of all that carry codecs it encodes least: an element twice, whatever the number of ranks"};
  }
  switch (call.world.collective) {
    case Collective::all_reduce:
      return select_all_reduce(call, bytes, crowded);
    case Collective::reduce_scatter:
    case Collective::all_gather:
    case Collective::broadcast:
    case Collective::reduce:
    case Collective::gather:
    case Collective::scatter:
    case Collective::all_to_all:
    case Collective::send_recv:
      return {"direct", "on a node every rank can read all others at once"};
    case Collective::barrier:
      return {"dissemination", "the fewest rounds: log2 of the ranks"};
  }
  return {};
}

// What follows was measured on cores that share a last level of 32 MiB, with an L2 of 1 MiB (Zen 5) and of
// 512 KiB (Zen 3), where the host moves the cores of a virtual machine near and far from each other.
// docs/benchmarks.md has the figures.

// One copy by the kernel replaces two through the window, from a block on that outlives the L2 by far: both
// processors turn at 2 MiB, in huge pages alone (Node::fit_to_read).
bool single_copy_pays(const schedule::Call& call, const Caches& found) {
  if (call.ragged) return false;  // all ranks have to decide alike, and know what they exchange themselves
  switch (call.world.collective) {
    case Collective::all_gather:
    case Collective::all_to_all:
      return *std::max_element(call.counts.begin(), call.counts.end()) *
                 static_cast<int64_t>(size_of(call.dtype)) >=
             found.last / 16;
    // One rank shows what others take: through the window both work at once, and the copies cost no more.
    case Collective::broadcast:
    case Collective::gather:
    case Collective::scatter:
    case Collective::send_recv:
    case Collective::all_reduce:
    case Collective::reduce_scatter:
    case Collective::reduce:
    case Collective::barrier:
      return false;
  }
  return false;
}

// A trip is as long as the bank's two slots allow, if the windows take no more than a quarter of the last
// level: fewer signals, and data that has left the writer's L2 for the last level is read faster than out of
// another core's L2. From 32 KiB to 2 MiB the worst regret of this was 1.2,
// and 1.5 in a run that did not tell near cores from far ones.
Geometry host_geometry(int ranks, const Caches& found) {
  return {.bank_bytes = kBankBytes,
          .trip_bytes = std::clamp<int64_t>(found.last / 64, 64 << 10, 448 << 10),
          .stream_bytes = past_cache_bytes(ranks, found),
          .max_cells = kCellsPerPair,
          .payload_bytes = schedule::kPayloadBytes};
}

}  // namespace pycomm::runtime
