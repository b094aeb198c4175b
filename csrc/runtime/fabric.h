// What the ranks of a group have found out together about the machine that joins them. All but the policies
// is the same on every rank, since ranks must choose alike.
#pragma once

#include "common/caches.h"
#include "common/env.h"
#include "runtime/profile.h"
#include "runtime/waiter.h"

namespace pycomm::runtime {

struct Fabric {
  WaitPolicy policy{.spin_us = env().spin_us, .yield = true};  // of a thread that waits for its own call
  WaitPolicy background{.spin_us = 0, .yield = true};          // of the progress thread
  Profile profile = built_in_profile({});
  bool single_copy = false;  // all can read each other's memory through the kernel
};

}  // namespace pycomm::runtime
