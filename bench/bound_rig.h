// What the bound programs share: rank processes on pinned cores, one node, windows, and turns.
#pragma once

#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "runtime/select.h"
#include "runtime/sequence.h"
#include "schedule/lower/layout.h"
#include "schedule/lower/lower.h"
#include "transport/peer_memory.h"

// The pointers of the next loop do not overlap.
#ifdef __clang__
#define PYCOMM_BOUND_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define PYCOMM_BOUND_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace pycomm::bound {

inline double now_us() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

inline double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

// The median of the ratios of the single turns: a turn lasts milliseconds, and the host may move the cores
// from one turn to the next.
inline double ratio(const std::vector<double>& over, const std::vector<double>& under) {
  std::vector<double> ratios;
  for (size_t i = 0; i < over.size(); ++i) ratios.push_back(over[i] / under[i]);
  return median(ratios);
}

// Memory as NumPy's allocator provides it: from 4 MiB on it asks for huge pages.
struct Pages {
  explicit Pages(size_t bytes)
      : data(static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096))) {
    if (bytes >= 4u << 20) madvise(data, bytes, MADV_HUGEPAGE);
    std::fill(data, data + bytes, 0);
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  ~Pages() { std::free(data); }
  float* floats() const { return reinterpret_cast<float*>(data); }
  char* data;
};

// One rank of N, in its own process, on core r modulo the number of cores.
template <int N>
class Rig {
 public:
  static constexpr size_t kChunk = 1 << 18;  // bytes of half a window
  struct alignas(64) Flag {
    std::atomic<unsigned> value;
    std::atomic<int64_t> word;
  };

  // Forks the ranks; each process continues with its own rig. `shared_bytes`: a rank's shared memory besides
  // its windows.
  static std::unique_ptr<Rig> start(int64_t shared_bytes) {
    const std::string address = "bound-" + std::to_string(getpid());
    int pipe_fds[2];
    if (pipe(pipe_fds) != 0) std::abort();
    int rank = 0;
    for (int r = 1; r < N && rank == 0; ++r) rank = fork() ? 0 : r;
    return std::unique_ptr<Rig>(new Rig(rank, address, pipe_fds, shared_bytes));
  }
  ~Rig() {
    meet();
    while (rank == 0 && ::wait(nullptr) > 0) {
    }
  }

  void meet() {
    flags[rank].value.store(++epoch_, std::memory_order_release);
    for (int r = 0; r < N; ++r) {
      while (static_cast<int>(flags[r].value.load(std::memory_order_acquire) - epoch_) < 0) {
        crowded ? static_cast<void>(sched_yield()) : __builtin_ia32_pause();
      }
    }
  }
  // This turn's half of rank r's window, after flip().
  char* window(int r) const { return windows_[r] + parity_ * kChunk; }
  void flip() { parity_ ^= 1; }
  char* shared(int r) const { return heap_->data() + r * slice; }

  // Copies from another rank's private memory through the kernel. Returns 0 or an errno.
  int read(int r, char* to, uint64_t from, size_t bytes) {
    return node_->read(r, to, from, static_cast<int64_t>(bytes));
  }

  // Does what a persistent call does below the language binding.
  void call(const runtime::Prepared& prepared, const runtime::Bases& bases) {
    calls_->complete(prepared, bases, policy_, 600, patience_);
  }
  const runtime::Profile& profile() const { return profile_; }
  runtime::Prepared prepare(const schedule::Call& call) const {
    return runtime::Prepared(
        schedule::make_plan(runtime::select(call, profile_, crowded).algorithm, call, geometry_, rank), rank);
  }

  // Microseconds per call, by side and turn. The sides run in turn.
  std::vector<std::vector<double>> times(const std::vector<std::function<void()>>& sides, size_t bytes) {
    const int calls = bytes < 65536 ? 2000 : bytes < (1u << 22) ? 100 : bytes < (1u << 26) ? 10 : 2;
    const int turns = bytes < (1u << 24) ? 41 : 11;
    std::vector<std::vector<double>> times(sides.size());
    for (int turn = -1; turn < turns; ++turn) {
      for (size_t side = 0; side < sides.size(); ++side) {
        meet();
        const double start = now_us();
        for (int i = 0; i < calls; ++i) sides[side]();
        if (turn >= 0) times[side].push_back((now_us() - start) / calls);
      }
    }
    return times;
  }

  const int rank;
  const bool crowded;
  const int64_t slice;
  Flag* flags;  // one per rank, where no plan has cells: those of a rank with itself

 private:
  Rig(int rank_, const std::string& address, const int (&pipe_fds)[2], int64_t shared_bytes)
      : rank(rank_), crowded(N > sysconf(_SC_NPROCESSORS_ONLN)), slice(shared_bytes + 4096) {
    const int cores = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
    cpu_set_t cpu;
    CPU_ZERO(&cpu);
    CPU_SET(rank % cores, &cpu);
    sched_setaffinity(0, sizeof cpu, &cpu);
    node_ = transport::Node::join({.rank = rank, .size = N, .address = address, .timeout_s = 30});
    transport::let_siblings_read(true);
    int64_t offsets[2];
    if (rank == 0) {
      offsets[0] = node_->reserve(runtime::Domain::bytes(N, N));
      offsets[1] = node_->reserve(N * slice);
      for (int r = 1; r < N; ++r) {
        if (::write(pipe_fds[1], offsets, sizeof offsets) != sizeof offsets) std::abort();
      }
    } else if (::read(pipe_fds[0], offsets, sizeof offsets) != sizeof offsets) {
      std::abort();
    }
    std::vector<int> ranks(N);
    std::iota(ranks.begin(), ranks.end(), 0);
    domain_ = std::make_unique<runtime::Domain>(node_, ranks, rank, offsets[0]);
    calls_ = std::make_unique<runtime::Sequence>(*domain_);
    heap_ = node_->map(offsets[1], N * slice);
    for (int r = 0; r < N; ++r) windows_[r] = domain_->bank(r, 0);
    flags = reinterpret_cast<Flag*>(domain_->cells(0, 0, 0));
    policy_ = runtime::wait_policy(N, cores);
  }

  std::shared_ptr<transport::Node> node_;
  std::unique_ptr<runtime::Domain> domain_;
  std::unique_ptr<runtime::Sequence> calls_;
  std::shared_ptr<transport::Mapping> heap_;
  std::array<char*, N> windows_;
  runtime::WaitPolicy policy_;
  runtime::Patience patience_;
  const runtime::Profile profile_ = runtime::built_in_profile(caches());
  const schedule::Geometry geometry_ = runtime::host_geometry(N, profile_);
  unsigned epoch_ = 0;
  int parity_ = 0;
};

}  // namespace pycomm::bound
