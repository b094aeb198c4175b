// What an encode needs for its tiles: buffers, the tensors that a tile belongs to, random bits.
#pragma once

#include <algorithm>
#include <cstring>
#include <span>

#include "kernels/codec.h"
#include "kernels/cpu/codec_kernels.h"

namespace pycomm::kernels {

inline constexpr int kPieces = kTile / kSegmentAlign;
inline constexpr size_t kLine = 64;

struct alignas(kLine) FloatTile {
  float x[kTile];
};
// A tile on the wire (at most 2 bytes an element), or a tile of results (at most 4).
struct alignas(kLine) WireTile {
  uint8_t bytes[4 * kTile];
};
struct alignas(kLine) RandomTile {
  uint8_t bytes[2 * kTile];
};

inline void* at(void* p, int64_t offset) { return static_cast<unsigned char*>(p) + offset; }
inline const void* at(const void* p, int64_t offset) { return static_cast<const unsigned char*>(p) + offset; }

// Which tensor each piece (kSegmentAlign elements) of the current tile belongs to.
class Pieces {
 public:
  int32_t counts[kPieces];  // elements of the tensor in the piece; the rest are zeros
  uint64_t tensors[kPieces];
  uint64_t offsets[kPieces];  // where the piece starts in the tensor

  explicit Pieces(std::span<const Segment> segments) : segments_(segments) {}

  // Moves to the tile at `index`, which has n elements.
  void enter(int64_t index, int64_t n) {
    for (int p = 0; p < kPieces; ++p) {
      const int64_t begin = index + p * kSegmentAlign;
      const Segment segment = find(begin);
      const int64_t end = std::min(segment.end, index + n);
      counts[p] = static_cast<int32_t>(std::clamp(end - begin, int64_t{0}, kSegmentAlign));
      tensors[p] = segment.id;
      offsets[p] = static_cast<uint64_t>(begin - segment.begin);
    }
  }

  // Whether piece p continues the tensor of piece p - 1.
  bool follows(int p) const {
    return counts[p - 1] == kSegmentAlign && counts[p] > 0 && tensors[p] == tensors[p - 1] &&
           offsets[p] == offsets[p - 1] + static_cast<uint64_t>(kSegmentAlign);
  }

  bool whole() const {
    int64_t all = 0;
    for (const int32_t count : counts) all += count;
    return all == kTile;
  }

  void clear_gaps(float* tile) const {
    for (int p = 0; p < kPieces; ++p) {
      std::memset(tile + p * kSegmentAlign + counts[p], 0,
                  static_cast<size_t>(kSegmentAlign - counts[p]) * sizeof *tile);
    }
  }

 private:
  Segment find(int64_t index) const {
    if (segments_.empty()) return {0, INT64_MAX, 0};
    const auto after = std::upper_bound(segments_.begin(), segments_.end(), index,
                                        [](int64_t i, const Segment& s) { return i < s.begin; });
    if (after == segments_.begin()) return {index, index, 0};
    return *(after - 1);
  }
  std::span<const Segment> segments_;
};

// The random bits of one encode, tile by tile.
class Random {
 public:
  Random(const CodecKernels& kernels, uint64_t seed, int bits, const Encoding& encoding)
      : kernels_(kernels),
        seed_(seed),
        stream_(uint64_t{encoding.step} << 32 | uint64_t{encoding.turn & 0xff} << 24 |
                (encoding.rank & 0xffffff)),
        bits_(bits) {}

  // Draws the bits of one tile, whose floats lie at x; meanwhile floats further on are prefetched.
  const uint8_t* draw(const Pieces& pieces, const void* x) {
    constexpr int64_t kPieceBytes = kSegmentAlign * int64_t{sizeof(float)};
    const int per_counter = 128 / bits_, counters = static_cast<int>(kSegmentAlign) / per_counter;
    for (int p = 0, end; p < kPieces; p = end) {
      // Consecutive pieces of one tensor are drawn in one run.
      for (end = p + 1; end < kPieces && pieces.follows(end); ++end) {
      }
      if (pieces.counts[p] == 0) continue;
      const uint64_t first =
          (pieces.tensors[p] << 40 | pieces.offsets[p]) / static_cast<uint64_t>(per_counter);
      kernels_.random(tile_.bytes + 16 * counters * p, counters * (end - p), seed_, first, stream_,
                      at(x, p * kPieceBytes), static_cast<size_t>((end - p) * kPieceBytes));
    }
    return tile_.bytes;
  }

 private:
  const CodecKernels& kernels_;
  uint64_t seed_, stream_;
  int bits_;
  RandomTile tile_{};
};

}  // namespace pycomm::kernels
