#include "runtime/select.h"

#include <algorithm>
#include <numeric>

#include "runtime/domain.h"

namespace pycomm::runtime {

namespace {
// Up to here one synchronisation over the whole data beats two over an n-th of it.
constexpr int64_t kOneShotBytes = 2048;
}  // namespace

Choice select(const schedule::Call& call) {
  const int64_t bytes = std::accumulate(call.counts.begin(), call.counts.end(), int64_t{0}) *
                        static_cast<int64_t>(size_of(call.dtype));
  const int64_t n = call.world.size;
  switch (call.world.collective) {
    case Collective::all_reduce:
      if (n == 1) return {"one_shot", "one rank has nobody to exchange with"};
      if (bytes * (n - 1) <= kOneShotBytes) {
        return {"one_shot", "at " + std::to_string(bytes) +
                                " bytes a second synchronisation costs more than reading everything"};
      }
      return {"two_shot",
              "on a node every rank can read all others at once: two synchronisations and the least bytes"};
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

Geometry host_geometry() {
  return {.bank_bytes = kBankBytes,
          .trip_bytes = 256 << 10,
          .stream_bytes = 32 << 20,
          .max_cells = kCellsPerPair};
}

}  // namespace pycomm::runtime
