// one_shot all_reduce: every rank shows its whole input to all others and sums everything itself.
//
// Cost: 1 synchronisation, the least possible; each rank reads (n-1) times the data. The choice for small
// messages on a node. The input is shown as a copy, so that a rank may overwrite its own buffer while others
// still read the copy.
//
// Bruck and Ho, Efficient global combine operations in multi-port message-passing systems, Parallel
// Processing Letters 3(4), 1993: its case of n - 1 ports.
#include "schedule/algorithms/all.h"

namespace pycomm::schedule {

Schedule one_shot(const World& world) {
  Schedule schedule;
  const int n = world.size;
  for (int rank = 0; rank < n; ++rank) {
    Builder b(schedule, rank);
    if (n > 1) b.copy(b.image(), b.in());
    for (int step = 1; step < n; ++step) b.offer((rank + step) % n, b.image());
    std::vector<Ref> srcs;
    for (int peer = 0; peer < n; ++peer) srcs.push_back(peer == rank ? b.in() : b.image_of(peer));
    b.combine({b.out()}, srcs, /*final=*/true);
    for (int step = 1; step < n; ++step) b.accept((rank + step) % n, b.image());
  }
  return schedule;
}

}  // namespace pycomm::schedule
