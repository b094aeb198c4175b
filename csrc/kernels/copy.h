// Copies of bytes: the loops behind every move that computes nothing.
//
// libc's memcpy serves only up to a few hundred bytes. From about 2 KiB on it is `rep movsb` on many
// processors, which AMD's Zen 3 and Zen 4 run up to 30 times slower when the destination lies 1 to 31 bytes
// beyond the source modulo 4 KiB. That is common here: large NumPy arrays lie 16 bytes beyond a page, and
// windows start at one.
#pragma once

#include <cstddef>

#include "kernels/isa.h"

namespace pycomm::kernels {

// Copies `bytes` bytes. The two ranges are disjoint or identical. `past` asks for non-temporal stores, for
// data that is larger than the cache and not read again soon; stream_fence() orders them before later stores.
void copy_bytes(void* dst, const void* src, size_t bytes, bool past = false, const Isa& isa = chosen_isa());

void stream_fence();

}  // namespace pycomm::kernels
