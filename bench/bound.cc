// How close the interpreted, proved plan comes to loops written by hand for two ranks: all_reduce(float32,
// sum).
//
//   build/bench_bound [--max BYTES]         one JSON line a size
//
// Both sides run alternately in the same pair of pinned processes, on the same user pages and the same
// windows. The hand-written loops know that there are two ranks, take the buffers as they are, check nothing,
// time out never and dispatch nothing; they are the physical limit of this scheme, not a library.
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "runtime/select.h"
#include "runtime/sequence.h"
#include "schedule/lower.h"

using namespace pycomm;
using namespace pycomm::runtime;
using schedule::Placement;

namespace {

double now_us() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// The hand-written side.
struct Hand {
  static constexpr size_t kChunk = 1 << 18;
  struct alignas(64) Flag {
    std::atomic<unsigned> value;
  };
  Flag* flags;
  int rank;
  char* windows[2];  // 2 * kChunk bytes each
  unsigned epoch = 0;

  void meet() {
    flags[rank].value.store(++epoch, std::memory_order_release);
    while (static_cast<int>(flags[1 - rank].value.load(std::memory_order_acquire) - epoch) < 0)
      __builtin_ia32_pause();
  }
  static void add_both(float* __restrict a, float* __restrict b, size_t n) {
    for (size_t i = 0; i < n; ++i) {
      const float s = a[i] + b[i];
      a[i] = s;
      b[i] = s;
    }
  }
  void symmetric(float* mine, float* peer, size_t bytes) {
    meet();
    const size_t n = bytes / 4;
    size_t lo = n * rank / 2, hi = n * (rank + 1) / 2;
    if (n < 16) lo = 0, hi = rank ? 0 : n;
    add_both(mine + lo, peer + lo, hi - lo);
    meet();
  }
  void plain(float* user, size_t bytes) {
    int parity = 0;
    for (size_t at = 0; at < bytes; at += kChunk, parity ^= 1) {
      const size_t n = std::min(kChunk, bytes - at) / 4, half = n / 2;
      float* mine = reinterpret_cast<float*>(windows[rank] + parity * kChunk);
      float* peer = reinterpret_cast<float*>(windows[1 - rank] + parity * kChunk);
      float* data = user + at / 4;
      const size_t own = rank ? half : 0, own_n = rank ? n - half : half;
      const size_t theirs = rank ? 0 : half, theirs_n = rank ? half : n - half;
      std::memcpy(mine + theirs, data + theirs, theirs_n * 4);
      meet();
      add_both(data + own, peer + own, own_n);
      meet();
      std::memcpy(data + theirs, mine + theirs, theirs_n * 4);
    }
  }
};

// Our side: what a persistent call does below the language binding.
struct Ours {
  Domain& domain;
  WaitPolicy policy = wait_policy(2, 2);
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

}  // namespace

int main(int argc, char** argv) {
  size_t max_bytes = 1ul << 28;
  if (argc == 3 && std::string(argv[1]) == "--max") max_bytes = std::strtoull(argv[2], nullptr, 10);
  const std::string address = "bound-" + std::to_string(getpid());
  int pipe_fds[2];
  if (pipe(pipe_fds) != 0) return 1;
  const int rank = fork() ? 0 : 1;
  cpu_set_t cpu;
  CPU_ZERO(&cpu);
  CPU_SET(rank, &cpu);
  sched_setaffinity(0, sizeof cpu, &cpu);

  auto node = transport::Node::join({.rank = rank, .size = 2, .address = address, .timeout_s = 30});
  const int64_t domain_bytes = Domain::bytes(2);
  const int64_t slice = static_cast<int64_t>(max_bytes) + 4096;
  int64_t offsets[2];
  if (rank == 0) {
    offsets[0] = node->reserve(domain_bytes);
    offsets[1] = node->reserve(2 * slice);
    if (write(pipe_fds[1], offsets, sizeof offsets) != sizeof offsets) return 1;
  } else if (read(pipe_fds[0], offsets, sizeof offsets) != sizeof offsets) {
    return 1;
  }
  Domain domain(node, {0, 1}, rank, offsets[0]);
  auto heap = node->map(offsets[1], 2 * slice);
  float* symmetric[2] = {reinterpret_cast<float*>(heap->data()),
                         reinterpret_cast<float*>(heap->data() + slice)};
  float* plain = static_cast<float*>(std::aligned_alloc(4096, max_bytes));
  std::fill(plain, plain + max_bytes / 4, 0.f);
  std::fill(symmetric[rank], symmetric[rank] + max_bytes / 4, 0.f);

  // The flags lie where no plan's cells do: the last of the pair (0, 0).
  Hand hand{
      reinterpret_cast<Hand::Flag*>(domain.cells(0, 0, 0)), rank, {domain.bank(0, 0), domain.bank(1, 0)}};
  Ours ours{domain};
  const Geometry geometry = host_geometry(2);

  for (size_t bytes = 4; bytes <= max_bytes; bytes *= 4) {
    auto prepare = [&](Placement placement) {
      schedule::Call call{.world = {.size = 2},
                          .counts = {static_cast<int64_t>(bytes / 4)},
                          .in = placement,
                          .out = placement,
                          .in_place = true};
      return Prepared(schedule::make_plan(select(call, false).algorithm, call, geometry, rank), rank);
    };
    const Prepared plain_plan = prepare(Placement::plain), symmetric_plan = prepare(Placement::symmetric);
    const Buffers plain_buffers{reinterpret_cast<char*>(plain), reinterpret_cast<char*>(plain)};
    char* own = reinterpret_cast<char*>(symmetric[rank]);
    const Buffers symmetric_buffers{own, own, slice, slice};
    const std::vector<std::function<void()>> sides = {
        [&] { hand.plain(plain, bytes); }, [&] { ours(plain_plan, plain_buffers); },
        [&] { hand.symmetric(symmetric[rank], symmetric[1 - rank], bytes); },
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
    if (rank == 0) {
      const double hp = median(times[0]), op = median(times[1]), hs = median(times[2]), os = median(times[3]);
      std::printf(
          "{\"bytes\": %zu, \"plain\": {\"hand_us\": %.3f, \"pycomm_us\": %.3f, \"share\": %.3f, "
          "\"algorithm\": \"%s\"}, "
          "\"symmetric\": {\"hand_us\": %.3f, \"pycomm_us\": %.3f, \"share\": %.3f, \"over_ns\": %.0f, "
          "\"algorithm\": \"%s\"}}\n",
          bytes, hp, op, hp / op, plain_plan.plan.algorithm.c_str(), hs, os, hs / os, (os - hs) * 1e3,
          symmetric_plan.plan.algorithm.c_str());
      std::fflush(stdout);
    }
  }
  hand.meet();
  if (rank == 0) wait(nullptr);
}
