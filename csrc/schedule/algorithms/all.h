// Every algorithm's declaration, once.
//
// One file holds one algorithm. Where it serves several collectives (`ring` is a reduce-scatter, an
// all-gather, and an all-reduce made of both) it asks world.collective.
#pragma once

#include "schedule/schedule.h"

namespace pycomm::schedule {

Schedule binomial(const World& world);
Schedule direct(const World& world);
Schedule dissemination(const World& world);
Schedule halving_doubling(const World& world);
Schedule hierarchical(const World& world);
Schedule one_shot(const World& world);
Schedule pairwise(const World& world);
Schedule pipelined_tree(const World& world);
Schedule recursive_doubling(const World& world);
Schedule recursive_halving(const World& world);
Schedule ring(const World& world);
Schedule tree(const World& world);
Schedule two_shot(const World& world);

}  // namespace pycomm::schedule
