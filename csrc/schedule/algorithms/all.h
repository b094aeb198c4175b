// What algorithm files share: every algorithm's declaration, once.
#pragma once

#include "schedule/schedule.h"

namespace pycomm::schedule {

Schedule one_shot(const World& world);
Schedule two_shot(const World& world);

}  // namespace pycomm::schedule
