// How fast the interpreted, proved plan is, compared with loops written by hand: all_reduce(float32, sum).
//
//   build/bench_bound [--ranks 2|4] [--max BYTES]         one JSON line per size
//
// Both sides run in turn in the same processes, rank r on core r modulo the cores, on the same user pages and
// the same windows. The hand-written loops know the number of ranks, use the buffers as they are, and have no
// checks, no timeout and no dispatch; they are the physical limit of this scheme, not a library. `share` is
// the hand-written time divided by pycomm's.
#include <cstring>

#include "bound_rig.h"

using namespace pycomm;
using schedule::Placement;

namespace {

constexpr size_t kOneShotBytes = 2048;  // up to here a second meet() costs more than reading everything

// The hand-written loops.
template <int N>
struct Hand {
  using Rig = bound::Rig<N>;
  using Pointers = std::array<float*, N>;
  static constexpr size_t kChunk = Rig::kChunk;
  Rig& rig;
  const int rank = rig.rank;

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
    rig.flip();
    Pointers all;
    for (int r = 0; r < N; ++r) all[r] = reinterpret_cast<float*>(rig.window(r));
    return all;
  }

  void symmetric(const Pointers& buffers, size_t bytes) {
    rig.meet();
    const size_t n = bytes / 4;
    sum(buffers, buffers, begin_of(n, rank), end_of(n, rank));
    rig.meet();
  }
  // Every rank publishes all of its data and sums all.
  void one_shot(float* user, size_t bytes) {
    Pointers all = shown();
    std::memcpy(all[rank], user, bytes);
    rig.meet();
    all[rank] = user;
    sum(all, std::array{user}, 0, bytes / 4);
  }
  // Every rank publishes the shares that others own, sums its own share and publishes the sum.
  void two_shot(float* user, size_t bytes) {
    for (size_t at = 0; at < bytes; at += kChunk) {
      const size_t n = std::min(kChunk, bytes - at) / 4;
      Pointers all = shown();
      float* const mine = all[rank];
      float* data = user + at / 4;
      const size_t begin = begin_of(n, rank), end = end_of(n, rank);
      std::memcpy(mine, data, begin * 4);
      std::memcpy(mine + end, data + end, (n - end) * 4);
      rig.meet();
      all[rank] = data;
      if constexpr (N == 2) {  // write to the other's window, and read from one's own cache
        sum(all, all, begin, end);
      } else {
        sum(all, std::array{data, mine}, begin, end);
      }
      rig.meet();
      for (int r = 0; r < N; ++r) {
        const size_t first = begin_of(n, r), last = end_of(n, r);
        if (r != rank) std::memcpy(data + first, (N == 2 ? mine : all[r]) + first, (last - first) * 4);
      }
    }
  }
};

template <int N>
void compare(size_t max_bytes) {
  const auto rig = bound::Rig<N>::start(static_cast<int64_t>(max_bytes));
  const int rank = rig->rank;
  Hand<N> hand{*rig};
  const bound::Pages pages(max_bytes);
  float* const plain = pages.floats();
  typename Hand<N>::Pointers symmetric;
  for (int r = 0; r < N; ++r) symmetric[r] = reinterpret_cast<float*>(rig->shared(r));
  std::fill(symmetric[rank], symmetric[rank] + max_bytes / 4, 0.f);

  for (size_t bytes = 4; bytes <= max_bytes; bytes *= 4) {
    const auto prepare = [&](Placement placement) {
      return rig->prepare({.world = {.size = N},
                           .counts = {static_cast<int64_t>(bytes / 4)},
                           .in = placement,
                           .out = placement,
                           .in_place = true});
    };
    const runtime::Prepared plain_plan = prepare(Placement::plain),
                            symmetric_plan = prepare(Placement::symmetric);
    const runtime::Bases plain_buffers{pages.data, pages.data};
    char* const own = rig->shared(rank);
    const runtime::Bases symmetric_buffers{own, own, rig->slice, rig->slice};
    const auto times = rig->times(
        {[&] { bytes <= kOneShotBytes ? hand.one_shot(plain, bytes) : hand.two_shot(plain, bytes); },
         [&] { rig->call(plain_plan, plain_buffers); }, [&] { hand.symmetric(symmetric, bytes); },
         [&] { rig->call(symmetric_plan, symmetric_buffers); }},
        bytes);
    if (rank != 0) continue;
    const auto said = [&](const char* name, size_t by_hand, const runtime::Prepared& plan) {
      std::printf("\"%s\": {\"hand_us\": %.3f, \"pycomm_us\": %.3f, \"share\": %.3f, \"algorithm\": \"%s\"}",
                  name, bound::median(times[by_hand]), bound::median(times[by_hand + 1]),
                  bound::ratio(times[by_hand], times[by_hand + 1]), plan.plan.algorithm.c_str());
    };
    std::printf("{\"ranks\": %d, \"bytes\": %zu, ", N, bytes);
    said("plain", 0, plain_plan);
    std::printf(", ");
    said("symmetric", 2, symmetric_plan);
    std::printf("}\n");
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  size_t max_bytes = 1ul << 28;
  int ranks = 2;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::string(argv[i]) == "--max") max_bytes = std::strtoull(argv[i + 1], nullptr, 10);
    if (std::string(argv[i]) == "--ranks") ranks = std::atoi(argv[i + 1]);
  }
  if (ranks != 2 && ranks != 4) return std::fprintf(stderr, "--ranks must be 2 or 4\n"), 2;
  ranks == 2 ? compare<2>(max_bytes) : compare<4>(max_bytes);
}
