#include "transport/peer_memory.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "transport/memory.h"

namespace pycomm::transport {
namespace {

constexpr uint64_t kFewPages = 64;

// Of linux/fs.h, newer than the headers that we build with: PAGEMAP_SCAN.
struct ScanRegion {
  uint64_t start = 0, end = 0, categories = 0;
};
struct Scan {
  uint64_t size = sizeof(Scan), flags = 0, start = 0, end = 0, walk_end = 0, regions = 0, num_regions = 1;
  uint64_t max_pages = 0, inverted = 0, all_of = 0, any_of = 0, report = 0;
};
constexpr uint64_t kIsHuge = 1 << 6;
constexpr unsigned long kScan = _IOWR('f', 16, Scan);

// Of [begin, end), the first row of huge pages.
uint64_t bytes_in_huge_pages(const Fd& pagemap, uint64_t begin, uint64_t end) {
  ScanRegion found;
  Scan scan;
  scan.start = begin;
  scan.end = end;
  scan.regions = reinterpret_cast<uint64_t>(&found);
  scan.all_of = scan.report = kIsHuge;
  return ioctl(pagemap.get(), kScan, &scan) == 1 ? found.end - found.start : 0;
}

}  // namespace

Fd open_pagemap() { return Fd(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)); }

bool fit_to_read(const Fd& pagemap, const void* data, int64_t bytes) {
  if (bytes == 0) return true;
  const auto page = static_cast<uint64_t>(page_size()), length = static_cast<uint64_t>(bytes);
  const auto first = reinterpret_cast<uint64_t>(data), last = first + length - 1;
  if (length > kFewPages * page) {
    const uint64_t huge = bytes_in_huge_pages(pagemap, first / page * page, (last / page + 1) * page);
    if (huge < length / 4) return false;
  }
  char ends[2];
  const iovec local{ends, 2};
  const iovec lent[2] = {{reinterpret_cast<void*>(first), 1}, {reinterpret_cast<void*>(last), 1}};
  return process_vm_readv(getpid(), &local, 1, lent, 2, 0) == 2;
}

int read_memory(int64_t pid, void* to, uint64_t from, int64_t bytes, int64_t most) {
  for (int64_t done = 0; done < bytes;) {
    const auto length = static_cast<size_t>(std::min(bytes - done, most));
    const iovec local{static_cast<char*>(to) + done, length};
    const iovec remote{reinterpret_cast<void*>(from + static_cast<uint64_t>(done)), length};
    const ssize_t got = process_vm_readv(static_cast<pid_t>(pid), &local, 1, &remote, 1, 0);
    if (got > 0) {
      done += got;
    } else if (got == 0) {
      return EFAULT;
    } else if (errno != EINTR) {
      return errno;
    }
  }
  return 0;
}

void let_siblings_read(bool yes) { prctl(PR_SET_PTRACER, yes ? getppid() : 0, 0, 0, 0); }

}  // namespace pycomm::transport
