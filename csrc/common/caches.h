// The caches that this process's cores have, as far as the machine says so. What they hold decides how data
// is cut and when it is stored past them.
#pragma once

#include <cstdint>
#include <string>

namespace pycomm {

struct Caches {
  int64_t l2 = 512 << 10;  // bytes that a core has for itself
  int64_t last = 8 << 20;  // bytes of the last level, which `sharers` cores use together
  int sharers = 1;
};

// Reads /sys of the core `cpu`; `root` is prepended (for tests). What is not said there is asked of the C
// library (on x86: of the processor), and what that does not know either is a default; all cores then share
// the last level. A virtual machine may show anything: sizes are bounded to what processors have, l2 to [256
// KiB, 4 MiB], last to [l2, 64 MiB].
Caches read_caches(const std::string& root = "", int cpu = 0);

// This machine's, read once. Of core 0 whatever cores the process may use, so that the ranks of a node agree.
const Caches& caches();

// Outputs of at least so many bytes are stored past the caches, by each of `cores` cores that write as much:
// all that they read and write is then more than the last level holds. Never for fewer than two cores,
// whatever a virtual machine says. Measured on a last level of 32 MiB: near this bound both ways take as
// long, at half of it non-temporal stores take up to 1.7 times as long, at five times of it 0.7 to 0.9.
int64_t past_cache_bytes(int cores, const Caches& found = caches());

}  // namespace pycomm
