// How close the interpreted, proved plan comes to loops written by hand: all_reduce(float32, sum).
//
//   build/bench_bound [--ranks 2|4] [--max BYTES]         one JSON line a size
//
// Both sides run alternately in the same processes, rank r on core r modulo the cores, on the same user pages
// and the same windows. The hand-written loops know how many ranks there are, take the buffers as they are,
// check nothing, time out never and dispatch nothing; they are the physical limit of this scheme, not a
// library. `share` is the hand-written time over ours, the median of the turns' own ratios: a turn lasts
// milliseconds, and the host may move the cores from one turn to the next.
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "runtime/select.h"
#include "runtime/sequence.h"
#include "schedule/lower.h"

// The pointers of the next loop do not overlap.
#ifdef __clang__
#define PYCOMM_BOUND_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define PYCOMM_BOUND_INDEPENDENT _Pragma("GCC ivdep")
#endif

using namespace pycomm;
using namespace pycomm::runtime;
using schedule::Placement;

namespace {

constexpr size_t kOneShotBytes = 2048;  // up to here a second meeting costs more than reading everything

double now_us() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// The hand-written side.
template <int N>
struct Hand {
  static constexpr size_t kChunk = 1 << 18;
  struct alignas(64) Flag {
    std::atomic<unsigned> value;
  };
  using Pointers = std::array<float*, N>;

  Flag* flags;
  int rank;
  bool crowded;
  std::array<char*, N> windows;  // 2 * kChunk bytes each
  unsigned epoch = 0;
  int parity = 0;

  void meet() {
    flags[rank].value.store(++epoch, std::memory_order_release);
    for (int r = 0; r < N; ++r) {
      while (static_cast<int>(flags[r].value.load(std::memory_order_acquire) - epoch) < 0) {
        crowded ? static_cast<void>(sched_yield()) : __builtin_ia32_pause();
      }
    }
  }
  // Sums all of `from`, in the order of ranks, and stores it in all of `to`.
  template <size_t M>
  static void sum(const Pointers& from, const std::array<float*, M>& to, size_t begin, size_t end) {
    PYCOMM_BOUND_INDEPENDENT
    for (size_t i = begin; i < end; ++i) {
      float s = from[0][i];
      for (int r = 1; r < N; ++r) s += from[r][i];
      for (size_t t = 0; t < M; ++t) to[t][i] = s;
    }
  }
  size_t begin_of(size_t n, int r) const { return n * r / N & ~size_t{15}; }
  size_t end_of(size_t n, int r) const { return r == N - 1 ? n : begin_of(n, r + 1); }
  Pointers shown() {
    parity ^= 1;
    Pointers all;
    for (int r = 0; r < N; ++r) all[r] = reinterpret_cast<float*>(windows[r] + parity * kChunk);
    return all;
  }

  void symmetric(const Pointers& buffers, size_t bytes) {
    meet();
    const size_t n = bytes / 4;
    sum(buffers, buffers, begin_of(n, rank), end_of(n, rank));
    meet();
  }
  // Every rank shows all and sums all.
  void one_shot(float* user, size_t bytes) {
    Pointers all = shown();
    std::memcpy(all[rank], user, bytes);
    meet();
    all[rank] = user;
    sum(all, std::array{user}, 0, bytes / 4);
  }
  // Every rank shows what others own, sums its own share and shows that.
  void two_shot(float* user, size_t bytes) {
    for (size_t at = 0; at < bytes; at += kChunk) {
      const size_t n = std::min(kChunk, bytes - at) / 4;
      Pointers all = shown();
      float* const mine = all[rank];
      float* data = user + at / 4;
      const size_t begin = begin_of(n, rank), end = end_of(n, rank);
      std::memcpy(mine, data, begin * 4);
      std::memcpy(mine + end, data + end, (n - end) * 4);
      meet();
      all[rank] = data;
      if constexpr (N == 2) {  // each into the other's window: it is read from the own core's cache
        sum(all, all, begin, end);
      } else {
        sum(all, std::array{data, mine}, begin, end);
      }
      meet();
      for (int r = 0; r < N; ++r) {
        const size_t first = begin_of(n, r), last = end_of(n, r);
        if (r != rank) std::memcpy(data + first, (N == 2 ? mine : all[r]) + first, (last - first) * 4);
      }
    }
  }
};

// Our side: what a persistent call does below the language binding.
struct Ours {
  Domain& domain;
  WaitPolicy policy;
  Sequence calls{domain};
  Patience patience;

  void operator()(const Prepared& prepared, const Buffers& buffers) {
    calls.complete(prepared, buffers, policy, 600, patience);
  }
};

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

template <int N>
int compare(size_t max_bytes) {
  const std::string address = "bound-" + std::to_string(getpid());
  const int cores = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  int pipe_fds[2];
  if (pipe(pipe_fds) != 0) return 1;
  int rank = 0;
  for (int r = 1; r < N && rank == 0; ++r) rank = fork() ? 0 : r;
  cpu_set_t cpu;
  CPU_ZERO(&cpu);
  CPU_SET(rank % cores, &cpu);
  sched_setaffinity(0, sizeof cpu, &cpu);

  auto node = transport::Node::join({.rank = rank, .size = N, .address = address, .timeout_s = 30});
  const int64_t domain_bytes = Domain::bytes(N);
  const int64_t slice = static_cast<int64_t>(max_bytes) + 4096;
  int64_t offsets[2];
  if (rank == 0) {
    offsets[0] = node->reserve(domain_bytes);
    offsets[1] = node->reserve(N * slice);
    for (int r = 1; r < N; ++r) {
      if (write(pipe_fds[1], offsets, sizeof offsets) != sizeof offsets) return 1;
    }
  } else if (read(pipe_fds[0], offsets, sizeof offsets) != sizeof offsets) {
    return 1;
  }
  std::vector<int> ranks(N);
  std::iota(ranks.begin(), ranks.end(), 0);
  Domain domain(node, ranks, rank, offsets[0]);
  auto heap = node->map(offsets[1], N * slice);
  typename Hand<N>::Pointers symmetric;
  std::array<char*, N> windows;
  for (int r = 0; r < N; ++r) {
    symmetric[r] = reinterpret_cast<float*>(heap->data() + r * slice);
    windows[r] = domain.bank(r, 0);
  }
  float* plain = static_cast<float*>(std::aligned_alloc(4096, max_bytes));
  std::fill(plain, plain + max_bytes / 4, 0.f);
  std::fill(symmetric[rank], symmetric[rank] + max_bytes / 4, 0.f);

  // The flags lie where no plan's cells do: a rank's with itself.
  auto* flags = reinterpret_cast<typename Hand<N>::Flag*>(domain.cells(0, 0, 0));
  Hand<N> hand{flags, rank, N > cores, windows};
  Ours ours{domain, wait_policy(N, cores)};
  const Geometry geometry = host_geometry(N);

  for (size_t bytes = 4; bytes <= max_bytes; bytes *= 4) {
    auto prepare = [&](Placement placement) {
      schedule::Call call{.world = {.size = N},
                          .counts = {static_cast<int64_t>(bytes / 4)},
                          .in = placement,
                          .out = placement,
                          .in_place = true};
      return Prepared(schedule::make_plan(select(call, N > cores).algorithm, call, geometry, rank), rank);
    };
    const Prepared plain_plan = prepare(Placement::plain), symmetric_plan = prepare(Placement::symmetric);
    const Buffers plain_buffers{reinterpret_cast<char*>(plain), reinterpret_cast<char*>(plain)};
    char* own = reinterpret_cast<char*>(symmetric[rank]);
    const Buffers symmetric_buffers{own, own, slice, slice};
    const std::vector<std::function<void()>> sides = {
        [&] { bytes <= kOneShotBytes ? hand.one_shot(plain, bytes) : hand.two_shot(plain, bytes); },
        [&] { ours(plain_plan, plain_buffers); }, [&] { hand.symmetric(symmetric, bytes); },
        [&] { ours(symmetric_plan, symmetric_buffers); }};
    const int calls = bytes < 65536 ? 2000 : bytes < (1u << 22) ? 100 : bytes < (1u << 26) ? 10 : 2;
    const int repeats = bytes < (1u << 24) ? 41 : 11;
    std::vector<std::vector<double>> times(sides.size());
    for (int repeat = -1; repeat < repeats; ++repeat) {
      for (size_t side = 0; side < sides.size(); ++side) {
        hand.meet();
        const double start = now_us();
        for (int i = 0; i < calls; ++i) sides[side]();
        if (repeat >= 0) times[side].push_back((now_us() - start) / calls);
      }
    }
    if (rank != 0) continue;
    const auto said = [&](const char* name, size_t by_hand, const Prepared& plan) {
      std::vector<double> ratios;
      for (int i = 0; i < repeats; ++i) ratios.push_back(times[by_hand][i] / times[by_hand + 1][i]);
      const double hand_us = median(times[by_hand]), ours_us = median(times[by_hand + 1]);
      std::printf("\"%s\": {\"hand_us\": %.3f, \"pycomm_us\": %.3f, \"share\": %.3f, \"algorithm\": \"%s\"}",
                  name, hand_us, ours_us, median(ratios), plan.plan.algorithm.c_str());
    };
    std::printf("{\"ranks\": %d, \"bytes\": %zu, ", N, bytes);
    said("plain", 0, plain_plan);
    std::printf(", ");
    said("symmetric", 2, symmetric_plan);
    std::printf("}\n");
    std::fflush(stdout);
  }
  hand.meet();
  while (rank == 0 && wait(nullptr) > 0) {
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  size_t max_bytes = 1ul << 28;
  int ranks = 2;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::string(argv[i]) == "--max") max_bytes = std::strtoull(argv[i + 1], nullptr, 10);
    if (std::string(argv[i]) == "--ranks") ranks = std::atoi(argv[i + 1]);
  }
  if (ranks != 2 && ranks != 4) return std::fprintf(stderr, "--ranks is 2 or 4\n"), 2;
  return ranks == 2 ? compare<2>(max_bytes) : compare<4>(max_bytes);
}
