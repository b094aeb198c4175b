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

constexpr int64_t kFewPages = 64;
constexpr int kSamples = 8, kSmallSamples = 2;  // an array's ends are often small

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

bool in_huge_page(const Fd& pagemap, uint64_t address) {
  const auto page = static_cast<uint64_t>(page_size());
  ScanRegion region;
  Scan scan;
  scan.start = address / page * page;
  scan.end = scan.start + page;
  scan.regions = reinterpret_cast<uint64_t>(&region);
  scan.all_of = scan.report = kIsHuge;
  return ioctl(pagemap.get(), kScan, &scan) == 1;
}

}  // namespace

Fd open_pagemap() { return Fd(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)); }

bool fit_to_read(const Fd& pagemap, const void* data, int64_t bytes) {
  if (bytes == 0) return true;
  const auto begin = reinterpret_cast<uint64_t>(data), length = static_cast<uint64_t>(bytes);
  if (bytes > kFewPages * page_size()) {
    int small = 0;
    for (uint64_t i = 0; i < kSamples && small <= kSmallSamples; ++i) {
      small += !in_huge_page(pagemap, begin + (2 * i + 1) * length / (2 * kSamples));
    }
    if (small > kSmallSamples) return false;
  }
  const auto lent = [](uint64_t address) {
    char byte;
    return read_memory(getpid(), &byte, address, 1) == 0;
  };
  return lent(begin) && lent(begin + length - 1);
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
