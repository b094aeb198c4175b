#include "transport/signals.h"

#include <linux/futex.h>
#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace pycomm::transport {

void register_for_fences() {
  static const long registered = syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0, 0);
  (void)registered;  // where it fails, so does the fence, and naps are kept short
}

bool Doorbell::fence_all_processes() {
  return syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL_EXPEDITED, 0, 0) == 0;
}

void Doorbell::wake() {
  rung_.fetch_add(1, std::memory_order_release);
  syscall(SYS_futex, &rung_, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Doorbell::wait(uint32_t rung, double seconds) {
  const timespec limit{0, static_cast<long>(seconds * 1e9)};
  syscall(SYS_futex, &rung_, FUTEX_WAIT, rung, &limit, nullptr, 0);
}

}  // namespace pycomm::transport
