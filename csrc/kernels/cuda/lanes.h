// What the codecs' bodies share. Half a tile is split among 32 threads, called *lanes*: each has 16 elements,
// which one Philox counter serves. The tensors of a bucket determine how many of its elements a lane uses.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "common/dtype.h"
#include "kernels/arithmetic/codecs.h"
#include "kernels/arithmetic/philox.h"
#include "kernels/codec.h"
#include "kernels/cuda/memory.h"

namespace pycomm::kernels::PYCOMM_ISA {

inline constexpr int kLanes = 32;
inline constexpr int kOfLane = 16;              // elements of a lane
inline constexpr int kHalf = kLanes * kOfLane;  // elements of half a tile
static_assert(kTile == 2 * kHalf);

struct Sixteen {
  float x[kOfLane];
};

// Elements [begin, begin + n) of the data at `base`, as float32; the rest of the sixteen are zeros.
// `aligned`: base is a multiple of 16 bytes, and `begin` of kOfLane.
template <class F>
PYCOMM_DEVICE Sixteen read_lane(const void* base, int64_t begin, int n, bool aligned) {
  using Raw = typename F::Raw;
  const char* p = static_cast<const char*>(base) + begin * static_cast<int64_t>(sizeof(Raw));
  Run<Raw, kOfLane> run{};
  if (aligned && n == kOfLane) {
    run = read_run<Raw, kOfLane>(p);
  } else {
    PYCOMM_UNROLL
    for (int i = 0; i < kOfLane; ++i) {
      if (i < n) run.x[i] = read_element<Raw>(p + i * sizeof(Raw));
    }
  }
  Sixteen lane;
  PYCOMM_UNROLL
  for (int i = 0; i < kOfLane; ++i) lane.x[i] = F::decode(run.x[i]);
  return lane;
}

template <class F>
PYCOMM_DEVICE void write_lane(void* base, int64_t begin, int n, bool aligned, const Sixteen& lane) {
  using Raw = typename F::Raw;
  char* p = static_cast<char*>(base) + begin * static_cast<int64_t>(sizeof(Raw));
  Run<Raw, kOfLane> run;
  PYCOMM_UNROLL
  for (int i = 0; i < kOfLane; ++i) run.x[i] = F::encode(lane.x[i]);
  if (aligned && n == kOfLane) return write_run(p, run);
  PYCOMM_UNROLL
  for (int i = 0; i < kOfLane; ++i) {
    if (i < n) write_element<Raw>(p + i * sizeof(Raw), run.x[i]);
  }
}

PYCOMM_DEVICE Sixteen read_floats(DType dtype, const void* base, int64_t begin, int n, bool aligned) {
  if (dtype == DType::float16) return read_lane<Float16>(base, begin, n, aligned);
  if (dtype == DType::bfloat16) return read_lane<BFloat16>(base, begin, n, aligned);
  return read_lane<Wide<float>>(base, begin, n, aligned);
}

PYCOMM_DEVICE void write_floats(DType dtype, void* base, int64_t begin, int n, bool aligned,
                                const Sixteen& lane) {
  if (dtype == DType::float16) return write_lane<Float16>(base, begin, n, aligned, lane);
  if (dtype == DType::bfloat16) return write_lane<BFloat16>(base, begin, n, aligned, lane);
  write_lane<Wide<float>>(base, begin, n, aligned, lane);
}

// The tensors of one launch, passed as kernel parameters; longer lists take several launches.
inline constexpr int kSegments = 448;
struct Segments {
  int64_t begins[kSegments], ends[kSegments];
  uint64_t ids[kSegments];
  int count;  // 0: one tensor, id 0, as long as the data
};

// Where a lane's elements lie in their tensor.
struct Piece {
  int present;  // how many elements the tensor has from the lane's first on: any number; none if <= 0
  uint64_t id, offset;
};

PYCOMM_DEVICE Piece find_piece(const Segments& segments, int64_t index, int64_t end_of_data) {
  int64_t begin = 0, end = end_of_data;
  uint64_t id = 0;
  if (segments.count > 0) {
    int at = 0, above = segments.count;  // `at` becomes the last tensor that begins at or before index
    while (above - at > 1) {
      const int middle = (at + above) / 2;
      if (segments.begins[middle] <= index) {
        at = middle;
      } else {
        above = middle;
      }
    }
    begin = segments.begins[at];
    if (begin > index) return {0, 0, 0};  // before the first tensor
    end = segments.ends[at] < end ? segments.ends[at] : end;
    id = segments.ids[at];
  }
  const int64_t left = end - index;
  const auto present = static_cast<int>(left < -kTile ? -kTile : left > kTile ? kTile : left);
  return {present, id, static_cast<uint64_t>(index - begin)};
}

// What the random bits depend on besides the element.
struct Draw {
  bool stochastic;
  uint64_t seed, stream;
};

inline Draw make_draw(bool stochastic, uint64_t seed, const Encoding& encoding) {
  return {stochastic, seed, philox_stream(encoding.step, encoding.turn, encoding.rank)};
}

// kBits random bits for each element of a lane.
template <int kBits>
struct RandomBits {
  static constexpr int kDraws = kBits * kOfLane / 128;
  Philox draws[kDraws];
  PYCOMM_DEVICE uint32_t of(int i) const {
    const int bit = i * kBits;
    return draws[bit / 128].word[bit / 32 % 4] >> bit % 32 & ((1u << kBits) - 1);
  }
};

template <int kBits>
PYCOMM_DEVICE RandomBits<kBits> draw(const Draw& call, const Piece& piece) {
  RandomBits<kBits> random{};
  if (call.stochastic) {
    const uint64_t first = philox_index(piece.id, piece.offset) / (128 / kBits);
    PYCOMM_UNROLL
    for (int d = 0; d < RandomBits<kBits>::kDraws; ++d) {
      random.draws[d] = philox(call.seed, first + static_cast<uint64_t>(d), call.stream);
    }
  }
  return random;
}

// Calls f(begin, count, segments) for each launch of an encode: it covers elements [begin, begin + count),
// begin a multiple of kTile, and the tensors that they belong to.
template <class F>
void each_launch(const Encoding& encoding, int64_t count, F f) {
  size_t next = 0;
  const std::span<const Segment> all = encoding.segments;
  for (int64_t begin = 0; begin < count;) {
    Segments segments{};
    int64_t end = count;
    if (!all.empty()) {
      while (next < all.size() && all[next].end <= encoding.index + begin) ++next;
      for (size_t s = next; s < all.size() && all[s].begin < encoding.index + count; ++s) {
        if (all[s].begin == all[s].end) continue;
        if (segments.count == kSegments) {
          end = (all[s].begin - encoding.index) / kTile * kTile;
          break;
        }
        segments.begins[segments.count] = all[s].begin;
        segments.ends[segments.count] = all[s].end;
        segments.ids[segments.count++] = all[s].id;
      }
      if (segments.count == 0) segments = {.begins = {INT64_MAX}, .ends = {INT64_MAX}, .ids = {}, .count = 1};
    }
    f(begin, end - begin, segments);
    begin = end;
  }
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kAccess == 0; }

}  // namespace pycomm::kernels::PYCOMM_ISA
