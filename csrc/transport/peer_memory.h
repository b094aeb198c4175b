// The memory of other processes, read through the kernel (process_vm_readv): one copy, of which the other one
// knows nothing.
#pragma once

#include <cstdint>

namespace pycomm::transport {

// Copies [from, from + bytes) of a process's memory to `to`, at most `most` bytes a system call (the kernel
// takes no more than 2 GiB). Returns 0 or the errno that ended it: EFAULT where `from` is not mapped there or
// cannot be lent (memory of a device, or pinned for one), EPERM if the kernel does not allow it, ESRCH if the
// process is gone. A pid may be another's by then: whoever asks looks afterwards whether the process lives.
int read_memory(int64_t pid, void* to, uint64_t from, int64_t bytes, int64_t most = int64_t{1} << 30);

// Lets the launcher's other descendants read this process where Yama lets parents alone (ptrace_scope=1).
void let_siblings_read();

}  // namespace pycomm::transport
