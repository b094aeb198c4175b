// The sizes of this machine's caches, as far as the machine reports them. They decide how data is cut and
// when it is stored past the caches.
#pragma once

#include <cstdint>
#include <string>

namespace pycomm {

struct Caches {
  int64_t l2 = 512 << 10;  // bytes; private to a core
  int64_t last = 8 << 20;  // bytes of the last level, shared by `sharers` cores
  int sharers = 1;
};

// Reads what /sys says about the core `cpu`; `root` is prepended to the paths (for tests). A size that /sys
// lacks comes from the C library (on x86: from the processor); one that it lacks as well gets a default, and
// all cores then share the last level. A virtual machine may report anything, so sizes are bounded to what
// processors have: l2 to [256 KiB, 4 MiB], last to [l2, 64 MiB].
Caches read_caches(const std::string& root = "", int cpu = 0);

// This machine's caches, read once: always those of core 0, so that the ranks of a node agree.
const Caches& caches();

// The least size of an output that is stored past the caches when each of `cores` cores writes as much: from
// there on, what the cores read and write together exceeds the last level. Two cores are assumed at least,
// whatever a virtual machine reports. Measured on a last level of 32 MiB: near this bound both kinds of store
// take equally long; at half of it non-temporal stores take up to 1.7 times as long, at five times of it 0.7
// to 0.9 times.
int64_t past_cache_bytes(int cores, const Caches& found = caches());

}  // namespace pycomm
