// dissemination barrier: at distance d = 1, 2, 4, ... every rank tells the rank d ahead that it, and all it
// has heard of, have arrived. What is told is an empty chunk: its signals are the barrier.
//
// Cost: ceil(log2 n) steps, no data. One for any n.
//
// Hensgen, Finkel and Manber, Two algorithms for barrier synchronization, IJPP 17(1), 1988.
#include "schedule/algorithms/all.h"
#include "schedule/algorithms/common.h"

namespace pycomm::schedule {

Schedule dissemination(const World& world) {
  const int n = world.size;
  if (n == 1) return alone(world);
  const Chunk nothing{0, 0, 0, 1};
  Schedule schedule;
  for (int rank = 0; rank < n; ++rank) {
    Builder b(schedule, rank);
    for (int d = 1; d < n; d *= 2) {
      b.offer((rank + d) % n, b.image(nothing));
      b.copy(b.image(nothing), Builder::image_of((rank + n - d) % n, nothing));
    }
  }
  accept_all(schedule);
  return schedule;
}

}  // namespace pycomm::schedule
