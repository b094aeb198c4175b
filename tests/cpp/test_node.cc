// Real processes join, share memory and die. Each rank is a forked child unless a test says otherwise.
//
// Tests: transport/memory.cc, transport/rendezvous.cc.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "common/hash.h"
#include "transport/arena.h"
#include "transport/memory.h"
#include "transport/node.h"

using namespace pycomm;
using namespace pycomm::transport;
using Clock = std::chrono::steady_clock;

namespace {

constexpr int64_t kMiB = 1 << 20;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }
void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

std::string fresh_address() {
  static int counter = 0;
  return "test-" + std::to_string(getpid()) + "-" + std::to_string(counter++);
}

Node::Options options(int rank, int size, const std::string& address, double timeout_s = 30) {
  Node::Options result;
  result.rank = rank, result.size = size, result.address = address, result.timeout_s = timeout_s;
  return result;
}

// Forks a process that runs `body` and exits with 1 if a check failed or an exception escaped.
pid_t spawn(const std::function<void()>& body) {
  const pid_t pid = fork();
  if (pid) return pid;
  check::failures = 0;
  try {
    body();
  } catch (const std::exception& error) {
    check::fail("child", 0, error.what());
  }
  _exit(check::failures != 0);
}

int wait_for(pid_t pid) {
  int status = -1;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) continue;
  return status;
}

void kill_and_wait(pid_t pid) {
  kill(pid, SIGKILL);
  wait_for(pid);
}

void run_ranks(int size, const std::function<void(int rank)>& body) {
  std::vector<pid_t> pids;
  for (int rank = 0; rank < size; ++rank) pids.push_back(spawn([&] { body(rank); }));
  for (const pid_t pid : pids) CHECK_EQ(wait_for(pid), 0);
}

template <class Error>
std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  } catch (const std::exception& error) {
    return std::string("another exception: ") + typeid(error).name() + ": " + error.what();
  }
  return "no exception";
}

template <class Error>
std::string join_error(const Node::Options& options) {
  return error_of<Error>([&] { Node::join(options); });
}

#define CHECK_CONTAINS(text, part)                                                        \
  do {                                                                                    \
    const std::string text_ = (text);                                                     \
    if (text_.find(part) == std::string::npos)                                            \
      check::fail(__FILE__, __LINE__, "'" + std::string(part) + "' is not in: " + text_); \
  } while (false)

std::string socket_name(const std::string& address) {
  char name[64];
  std::snprintf(name, sizeof name, "pycomm-%016llx",
                static_cast<unsigned long long>(Hasher().add(address).add(geteuid()).digest()));
  return name;
}

bool socket_exists(const std::string& address) {
  std::ifstream sockets("/proc/net/unix");
  const std::string name = "@" + socket_name(address);
  for (std::string line; std::getline(sockets, line);)
    if (line.find(name) != std::string::npos) return true;
  return false;
}

void wait_for_socket(const std::string& address) {
  const auto start = Clock::now();
  while (!socket_exists(address) && since(start) < 10) sleep_ms(1);
}

std::vector<std::pair<int, std::string>> open_files() {
  std::vector<std::pair<int, std::string>> files;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    const auto target = std::filesystem::read_symlink(entry.path(), gone);
    if (!gone) files.emplace_back(std::stoi(entry.path().filename()), target.string());
  }
  return files;
}

int64_t memory_blocks() {  // of all memory files that this process has open
  int64_t blocks = 0;
  for (const auto& [fd, target] : open_files()) {
    struct stat info;
    if (target.starts_with("/memfd:pycomm") && fstat(fd, &info) == 0) blocks += info.st_blocks;
  }
  return blocks;
}

// Test words on the root page.
std::atomic<int64_t>& word(Node& node, int index) {
  return reinterpret_cast<std::atomic<int64_t>*>(node.root_page() + 64)[index];
}

void barrier(Node& node, int index) {
  word(node, index).fetch_add(1);
  while (word(node, index).load() < node.size()) std::this_thread::yield();
}

void share_memory(Node& node) {
  const int rank = node.rank(), size = node.size();
  constexpr int64_t kBytes = 4 * kMiB + 12345;
  word(node, 10 + rank) = getpid();
  if (rank == size - 1) word(node, 0) = node.reserve(kBytes);
  barrier(node, 1);
  const auto mapping = node.map(word(node, 0), kBytes);
  CHECK(mapping->bytes() >= kBytes);
  char* mine = mapping->data() + kBytes - 1 - rank;
  CHECK_EQ(*mine, 0);
  *mine = static_cast<char>(rank + 1);
  barrier(node, 2);
  for (int peer = 0; peer < size; ++peer) {
    CHECK_EQ(mapping->data()[kBytes - 1 - peer], peer + 1);
    CHECK_EQ(node.pid_of(peer), word(node, 10 + peer).load());
  }
  barrier(node, 3);
}

}  // namespace

TEST(ranks_join_and_share_memory) {
  for (const int size : {1, 2, 4, 17}) {
    const std::string address = fresh_address();
    run_ranks(size, [&](int rank) {
      Arena::of_process();  // which stays
      const size_t files_before = open_files().size();
      {
        const auto node = Node::join(options(rank, size, address));
        CHECK_EQ(node->rank(), rank);
        CHECK_EQ(node->size(), size);
        CHECK(!node->threads());
        share_memory(*node);
        for (const auto& [fd, target] : open_files()) {
          CHECK(!target.starts_with("socket:"));
          if (target.starts_with("/memfd:pycomm") || target.starts_with("anon_inode:[pidfd]") ||
              target.starts_with("pidfd:"))
            CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
        }
        // pagemap, the memory, the others' pidfds and arenas
        CHECK_EQ(open_files().size(), files_before + 2 + 2 * (size - 1));
      }
      CHECK_EQ(open_files().size(), files_before);
    });
    CHECK(!socket_exists(address));
  }
}

TEST(one_address_serves_one_join_after_another) {
  const std::string address = fresh_address();
  run_ranks(3, [&](int rank) {
    for (int round = 0; round < 20; ++round) {
      const auto node = Node::join(options(rank, 3, address));
      barrier(*node, 0);
      barrier(*node, 1);
    }
  });
}

TEST(jobs_with_different_addresses_do_not_meet) {
  const std::string address[] = {fresh_address(), fresh_address()};
  run_ranks(6, [&](int who) {
    const int job = who % 2;
    const auto node = Node::join(options(who / 2, 3, address[job]));
    word(*node, 5).fetch_add(job + 1);
    barrier(*node, 0);
    CHECK_EQ(word(*node, 5).load(), 3 * (job + 1));
    barrier(*node, 1);
  });
}

TEST(signals_do_not_disturb) {
  const std::string address = fresh_address();
  run_ranks(3, [&](int rank) {
    struct sigaction action{};
    action.sa_handler = [](int) {};  // no SA_RESTART
    sigaction(SIGALRM, &action, nullptr);
    const itimerval often{{0, 1000}, {0, 1000}};
    setitimer(ITIMER_REAL, &often, nullptr);
    if (rank == 2) sleep_ms(100);  // the others wait
    const auto node = Node::join(options(rank, 3, address));
    const int64_t offset = node->reserve(200 * kMiB);
    node->release(offset, 200 * kMiB);
    share_memory(*node);
  });
}

// ---- ranks that do not come, or do not fit ----

TEST(a_missing_rank_is_named_in_time) {
  const std::string address = fresh_address();
  run_ranks(2, [&](int rank) {
    const auto start = Clock::now();
    CHECK_CONTAINS(join_error<CommTimeoutError>(options(rank, 4, address, 0.4)),
                   "ranks 2, 3 of 4 did not join");
    CHECK(since(start) > 0.3 && since(start) < 1.4);
  });
  CHECK(!socket_exists(address));
}

TEST(without_rank_0_the_others_say_so) {
  const auto start = Clock::now();
  CHECK_CONTAINS(join_error<CommTimeoutError>(options(1, 2, fresh_address(), 0.2)), "rank 0 did not come");
  CHECK(since(start) > 0.15 && since(start) < 1.2);
}

TEST(the_earliest_deadline_is_everybodys) {
  const std::string address = fresh_address();
  run_ranks(2, [&](int rank) {
    const auto start = Clock::now();
    CHECK_CONTAINS(join_error<CommTimeoutError>(options(rank, 3, address, rank == 0 ? 60 : 0.3)),
                   "rank 2 of 3");
    CHECK(since(start) < 1.3);
  });
}

TEST(a_stopped_rank_0_is_named) {
  const std::string address = fresh_address();
  const pid_t host = spawn([&] { Node::join(options(0, 3, address)); });
  wait_for_socket(address);
  kill(host, SIGSTOP);
  CHECK_CONTAINS(join_error<CommTimeoutError>(options(1, 3, address, 0.2)),
                 "rank 0 (pid " + std::to_string(host) + ")");
  kill_and_wait(host);
}

TEST(two_processes_with_one_rank) {
  for (const std::vector<int>& ranks : {std::vector{0, 0}, std::vector{0, 1, 1}}) {
    const std::string address = fresh_address();
    std::vector<pid_t> pids;
    for (const int rank : ranks) {
      pids.push_back(spawn([&] {
        CHECK_CONTAINS(join_error<ValueError>(options(rank, 4, address)),
                       "two processes say that they are rank " + std::to_string(ranks.back()));
      }));
      if (pids.size() == 1) wait_for_socket(address);
    }
    for (const pid_t pid : pids) CHECK_EQ(wait_for(pid), 0);
  }
}

TEST(different_sizes) {
  const std::string address = fresh_address();
  run_ranks(2, [&](int rank) {
    CHECK_CONTAINS(join_error<ValueError>(options(rank, 2 + rank, address)),
                   "there are 3 ranks, rank 0 says 2");
  });
}

TEST(bad_options) {
  CHECK_CONTAINS(join_error<ValueError>(options(2, 2, "x")), "rank 2 of 2");
  CHECK_CONTAINS(join_error<ValueError>(options(-1, 2, "x")), "rank -1 of 2");
  CHECK_CONTAINS(join_error<ValueError>(options(0, 0, "x")), "rank 0 of 0");
  CHECK_CONTAINS(join_error<ValueError>(options(0, 2, "")), "address");
  CHECK_CONTAINS(join_error<ValueError>(options(0, 2, "x", 0)), "timeout");
  CHECK_THROWS(ValueError, Node::local(0));
}

TEST(on_wait_may_end_the_join) {
  struct Interrupt : std::runtime_error {
    using std::runtime_error::runtime_error;
  };
  for (const int interrupted : {0, 1}) {
    const std::string address = fresh_address();
    run_ranks(2, [&](int rank) {
      auto mine = options(rank, 3, address);
      const auto start = Clock::now();
      if (rank == interrupted) {
        mine.on_wait = [&] {
          if (since(start) > 0.3) throw Interrupt("Ctrl-C");
        };
        CHECK_EQ(join_error<Interrupt>(mine), "Ctrl-C");
      } else {
        CHECK_CONTAINS(join_error<CommError>(mine), interrupted == 0 ? "Ctrl-C" : "rank 1");
      }
      CHECK(since(start) < 2);
    });
  }
}

// ---- deaths ----

TEST(a_rank_killed_while_joining_is_named_at_once) {
  for (const int victim : {0, 1}) {
    const std::string address = fresh_address();
    const pid_t ranks[] = {
        spawn([&] {
          const std::string lost = join_error<PeerLostError>(options(0, 4, address));
          CHECK_CONTAINS(lost, "rank 1");
          CHECK_CONTAINS(lost, "ended");
        }),
        spawn([&] { CHECK_CONTAINS(join_error<PeerLostError>(options(1, 4, address)), "rank 0"); })};
    const pid_t witness = spawn([&] {
      CHECK_CONTAINS(join_error<PeerLostError>(options(2, 4, address)), "rank " + std::to_string(victim));
    });
    wait_for_socket(address);
    sleep_ms(300);
    const auto start = Clock::now();
    kill_and_wait(ranks[victim]);
    CHECK_EQ(wait_for(witness), 0);
    CHECK_EQ(wait_for(ranks[1 - victim]), 0);
    CHECK(since(start) < 1);
    CHECK(!socket_exists(address));
  }
}

TEST(a_death_is_noticed) {
  std::vector<double> delays;
  for (int round = 0; round < 9; ++round) {
    const std::string address = fresh_address();
    pid_t pids[3] = {};
    for (const int rank : {1, 2})
      pids[rank] = spawn([&] {
        const auto node = Node::join(options(rank, 3, address));
        if (rank == 2) {  // a worker that inherits all descriptors does not hide it
          const pid_t worker = fork();
          if (worker == 0)
            while (true) pause();
          word(*node, 0) = worker;
        }
        while (true) pause();
      });
    const auto node = Node::join(options(0, 3, address));
    while (word(*node, 0) == 0) std::this_thread::yield();
    CHECK(!node->any_dead());
    for (const int rank : {0, 1, 2}) CHECK(!node->dead(rank));
    for (const int victim : {2, 1}) {
      const auto start = Clock::now();
      kill(pids[victim], SIGKILL);
      while (!node->dead(victim) && since(start) < 5) std::this_thread::yield();
      delays.push_back(since(start));
      CHECK_EQ(node->any_dead().value_or(-1), victim);  // before anybody waits for it, and the lowest one
    }
    kill(static_cast<pid_t>(word(*node, 0)), SIGKILL);
    for (const int rank : {1, 2}) wait_for(pids[rank]);
    CHECK(node->dead(1) && node->dead(2) && !node->dead(0));
  }
  std::sort(delays.begin(), delays.end());
  std::printf("       a death is seen after %.2f ms (median), %.2f ms (worst)\n",
              delays[delays.size() / 2] * 1e3, delays.back() * 1e3);
  CHECK(delays[delays.size() / 2] < 0.05);
  CHECK(delays.back() < 1);
}

TEST(a_clean_exit_is_an_end_too) {
  const std::string address = fresh_address();
  const pid_t pid = spawn([&] { Node::join(options(1, 2, address)); });
  const auto node = Node::join(options(0, 2, address));
  CHECK_EQ(wait_for(pid), 0);
  CHECK(node->dead(1));
}

// ---- strangers ----

TEST(strangers_are_turned_away) {
  if (geteuid() != 0) {
    std::printf("       skipped: only root can make a process of another user\n");
    return;
  }
  const std::string address = fresh_address();
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  const std::string text = socket_name(address);
  text.copy(name.sun_path + 1, text.size());
  const socklen_t bytes = offsetof(sockaddr_un, sun_path) + 1 + text.size();
  const auto stranger = [&](auto body) {
    return spawn([&] {
      CHECK_EQ(setgid(65534), 0);
      CHECK_EQ(setuid(65534), 0);
      body(socket(AF_UNIX, SOCK_SEQPACKET, 0), reinterpret_cast<sockaddr*>(&name));
    });
  };

  // One that holds the name.
  const pid_t holder = stranger([&](int fd, sockaddr* where) {
    CHECK_EQ(bind(fd, where, bytes), 0);
    listen(fd, 10);
    while (true) pause();
  });
  wait_for_socket(address);
  sleep_ms(50);
  run_ranks(2,
            [&](int rank) { CHECK_CONTAINS(join_error<CommError>(options(rank, 2, address)), "uid 65534"); });
  kill_and_wait(holder);

  // One that knocks: the join goes on without it.
  const pid_t host = spawn([&] { Node::join(options(0, 2, address)); });
  wait_for_socket(address);
  const pid_t guest = stranger([&](int fd, sockaddr* where) {
    CHECK_EQ(connect(fd, where, bytes), 0);
    char byte;
    CHECK_EQ(recv(fd, &byte, 1, 0), 0);
  });
  CHECK_EQ(wait_for(guest), 0);
  Node::join(options(1, 2, address));
  CHECK_EQ(wait_for(host), 0);
}

TEST(noise_on_the_socket_is_ignored) {
  const std::string address = fresh_address();
  const pid_t host = spawn([&] { Node::join(options(0, 2, address)); });
  wait_for_socket(address);
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  const std::string text = socket_name(address);
  text.copy(name.sun_path + 1, text.size());
  const int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
  CHECK_EQ(connect(fd, reinterpret_cast<sockaddr*>(&name), offsetof(sockaddr_un, sun_path) + 1 + text.size()),
           0);
  CHECK_EQ(send(fd, "hello", 5, 0), 5);
  char byte;
  CHECK(recv(fd, &byte, 1, 0) <= 0);
  close(fd);
  Node::join(options(1, 2, address));
  CHECK_EQ(wait_for(host), 0);
}

// ---- memory ----

TEST(reserve_takes_pages_and_release_gives_them_back) {
  const auto node = Node::join(options(0, 1, ""));
  const int64_t before = memory_blocks();
  for (const int64_t bytes : {int64_t{1}, 100 * int64_t{1000}, 2 * kMiB, 64 * kMiB + 1, 70 * kMiB}) {
    const int64_t offset = node->reserve(bytes);
    CHECK((memory_blocks() - before) * 512 >= bytes);  // st_blocks counts 512 bytes
    const auto mapping = node->map(offset, bytes);
    mapping->data()[bytes - 1] = 7;
    node->release(offset, bytes);
    CHECK_EQ(memory_blocks(), before);
    CHECK_EQ(mapping->data()[bytes - 1], 0);
    node->release(offset, bytes);  // the page just read
    CHECK_EQ(memory_blocks(), before);
  }
  CHECK_THROWS(ValueError, node->reserve(0));
  CHECK_THROWS(ValueError, node->map(0, -1));
}

TEST(pages_come_by_faults_as_well) {
  const Fd memory = create_memory();
  const int64_t offset = 6 * kMiB, bytes = 70 * kMiB + page_size();
  for (const bool by_faults : {false, true}) {
    CHECK_EQ(memory_blocks(), 0);
    populate(memory.get(), offset, bytes, by_faults);
    CHECK(memory_blocks() * 512 >= bytes);
    CHECK_THROWS(OutOfMemoryError, populate(memory.get(), offset, int64_t{1} << 45, by_faults));
    punch(memory.get(), offset, bytes);
  }
  CHECK_EQ(memory_blocks(), 0);
}

TEST(what_is_not_there_is_refused_and_nothing_kept) {
  const auto node = Node::join(options(0, 1, ""));
  const int64_t before = memory_blocks();
  std::string text = error_of<OutOfMemoryError>([&] { node->reserve(int64_t{1} << 50); });
  CHECK_CONTAINS(text, "1125899906842624 bytes");
  CHECK_CONTAINS(text, "MiB are left by");
  text = error_of<OutOfMemoryError>([&] { node->reserve(available_memory().bytes + 1024 * kMiB); });
  CHECK_CONTAINS(text, "MiB are left by");
  CHECK_THROWS(OutOfMemoryError, node->reserve(std::numeric_limits<int64_t>::max()));
  CHECK_EQ(memory_blocks(), before);
  node->release(node->reserve(kMiB), kMiB);  // and it still works
}

TEST(extents_of_all_ranks_are_disjoint) {
  const std::string address = fresh_address();
  constexpr int kEach = 40, kSize = 4;
  run_ranks(kSize, [&](int rank) {
    const auto node = Node::join(options(rank, kSize, address));
    const auto bytes_of = [](int i) { return i % 8 == 7 ? 3 * kMiB + i : int64_t{1000} * (i + 1); };
    std::vector<std::shared_ptr<Mapping>> mappings;
    for (int i = 0; i < kEach; ++i) {
      mappings.push_back(node->map(node->reserve(bytes_of(i)), bytes_of(i)));
      for (int64_t at = 0; at < bytes_of(i); ++at) mappings[i]->data()[at] += static_cast<char>(rank + 1);
    }
    barrier(*node, 0);
    for (int i = 0; i < kEach; ++i)
      CHECK(std::all_of(mappings[i]->data(), mappings[i]->data() + bytes_of(i),
                        [&](char c) { return c == static_cast<char>(rank + 1); }));
    barrier(*node, 1);
  });
}

TEST(large_extents_are_aligned_to_huge_pages) {
  const auto node = Node::local(1)[0];
  node->reserve(1);
  const int64_t offset = node->reserve(5 * kMiB);
  CHECK_EQ(offset % kHugePage, 0);
  CHECK_EQ(reinterpret_cast<intptr_t>(node->map(offset, 5 * kMiB)->data()) % kHugePage, 0);
}

// ---- limits, from made-up control groups ----

TEST(the_tightest_limit_counts) {
  char pattern[] = "/tmp/test_node.XXXXXX";
  const std::string root = mkdtemp(pattern);
  const auto write = [&](const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root + path).parent_path());
    std::ofstream(root + path) << text;
  };
  write("/proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n");
  CHECK_EQ(available_memory(root).bytes, 5000 * 1024);
  CHECK_CONTAINS(available_memory(root).where, "MemAvailable");

  write("/proc/self/cgroup", "3:cpu,cpuacct:/a\n4:memory:/a/b\n0::/c/d\n");
  write("/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "9223372036854771712\n");
  write("/sys/fs/cgroup/memory/a/b/memory.usage_in_bytes", "1000\n");
  CHECK_EQ(available_memory(root).bytes, 5000 * 1024);
  write("/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "4000000\n");  // the parent's
  write("/sys/fs/cgroup/memory/a/memory.usage_in_bytes", "1000000\n");
  CHECK_EQ(available_memory(root).bytes, 3000000);
  write("/sys/fs/cgroup/memory/a/memory.stat", "total_inactive_file 100\ntotal_active_file 20\nother 7\n");
  CHECK_EQ(available_memory(root).bytes, 3000120);  // cache can be given up

  write("/sys/fs/cgroup/c/d/memory.max", "max\n");
  write("/sys/fs/cgroup/c/d/memory.current", "1000\n");
  CHECK_EQ(available_memory(root).bytes, 3000120);
  write("/sys/fs/cgroup/c/d/memory.max", "2000000\n");
  write("/sys/fs/cgroup/c/d/memory.stat", "anon 5\ninactive_file 30\nactive_file 6\n");
  CHECK_EQ(available_memory(root).bytes, 1999036);
  CHECK_CONTAINS(available_memory(root).where, "/c/d/memory.max");

  // A container: the path is the host's, its own group is the mount's root.
  write("/proc/self/cgroup", "0::/host/only\n");
  write("/sys/fs/cgroup/memory.max", "500\n");
  write("/sys/fs/cgroup/memory.current", "600\n");
  CHECK_EQ(available_memory(root).bytes, 0);
  std::filesystem::remove_all(root);
}

// ---- fork, threads ----

TEST(a_forked_child_knows_and_does_no_harm) {
  const uint64_t before = fork_generation();
  CHECK(!forked_since(before));
  const auto node = Node::local(1)[0];
  auto mapping = node->map(node->reserve(kMiB), kMiB);
  char* const data = mapping->data();
  const pid_t child = spawn([&] {
    CHECK(forked_since(before));
    // Nothing is mapped there, so that something else may be; the mapping's end must not tear it down.
    void* other =
        mmap(data, kMiB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    CHECK(other == data);
    data[0] = 3;
    mapping.reset();
    CHECK_EQ(mprotect(data, kMiB, PROT_READ), 0);  // fails if it is not mapped
  });
  CHECK_EQ(wait_for(child), 0);
  CHECK(!forked_since(before));
  CHECK_EQ(data[0], 0);
}

TEST(rank_threads) {
  const auto nodes = Node::local(4);
  std::vector<std::thread> threads;
  for (const auto& node : nodes)
    threads.emplace_back([&node] {
      CHECK(node->threads());
      share_memory(*node);
      CHECK(!node->any_dead());
      barrier(*node, 4);
      if (node->rank() >= 2) node->mark_dead(node->rank());
      while (!node->dead(3) || !node->dead(2)) std::this_thread::yield();
      CHECK(!node->dead(0));
      CHECK_EQ(node->any_dead().value_or(-1), 2);
    });
  for (auto& thread : threads) thread.join();
}

TEST(root_extent_is_there_when_ranks_have_met) {
  const std::string address = fresh_address();
  run_ranks(3, [&](int rank) {
    Node::Options mine = options(rank, 3, address);
    mine.root_bytes = kMiB;
    const auto node = Node::join(mine);
    CHECK(node->root_extent() > 0);
    const auto mapping = node->map(node->root_extent(), kMiB);
    CHECK_EQ(mapping->data()[kMiB - 1], 0);
  });
  CHECK_EQ(Node::join(options(0, 1, ""))->root_extent(), 0);
}

TEST(all_ranks_hear_that_there_is_no_space_for_the_root_extent) {
  const std::string address = fresh_address();
  run_ranks(3, [&](int rank) {
    Node::Options mine = options(rank, 3, address);
    mine.root_bytes = int64_t{1} << 50;
    if (rank == 0) {
      CHECK_CONTAINS(join_error<OutOfMemoryError>(mine), std::to_string(int64_t{1} << 50));
    } else {
      const auto node = Node::join(mine);
      CHECK_CONTAINS(error_of<OutOfMemoryError>([&] { (void)node->root_extent(); }), "rank 0 could not");
    }
  });
}

TEST(rank_threads_may_be_on_made_up_nodes) {
  const auto nodes = Node::local(4, {.nodes = {5, 2, 5, 2}, .delays = std::nullopt});
  CHECK((nodes[0]->nodes_of({0, 1, 2, 3}) == std::vector<int>{0, 1, 0, 1}));
  CHECK((nodes[0]->nodes_of({3, 2}) == std::vector<int>{0, 1}));
  CHECK(nodes[0]->nodes_of({1, 3}).empty());
  CHECK(nodes[1]->open_messages(1, {1, 3}, 0) == nullptr);
  CHECK(nodes[1]->open_messages(1, {1, 2}, 0) != nullptr);
  CHECK(Node::local(2)[0]->nodes_of({0, 1}).empty());
  CHECK_THROWS(ValueError, Node::local(3, {.nodes = {0, 1}, .delays = std::nullopt}));
  // Each node has memory of its own; deaths are told everywhere.
  const int64_t offset = nodes[0]->reserve(kMiB);
  CHECK_EQ(nodes[1]->reserve(kMiB), offset);
  const auto here = nodes[0]->map(offset, kMiB), near = nodes[2]->map(offset, kMiB),
             far = nodes[1]->map(offset, kMiB);
  here->data()[5] = 7;
  CHECK_EQ(near->data()[5], 7);
  CHECK_EQ(far->data()[5], 0);
  nodes[0]->mark_dead(0);
  CHECK(nodes[1]->dead(0) && nodes[2]->dead(0));
}
