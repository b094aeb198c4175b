// The memory of other processes, read through the kernel (process_vm_readv): one copy, in which the other
// process takes no part.
#pragma once

#include <cstdint>

#include "transport/fd.h"

namespace pycomm::transport {

// Whether others can read this memory of ours, and fast: the kernel looks up every page, so that small pages
// cost it more than the copy itself, and memory of a device or pinned for one it cannot lend at all. Memory
// is fit if a quarter of it lies in one row of huge pages, or if it has few pages of any kind. A kernel
// before 6.7 cannot tell, and the answer is no. `pagemap`: open_pagemap's.
bool fit_to_read(const Fd& pagemap, const void* data, int64_t bytes);
Fd open_pagemap();

// Copies [from, from + bytes) of a process's memory to `to`, at most `most` bytes a system call (the kernel
// takes no more than 2 GiB). Returns 0 or the errno that ended it: EFAULT where `from` is not mapped there or
// cannot be lent (memory of a device, or pinned for one), EPERM if the kernel does not allow it, ESRCH if the
// process is gone. A pid may be another's by then: whoever asks looks afterwards whether the process lives.
int read_memory(int64_t pid, void* to, uint64_t from, int64_t bytes, int64_t most = int64_t{1} << 30);

// Lets the descendants of the process that started this one read it, or no longer, where Yama lets only its
// own ancestors (ptrace_scope=1).
void let_siblings_read(bool yes);

}  // namespace pycomm::transport
