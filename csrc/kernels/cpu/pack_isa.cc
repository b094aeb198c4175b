// The loops of pack and unpack for one instruction set. A tensor is processed in the chunks of the
// statistics; within a chunk, strips are decoded, scaled, counted and encoded in registers.
#include <cstring>

#include "kernels/arithmetic/small_float.h"
#include "kernels/arithmetic/stats.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/pack_kernels.h"
#include "kernels/cpu/reduce_vector.h"
#include "kernels/cpu/strips.h"

namespace pycomm::kernels::PYCOMM_ISA {
namespace {

constexpr int kVectors = kStatsLanes / kWidth;
constexpr int kStrip = kStatsLanes > 4 * kWidth ? kStatsLanes : 4 * kWidth;  // elements at a time

static_assert(sizeof(Tally::columns) == kStatsColumns * sizeof(double));

// The statistics of a chunk, lane by lane.
struct Lanes {
  Doubles squares[2 * kVectors] = {};
  Words top = {};  // largest magnitudes, including those of NaNs

  PYCOMM_INLINE void add(int vector, Floats x) {
    squares[2 * vector] = add_squares(squares[2 * vector], first_half(x));
    squares[2 * vector + 1] = add_squares(squares[2 * vector + 1], second_half(x));
    top = larger(top, Lane<Words>::to_bits(x) & 0x7fffffff);
  }

  // fold() of arithmetic/stats.h, with full vectors as long as possible. No loop indexes with a variable, or
  // the sums would not stay in registers.
  PYCOMM_INLINE double sum() const {
    double sums[kWidth / 2];
    store(sums, over_lanes<Total, 2 * kVectors>([this](int v) PYCOMM_LAMBDA { return squares[v]; }));
    return fold(sums, kWidth / 2);
  }
};

// Casts kStrip elements. With kStats they must be numbers that do not overflow; enter() finds chunks with
// others. kPast stores past the cache, in whole lines.
template <class From, class To, bool kAsIs, bool kStats, bool kPast>
PYCOMM_INLINE void cast_strip(const char* src, char* dst, Floats scale, Lanes& lanes) {
  constexpr size_t kFrom = sizeof(typename From::Raw), kTo = sizeof(typename To::Raw);
  constexpr int kFull = kToFill<To>;
  for (int first = 0; first < kStrip / kWidth; first += kFull) {
    Floats x[kFull];
    for (int v = 0; v < kFull; ++v) {
      x[v] = decode_number(src + (first + v) * kWidth * kFrom, From{});
      if constexpr (!kAsIs) x[v] *= scale;
      if constexpr (kStats) lanes.add((first + v) % kVectors, x[v]);
    }
    if constexpr (!kAsIs) encode_full<kStats, kPast>(dst + first * kWidth * kTo, x, To{});
  }
  if constexpr (kAsIs && kPast) stream_lines(dst, src, kStrip * kTo / kLine);
  if constexpr (kAsIs && !kPast) std::memcpy(dst, src, kStrip * kTo);
}

// Casts a chunk whose results include infinities or NaNs a second time, element by element, and counts them.
template <class From, class To, bool kAsIs>
[[gnu::noinline]] void enter_specials(Tally& tally, const char* src, char* dst, size_t n, float scale) {
  using FromRaw = typename From::Raw;
  using ToRaw = typename To::Raw;
  double squares[kStatsLanes] = {};
  for (size_t i = 0; i < n; ++i) {
    float x = From::decode(load<FromRaw>(src + i * sizeof(FromRaw)));
    if constexpr (!kAsIs) {
      x *= scale;
      store(dst + i * sizeof(ToRaw), To::encode(x));
    }
    x = numeric(x);
    squares[i % kStatsLanes] = add_square(squares[i % kStatsLanes], x);
    if (magnitude(x) > tally.max_magnitude) tally.max_magnitude = magnitude(x);
    const int kind = special<To>(load<ToRaw>(dst + i * sizeof(ToRaw)));
    tally.infs += kind == 1;
    tally.nans += kind == 2;
  }
  tally.columns[tally.chunks++ % kStatsColumns] += fold(squares, kStatsLanes);
}

template <class From, class To, bool kAsIs>
PYCOMM_INLINE void enter(Tally& tally, Lanes& lanes, const char* src, char* dst, size_t n, float scale) {
  const uint32_t top = largest(lanes.top);
  if (special<To>(To::encode(as_float(top))) != 0) {  // To::encode is monotonic
    return enter_specials<From, To, kAsIs>(tally, src, dst, n, scale);
  }
  if (top > tally.max_magnitude) tally.max_magnitude = top;
  tally.columns[tally.chunks++ % kStatsColumns] += lanes.sum();
}

template <class From, class To, bool kAsIs, bool kStats, bool kPast>
void cast_chunk(const char* src, char* dst, size_t n, const CastArgs& args) {
  constexpr size_t kFrom = sizeof(typename From::Raw), kTo = sizeof(typename To::Raw);
  const Floats scale = args.scale - Floats{};  // not a sum: it keeps -0 as well
  Lanes lanes;
  size_t i = 0;
  for (; i + kStrip <= n; i += kStrip) {
    prefetch(src + i * kFrom, kStrip * kFrom);
    cast_strip<From, To, kAsIs, kStats, kPast>(src + i * kFrom, dst + i * kTo, scale, lanes);
  }
  if (i < n) {
    char from[kStrip * kFrom] = {}, to[kStrip * kTo];
    std::memcpy(from, src + i * kFrom, (n - i) * kFrom);
    cast_strip<From, To, kAsIs, kStats, false>(from, to, scale, lanes);
    std::memcpy(dst + i * kTo, to, (n - i) * kTo);
  }
  if constexpr (kStats) enter<From, To, kAsIs>(*args.tally, lanes, src, dst, n, args.scale);
}

// Bytes in a row that are written past the cache in full lines, as far as their alignment allows.
class Stream {
 public:
  explicit Stream(char* dst) : to_(dst), phase_(reinterpret_cast<uintptr_t>(dst) % kLine) {}
  char* room() { return staged_ + phase_ + held_; }
  void put(size_t bytes, bool last) {
    held_ += bytes;
    const size_t lines = (phase_ + held_) / kLine * kLine;
    const size_t ready = last ? held_ : lines > phase_ ? lines - phase_ : 0;
    if (ready == 0) return;
    write_past(staged_ + phase_, ready);
    to_ += ready;
    held_ -= ready;
    std::memmove(staged_, staged_ + phase_ + ready, held_);
    phase_ = 0;
  }

 private:
  void write_past(const char* from, size_t bytes) {
    size_t head = (kLine - phase_) % kLine;
    if (head > bytes) head = bytes;
    const size_t lines = (bytes - head) / kLine, end = head + lines * kLine;
    std::memcpy(to_, from, head);
    stream_lines(to_ + head, from + head, lines);
    std::memcpy(to_ + end, from + end, bytes - end);
  }

  alignas(kLine) char staged_[2 * kLine + kStatsChunk * sizeof(float)];
  char* to_;
  size_t phase_, held_ = 0;  // staged_ + phase_ is written to to_
};

template <class From, class To, bool kAsIs, bool kStats>
void cast(const CastArgs& args) {
  constexpr size_t kFrom = sizeof(typename From::Raw), kTo = sizeof(typename To::Raw);
  const auto* src = static_cast<const char*>(args.src);
  auto* dst = static_cast<char*>(args.dst);
  const bool in_place = src == dst, stream = args.stream && !in_place;
  const bool past = stream && reinterpret_cast<uintptr_t>(dst) % kStreamAlign == 0;
  Stream staged(dst);
  for (size_t begin = 0, n; begin < args.count; begin += n) {
    n = args.count - begin < kStatsChunk ? args.count - begin : kStatsChunk;
    char* place = dst + begin * kTo;
    if (past) {
      cast_chunk<From, To, kAsIs, kStats, true>(src + begin * kFrom, place, n, args);
      continue;
    }
    char* out = stream || in_place ? staged.room() : place;  // src stays: a chunk with NaNs is read twice
    cast_chunk<From, To, kAsIs, kStats, false>(src + begin * kFrom, out, n, args);
    if (in_place) {
      if (!kAsIs) copy(place, out, n * kTo);
    } else if (stream) {
      staged.put(n * kTo, begin + n == args.count);
    }
  }
}

template <class From, class To, bool kAsIs>
void cast_any(const CastArgs& args) {
  if (args.tally) {
    cast<From, To, kAsIs, true>(args);
  } else {
    cast<From, To, kAsIs, false>(args);
  }
}

template <class From>
CastFn find_from(DType to) {
  switch (to) {
    case DType::float32:
      return cast_any<From, Wide<float>, false>;
    case DType::float16:
      return cast_any<From, Float16, false>;
    case DType::bfloat16:
      return cast_any<From, BFloat16, false>;
    case DType::float8_e4m3fn:
      return cast_any<From, Float8E4M3, false>;
    case DType::float8_e5m2:
      return cast_any<From, Float8E5M2, false>;
    default:
      return nullptr;
  }
}

template <class F>
CastFn find_pair(DType from, DType to, bool as_is) {
  return as_is && from == to ? cast_any<F, F, true> : find_from<F>(to);
}

CastFn find_cast(DType from, DType to, bool as_is) {
  switch (from) {
    case DType::float32:
      return find_pair<Wide<float>>(from, to, as_is);
    case DType::float16:
      return find_pair<Float16>(from, to, as_is);
    case DType::bfloat16:
      return find_pair<BFloat16>(from, to, as_is);
    case DType::float8_e4m3fn:
      return find_pair<Float8E4M3>(from, to, as_is);
    case DType::float8_e5m2:
      return find_pair<Float8E5M2>(from, to, as_is);
    default:
      return nullptr;
  }
}

Stats finish(Tally& tally) {
  int columns = 1;  // the columns in use; the others are zero
  while (columns < kStatsColumns && columns < tally.chunks) columns *= 2;
  return {.sum_squares = fold(tally.columns, columns),
          .max_abs = as_float(tally.max_magnitude),
          .nans = tally.nans,
          .infs = tally.infs};
}

}  // namespace

const PackKernels pack_kernels = {find_cast, finish};

}  // namespace pycomm::kernels::PYCOMM_ISA
