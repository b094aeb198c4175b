// Reading another process's memory through the kernel, and the answers when the kernel refuses.
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <vector>

#include "check.h"
#include "transport/peer_memory.h"

using namespace pycomm::transport;

namespace {

uint64_t address(const void* at) { return reinterpret_cast<uint64_t>(at); }

// A process that inherits this one's memory and sleeps.
pid_t child() {
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(30);
    for (;;) pause();
  }
  return pid;
}

void end(pid_t pid) {
  kill(pid, SIGKILL);
  while (waitpid(pid, nullptr, 0) < 0 && errno == EINTR) continue;
}

}  // namespace

TEST(reads_in_as_many_parts_as_it_takes) {
  std::vector<unsigned char> theirs(100'003), mine(theirs.size());
  std::iota(theirs.begin(), theirs.end(), 0);
  const std::vector<unsigned char> before = theirs;
  const pid_t pid = child();
  std::fill(theirs.begin(), theirs.end(), 0);  // the child's stay
  for (const int64_t most : {1, 4096, 99'999, 100'003, 1 << 30}) {
    for (const int64_t skip : {0, 1, 4097}) {
      if (most == 1 && skip > 0) continue;
      std::fill(mine.begin(), mine.end(), 0);
      const auto bytes = static_cast<int64_t>(mine.size()) - skip;
      CHECK_EQ(read_memory(pid, mine.data(), address(theirs.data() + skip), bytes, most), 0);
      CHECK(std::equal(before.begin() + skip, before.end(), mine.begin()));
    }
  }
  CHECK_EQ(read_memory(pid, nullptr, 0, 0), 0);
  end(pid);
}

// The kernel gives what comes before a hole; what follows is no answer.
TEST(memory_with_a_hole_is_an_error) {
  const size_t page = static_cast<size_t>(getpagesize());
  char* pages =
      static_cast<char*>(mmap(nullptr, 3 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  std::memset(pages, 7, 3 * page);
  munmap(pages + page, page);
  const pid_t pid = child();
  std::vector<char> mine(3 * page);
  CHECK_EQ(read_memory(pid, mine.data(), address(pages), static_cast<int64_t>(page)), 0);
  CHECK_EQ(read_memory(pid, mine.data(), address(pages), static_cast<int64_t>(3 * page)), EFAULT);
  CHECK_EQ(mine[page - 1], 7);
  CHECK_EQ(read_memory(pid, mine.data(), 0, 8), EFAULT);
  end(pid);
  munmap(pages, page);
  munmap(pages + 2 * page, page);
}

TEST(a_process_that_is_gone_is_an_error) {
  int64_t word = 1, there = 0;
  const pid_t pid = child();
  CHECK_EQ(read_memory(pid, &there, address(&word), sizeof word), 0);
  CHECK_EQ(there, 1);
  kill(pid, SIGKILL);
  siginfo_t info;
  waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOWAIT);
  CHECK_EQ(read_memory(pid, &there, address(&word), sizeof word), ESRCH);  // a zombie
  end(pid);
  CHECK_EQ(read_memory(pid, &there, address(&word), sizeof word), ESRCH);
}

TEST(a_process_reads_itself) {
  int64_t word = 5, there = 0;
  CHECK_EQ(read_memory(getpid(), &there, address(&word), sizeof word), 0);
  CHECK_EQ(there, 5);
}

TEST(inputs_in_huge_pages_are_fit) {
  constexpr size_t kBytes = size_t{16} << 20;
  const Fd pagemap = open_pagemap();
  CHECK(static_cast<bool>(pagemap));
  for (const int advice : {MADV_NOHUGEPAGE, MADV_HUGEPAGE}) {
    auto* data =
        static_cast<char*>(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    madvise(data, kBytes, advice);
    std::memset(data, 1, kBytes);
    const bool fit = fit_to_read(pagemap, data, kBytes);
    if (advice == MADV_NOHUGEPAGE) CHECK(!fit);
    if (advice == MADV_HUGEPAGE && !fit)
      std::printf("       no huge pages here, or a kernel that tells not\n");
    CHECK(fit_to_read(pagemap, data + 1, 1000));
    CHECK(fit_to_read(pagemap, nullptr, 0));
    munmap(data, kBytes);
  }
  CHECK(!fit_to_read(Fd(), &pagemap, kBytes));
}

// As memory pinned for a device is: its owner reads it, the kernel does not.
TEST(what_the_kernel_does_not_lend_is_not_fit) {
  const Fd file(static_cast<int>(syscall(SYS_memfd_secret, 0)));
  if (!file || ftruncate(file.get(), 4096) != 0) {
    std::printf("       skipped: no memfd_secret\n");
    return;
  }
  auto* data = static_cast<char*>(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0));
  CHECK(data != MAP_FAILED);
  data[0] = 1;
  CHECK(!fit_to_read(open_pagemap(), data, 100));
  munmap(data, 4096);
}
