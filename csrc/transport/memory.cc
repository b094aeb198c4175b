#include "transport/memory.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>

#include "common/error.h"

#ifndef MADV_POPULATE_WRITE  // Linux 5.14
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MFD_NOEXEC_SEAL  // Linux 6.3
#define MFD_NOEXEC_SEAL 8U
#endif

namespace pycomm::transport {
namespace {

// Left to the rest of the machine, and for page tables: ranks that map an extent need 1/512 of it each.
constexpr int64_t kMargin = int64_t{64} << 20;
constexpr int64_t kStep = int64_t{64} << 20;  // taken between two looks; not more than the margin

int64_t margin(int64_t bytes) { return kMargin + bytes / 64; }

std::string mebibytes(int64_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

std::optional<int64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  int64_t number;
  if (file >> number) return number;  // "max" is no number: no limit
  return std::nullopt;
}

// The value behind `key` in a file of lines "key value".
std::optional<int64_t> read_field(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string word;
    int64_t number;
    if (words >> word >> number && word == key) return number;
  }
  return std::nullopt;
}

struct Hierarchy {
  const char* mount;
  const char *limit, *usage, *inactive_cache, *active_cache;
};
constexpr Hierarchy kVersion1 = {"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                                 "total_inactive_file", "total_active_file"};
constexpr Hierarchy kVersion2 = {"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file",
                                 "active_file"};
constexpr Hierarchy kHybrid = {"/sys/fs/cgroup/unified", "memory.max", "memory.current", "inactive_file",
                               "active_file"};

// Walks from a control group up to the root. In a container the path may be the host's and the first levels
// absent; the mount's root is then the container's own group.
void apply_limits(const std::string& root, const Hierarchy& files, std::string group, Available* least) {
  while (true) {
    const std::string directory = root + files.mount + group + "/";
    const auto limit = read_number(directory + files.limit);
    const auto usage = read_number(directory + files.usage);
    if (limit && usage) {
      const std::string stat = directory + "memory.stat";
      const int64_t cache = read_field(stat, files.inactive_cache).value_or(0) +
                            read_field(stat, files.active_cache).value_or(0);
      const int64_t left = std::max<int64_t>(0, *limit - std::max<int64_t>(0, *usage - cache));
      if (left < least->bytes) *least = {left, "the control group's limit " + directory + files.limit};
    }
    const size_t slash = group.rfind('/');
    if (slash == std::string::npos) return;
    group.resize(slash);
  }
}

[[noreturn]] void refuse(int64_t bytes, const std::string& why) {
  throw OutOfMemoryError(
      "pycomm needs " + mebibytes(bytes) + " (" + std::to_string(bytes) + " bytes) of shared memory: " + why +
      ". Use smaller or fewer symmetric buffers, or fewer ranks on this machine, or raise the limit");
}

void require_rest(int64_t asked, int64_t rest) {
  const Available available = available_memory();
  if (rest > available.bytes - margin(rest))
    refuse(asked, mebibytes(available.bytes) + " are left by " + available.where +
                      ", and a margin of 64 MiB and 1/64 is kept for page tables and the rest of the system");
}

// fallocate starts over when a signal comes; with a profiler's timer it would never end.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace

int64_t page_size() {
  static const int64_t size = sysconf(_SC_PAGESIZE);
  return size;
}

Fd create_memory() {
  Fd fd(memfd_create("pycomm", MFD_CLOEXEC | MFD_NOEXEC_SEAL));
  if (!fd) fd = Fd(memfd_create("pycomm", MFD_CLOEXEC));
  if (!fd) throw CommError("pycomm cannot create shared memory (memfd_create): " + reason());
  rlimit limit{};
  getrlimit(RLIMIT_FSIZE, &limit);  // beyond it ftruncate would raise SIGXFSZ
  constexpr rlim_t kEndless = rlim_t{1} << 60;
  if (ftruncate(fd.get(), static_cast<int64_t>(std::min(limit.rlim_cur, kEndless))))
    throw CommError("pycomm cannot size its shared memory: " + reason());
  return fd;
}

Available available_memory(const std::string& root) {
  Available least{std::numeric_limits<int64_t>::max(), "the system"};
  if (const auto kilobytes = read_field(root + "/proc/meminfo", "MemAvailable:"))
    least = {*kilobytes * 1024, "the machine (MemAvailable)"};
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // hierarchy:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string group = line.substr(second + 1);
    if (controllers == ",,") {
      apply_limits(root, kVersion2, group, &least);
      apply_limits(root, kHybrid, group, &least);
    } else if (controllers.find(",memory,") != std::string::npos) {
      apply_limits(root, kVersion1, group, &least);
    }
  }
  return least;
}

int64_t spare_memory() {
  const int64_t available = available_memory().bytes;
  return available - margin(std::max<int64_t>(available, 0));
}

void require_available(int64_t bytes) { require_rest(bytes, bytes); }

bool huge_by_advice() {
  static constexpr const char* kSettings[] = {
      "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
      "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled"};  // Linux 6.12; "inherit" is the
                                                                              // first's
  return std::ranges::any_of(kSettings, [](const char* path) {
    std::ifstream file(path);
    std::string setting;
    return std::getline(file, setting) && setting.find("[advise]") != std::string::npos;
  });
}

bool back_extent(int fd, char* data, int64_t offset, int64_t bytes) {
  const SignalsBlocked blocked;
  if (data && madvise(data, bytes, MADV_POPULATE_WRITE) == 0) return true;  // Linux 5.14
  if (data && errno != EINVAL) return false;
  return fallocate(fd, 0, offset, bytes) == 0;
}

void populate(int fd, int64_t offset, int64_t bytes, bool by_faults) {
  char* data = by_faults ? map_extent(fd, offset, bytes, false) : nullptr;
  const auto unmap = [&] {
    if (data) munmap(data, bytes);
  };
  try {
    for (int64_t done = 0; done < bytes; done += kStep) {
      require_rest(bytes, bytes - done);  // others take memory at the same time
      if (!back_extent(fd, data ? data + done : nullptr, offset + done, std::min(kStep, bytes - done)))
        refuse(bytes, "the system gave " + mebibytes(done) + " and then said: " + reason());
    }
  } catch (...) {
    unmap();
    punch(fd, offset, bytes);
    throw;
  }
  unmap();
}

char* map_extent(int fd, int64_t offset, int64_t bytes, bool prefault) {
  // A huge page can be mapped as one only where address and offset agree modulo its size.
  const int64_t unit = extent_unit(bytes);
  const int64_t slack = unit - page_size();
  void* area = mmap(nullptr, bytes + slack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (area == MAP_FAILED)
    refuse(bytes, "mapping it failed: " + reason() + " (is the address space limited, ulimit -v?)");
  char* start = static_cast<char*>(area);
  char* end = start + bytes + slack;
  char* data = start + (unit + offset % unit - reinterpret_cast<intptr_t>(start) % unit) % unit;
  if (mmap(data, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, offset) == MAP_FAILED) {
    const std::string why = reason();
    munmap(start, bytes + slack);
    refuse(bytes, "mapping it failed: " + why);
  }
  if (data > start) munmap(start, data - start);
  if (end > data + bytes) munmap(data + bytes, end - (data + bytes));
  madvise(data, bytes, MADV_DONTFORK);
  if (unit == kHugePage) madvise(data, bytes, MADV_HUGEPAGE);  // advice: may be unknown to the kernel
  if (prefault) madvise(data, bytes, MADV_POPULATE_WRITE);  // so may this: pages are then mapped as touched
  return data;
}

void punch(int fd, int64_t offset, int64_t bytes) {
  while (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, bytes) && errno == EINTR) continue;
}

}  // namespace pycomm::transport
