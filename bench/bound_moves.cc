// How fast the other collectives are, compared with loops written by hand: float32, sum, plain buffers from
// NumPy's allocator.
//
// build/bench_bound_moves [--ranks 2|4] [--min BYTES] [--max BYTES] [COLLECTIVE ...]
//
// As in bound.cc, both sides run in turn in the same processes. The limit depends on the size and on the
// host, so there are two hand-written loops, and the faster one of each turn counts. One makes two copies
// through windows: one rank makes the first while another makes the second. The other makes a single copy
// through the kernel (process_vm_readv), if nothing is summed and no rank overwrites data that others still
// read. `bytes` is the size of the larger buffer, as in `pycomm bench`. `share` is the hand-written time
// divided by pycomm's. The output is one JSON line per size.
#include <cstring>

#include "bound_rig.h"

using namespace pycomm;
using schedule::Collective;
using schedule::Placement;

namespace {

// A part of a rank's output, and the parts of the ranks' inputs that are summed to it. The takes of a
// collective define it.
struct Take {
  size_t to;  // offsets and lengths are bytes
  size_t bytes;
  struct Source {
    int rank;
    size_t offset;
  };
  std::vector<Source> sources;
};

std::vector<Take> takes_of(Collective collective, int n, int rank, size_t bytes) {
  const size_t block = bytes / n;
  std::vector<Take> takes;
  const auto sum = [&](size_t offset, size_t length) {
    takes.push_back({0, length, {}});
    for (int r = 0; r < n; ++r) takes[0].sources.push_back({r, offset});
  };
  switch (collective) {
    case Collective::all_gather:
      for (int r = 0; r < n; ++r) takes.push_back({r * block, block, {{r, 0}}});
      break;
    case Collective::gather:
      for (int r = 0; r < n && rank == 0; ++r) takes.push_back({r * block, block, {{r, 0}}});
      break;
    case Collective::all_to_all:
      for (int r = 0; r < n; ++r) takes.push_back({r * block, block, {{r, rank * block}}});
      break;
    case Collective::scatter:
      takes.push_back({0, block, {{0, rank * block}}});
      break;
    case Collective::broadcast:
      takes.push_back({0, bytes, {{0, 0}}});
      break;
    case Collective::send_recv:
      if (rank == 1) takes.push_back({0, bytes, {{0, 0}}});
      break;
    case Collective::reduce_scatter:
      sum(rank * block, block);
      break;
    case Collective::reduce:
      if (rank == 0) sum(0, bytes);
      break;
    case Collective::all_reduce:
    case Collective::barrier:
      break;
  }
  return takes;
}

template <int N>
class Hand {
 public:
  Hand(bound::Rig<N>& rig, Collective collective, size_t bytes, const char* in, char* out)
      : rig_(rig), rank_(rig.rank), in_(in), out_(out) {
    for (int r = 0; r < N; ++r) {
      takes_[r] = takes_of(collective, N, r, bytes);
      for (const Take& take : takes_[r]) {
        longest_ = std::max(longest_, take.bytes);
        for (const auto& source : take.sources) {
          if (source.rank == r) continue;
          std::vector<size_t>& shown = shown_[source.rank];
          if (std::ranges::find(shown, source.offset) == shown.end()) shown.push_back(source.offset);
          single_ = single_ && take.sources.size() == 1;
        }
      }
    }
    size_t most = 1;
    for (const auto& shown : shown_) most = std::max(most, shown.size());
    piece_ = bound::Rig<N>::kChunk / most / 64 * 64;
  }
  // Whether one copy through the kernel is enough; `overwrites`: a rank writes over what others read.
  bool single(bool overwrites) const { return single_ && !overwrites; }

  void windows() {
    for (size_t at = 0; at < longest_; at += piece_) {
      const size_t bytes = std::min(piece_, longest_ - at);
      rig_.flip();
      for (size_t i = 0; i < shown_[rank_].size(); ++i) {
        std::memcpy(rig_.window(rank_) + i * piece_, in_ + shown_[rank_][i] + at, bytes);
      }
      rig_.meet();
      for (const Take& take : takes_[rank_]) {
        std::array<const char*, N> from;
        for (size_t s = 0; s < take.sources.size(); ++s) from[s] = source(take.sources[s], at);
        char* const to = out_ + take.to + at;
        if (take.sources.size() == N) {
          sum(from, to, bytes);
        } else if (from[0] != to) {
          std::memcpy(to, from[0], bytes);
        }
      }
    }
  }

  void kernel() {
    rig_.flags[rank_].word.store(reinterpret_cast<int64_t>(in_), std::memory_order_relaxed);
    rig_.meet();
    for (const Take& take : takes_[rank_]) {
      const auto& [from, offset] = take.sources[0];
      char* const to = out_ + take.to;
      if (from == rank_) {
        if (in_ + offset != to) std::memcpy(to, in_ + offset, take.bytes);
      } else {
        const auto address = static_cast<uint64_t>(rig_.flags[from].word.load(std::memory_order_relaxed));
        if (rig_.read(from, to, address + offset, take.bytes) != 0) std::abort();
      }
    }
    rig_.meet();
  }

 private:
  const char* source(const Take::Source& source, size_t at) const {
    if (source.rank == rank_) return in_ + source.offset + at;
    const std::vector<size_t>& shown = shown_[source.rank];
    return rig_.window(source.rank) + (std::ranges::find(shown, source.offset) - shown.begin()) * piece_;
  }
  static void sum(const std::array<const char*, N>& from, char* out, size_t bytes) {
    std::array<const float*, N> x;
    for (int r = 0; r < N; ++r) x[r] = reinterpret_cast<const float*>(from[r]);
    auto* const to = reinterpret_cast<float*>(out);
    PYCOMM_BOUND_INDEPENDENT
    for (size_t i = 0; i < bytes / 4; ++i) {
      float s = x[0][i];
      for (int r = 1; r < N; ++r) s += x[r][i];
      to[i] = s;
    }
  }

  bound::Rig<N>& rig_;
  const int rank_;
  const char* const in_;
  char* const out_;
  std::array<std::vector<Take>, N> takes_;
  std::array<std::vector<size_t>, N> shown_;  // by rank: offsets in its input of the parts that others take
  size_t longest_ = 0, piece_ = 0;
  bool single_ = true;
};

template <int N>
void compare_at(bound::Rig<N>& rig, Collective collective, size_t bytes, bool in_place) {
  const int rank = rig.rank;
  schedule::Call call{
      .world = {.collective = collective, .size = N, .root = 0, .peer = 1},
      .dtype = DType::float32,
      .in_place = in_place,
  };
  const bool whole = collective == Collective::broadcast || collective == Collective::reduce ||
                     collective == Collective::send_recv;
  const size_t blocks = collective == Collective::all_to_all ? N * N : whole ? 1 : N;
  call.counts.assign(blocks, static_cast<int64_t>(bytes / 4 / (whole ? 1 : N)));
  const bound::Pages first(bytes), second(bytes);
  const auto own = static_cast<ptrdiff_t>(bytes / N * rank);
  const bool gathers = collective == Collective::all_gather || collective == Collective::gather;
  const bool scatters = collective == Collective::reduce_scatter || collective == Collective::scatter;
  const char* const in = in_place && gathers ? second.data + own : first.data;
  char* const out = !in_place || gathers ? second.data : scatters ? first.data + own : first.data;

  Hand<N> hand(rig, collective, bytes, in, out);
  const bool overwrites = in_place && collective == Collective::all_to_all;
  runtime::Prepared plan = rig.prepare(call);
  if (runtime::single_copy_pays(call, rig.profile())) {
    call.in = Placement::reachable;
    if (runtime::Prepared reading = rig.prepare(call); reading.reachable) plan = std::move(reading);
  }
  std::vector<std::function<void()>> sides = {[&] { rig.call(plan, {in, out}); }, [&] { hand.windows(); }};
  if (hand.single(overwrites)) sides.emplace_back([&] { hand.kernel(); });
  const auto times = rig.times(sides, bytes);
  if (rank != 0) return;
  std::vector<double> best = times[1];
  for (size_t i = 0; i < best.size() && times.size() > 2; ++i) best[i] = std::min(best[i], times[2][i]);
  std::printf(
      "{\"collective\": \"%s\", \"ranks\": %d, \"bytes\": %zu, \"in_place\": %s, \"windows_us\": %.3f, ",
      name(collective), N, bytes, in_place ? "true" : "false", bound::median(times[1]));
  if (times.size() > 2) std::printf("\"kernel_us\": %.3f, ", bound::median(times[2]));
  std::printf("\"pycomm_us\": %.3f, \"single_copy\": %s, \"share\": %.3f}\n", bound::median(times[0]),
              plan.reachable ? "true" : "false", bound::ratio(best, times[0]));
  std::fflush(stdout);
}

template <int N>
void compare(const std::vector<Collective>& collectives, size_t min_bytes, size_t max_bytes) {
  const auto rig = bound::Rig<N>::start(0);
  for (const Collective collective : collectives) {
    for (size_t bytes = min_bytes; bytes <= max_bytes; bytes *= 4) {
      for (const bool in_place : {false, true}) compare_at(*rig, collective, bytes, in_place);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  size_t min_bytes = 1 << 12, max_bytes = 1 << 26;
  int ranks = 2;
  std::vector<Collective> collectives;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.starts_with("--") && i + 1 == argc)
      return std::fprintf(stderr, "%s needs a number\n", argv[i]), 2;
    if (word == "--ranks") {
      ranks = std::atoi(argv[++i]);
    } else if (word == "--min") {
      min_bytes = std::strtoull(argv[++i], nullptr, 10);
    } else if (word == "--max") {
      max_bytes = std::strtoull(argv[++i], nullptr, 10);
    } else {
      collectives.push_back(schedule::parse_collective(word));
    }
  }
  if (ranks != 2 && ranks != 4) return std::fprintf(stderr, "--ranks must be 2 or 4\n"), 2;
  if (collectives.empty()) {
    collectives = {Collective::reduce_scatter, Collective::all_gather, Collective::broadcast,
                   Collective::all_to_all,     Collective::reduce,     Collective::gather,
                   Collective::scatter,        Collective::send_recv};
  }
  ranks == 2 ? compare<2>(collectives, min_bytes, max_bytes) : compare<4>(collectives, min_bytes, max_bytes);
}
