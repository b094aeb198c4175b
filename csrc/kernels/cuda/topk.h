// The bodies of cuda::topk_encode() and topk_decode_add().
//
// The threshold is the magnitude of rank k. Three passes over the data count magnitudes: by their leading 11
// bits, then by the next 11 bits of those that share the threshold's leading bits, then by the last 9. Each
// block computes the result of a pass for itself at the start of the next one. A fourth pass counts, for each
// chunk of the data, the magnitudes above the threshold and those equal to it; the sums of these counts are
// where a chunk's elements go, and a fifth pass writes them, in order. All of it is deterministic, and
// nothing waits for the host.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/arithmetic/codecs.h"
#include "kernels/cuda/lanes.h"
#include "kernels/topk.h"

namespace pycomm::kernels::PYCOMM_ISA {

inline constexpr int kTopkThreads = 256;
inline constexpr int kTopkChunk = kTopkThreads * kOfLane;
inline constexpr int kTopkPasses = 3;
inline constexpr int kTopkBins = 1 << 11;

// The bits that a pass counts by: topk_bins(pass) bins, from bit topk_shift(pass) on. (These are functions,
// since arrays of constants do not exist on the GPU.)
PYCOMM_INLINE constexpr int topk_shift(int pass) { return pass == 0 ? 20 : pass == 1 ? 9 : 0; }
PYCOMM_INLINE constexpr uint32_t topk_bins(int pass) { return pass == 2 ? 1u << 9 : 1u << 11; }

// What is known of the threshold: its leading bits, and how many magnitudes exceed all that share them.
struct TopkFound {
  uint32_t prefix, above;
};

struct TopkCounts {
  uint32_t above, equal;
};

// The start of the caller's workspace; the counts of the chunks follow.
struct TopkState {
  uint32_t histogram[kTopkPasses][kTopkBins];
  TopkFound found[kTopkPasses];  // result of each pass, written by a block of the next
};

struct TopkCall {
  const void* x;
  DType dtype;
  bool x_aligned;
  int64_t count;
  uint32_t k;  // at most count
  const float* residual;
  float* next_residual;
  bool residual_aligned, next_residual_aligned;
  float residual_scale;
  TopkState* state;
  TopkCounts* chunks;
  uint32_t *header, *indices;
  float* values;
  int pass;
};

PYCOMM_DEVICE int64_t topk_chunks(int64_t count) { return (count + kTopkChunk - 1) / kTopkChunk; }

// The elements of a chunk that one thread has.
struct TopkLane {
  int64_t begin;
  int n;
  Sixteen v;
};

PYCOMM_DEVICE TopkLane read_topk(const TopkCall& call, int64_t chunk, int thread) {
  TopkLane lane;
  lane.begin = chunk * kTopkChunk + thread * kOfLane;
  const int64_t left = call.count - lane.begin;
  lane.n = static_cast<int>(left < 0 ? 0 : left < kOfLane ? left : kOfLane);
  lane.v = read_floats(call.dtype, call.x, lane.begin, lane.n, call.x_aligned);
  if (call.residual) {
    const Sixteen e = read_lane<Wide<float>>(call.residual, lane.begin, lane.n, call.residual_aligned);
    PYCOMM_UNROLL
    for (int i = 0; i < kOfLane; ++i) lane.v.x[i] = lane.v.x[i] + call.residual_scale * e.x[i];
  }
  return lane;
}

// All NaNs are equal, and larger than Inf.
PYCOMM_DEVICE uint32_t topk_magnitude(float x) {
  const uint32_t bits = magnitude_of(x);
  return bits > kFloatInf ? kFloatNan : bits;
}

// x[t] becomes x[0] + ... + x[t].
template <class Block>
PYCOMM_DEVICE void scan(Block& block, uint32_t* x, uint32_t* other) {
  for (int step = 1; step < Block::kThreads; step *= 2) {
    block.each([&](int t) { other[t] = x[t] + (t >= step ? x[t - step] : 0); });
    block.sync();
    block.each([&](int t) { x[t] = other[t]; });
    block.sync();
  }
}

struct TopkShared {
  uint32_t sums[kTopkThreads], other[kTopkThreads];
  TopkFound found;
};

// Stores what passes 0 .. passes - 1 have found in shared.found.
template <class Block>
PYCOMM_DEVICE void look_up(Block& block, const TopkCall& call, int passes, TopkShared& shared) {
  if (passes == 0 || call.k == 0) {
    // Nothing is known yet; or k is 0, and the prefix is larger than any magnitude.
    block.each([&](int t) {
      if (t == 0) shared.found = {call.k == 0 ? 0xffffffff : 0, 0};
    });
    block.sync();
    return;
  }
  const int pass = passes - 1;
  const uint32_t* histogram = call.state->histogram[pass];
  const int of_thread = static_cast<int>(topk_bins(pass)) / kTopkThreads;
  const auto top = static_cast<int>(topk_bins(pass)) - 1;
  const TopkFound before = pass == 0 ? TopkFound{0, 0} : call.state->found[pass - 1];
  block.each([&](int t) {
    uint32_t sum = 0;
    for (int i = 0; i < of_thread; ++i) sum += histogram[top - t * of_thread - i];
    shared.sums[t] = sum;
  });
  block.sync();
  scan(block, shared.sums, shared.other);
  block.each([&](int t) {
    uint32_t above = before.above + (t > 0 ? shared.sums[t - 1] : 0);
    if (above >= call.k || before.above + shared.sums[t] < call.k) return;
    for (int i = 0; i < of_thread; ++i) {  // the threshold is in one of this thread's bins
      const int bin = top - t * of_thread - i;
      if (above + histogram[bin] >= call.k) {
        shared.found = {before.prefix | static_cast<uint32_t>(bin) << topk_shift(pass), above};
        if (block.index() == 0) call.state->found[pass] = shared.found;
        return;
      }
      above += histogram[bin];
    }
  });
  block.sync();
}

// The counting pass with the number call.pass.
struct TopkHistogram {
  using Args = TopkCall;
  static constexpr int kThreads = kTopkThreads;
  static constexpr int kResident = 4;
  struct Shared {
    TopkShared look_up;
    uint32_t bins[kTopkBins];
  };

  template <class Block>
  PYCOMM_DEVICE static void run(Block& block, const TopkCall& call, Shared& shared) {
    look_up(block, call, call.pass, shared.look_up);
    block.each([&](int t) {
      for (int bin = t; bin < kTopkBins; bin += kThreads) shared.bins[bin] = 0;
    });
    block.sync();
    block.each([&](int t) {
      const int shift = topk_shift(call.pass);
      const uint32_t prefix = shared.look_up.found.prefix;
      const uint32_t mask = call.pass == 0 ? 0 : 0xffffffffu << topk_shift(call.pass - 1);
      for (int64_t chunk = block.index(); chunk < topk_chunks(call.count); chunk += block.blocks()) {
        const TopkLane lane = read_topk(call, chunk, t);
        PYCOMM_UNROLL
        for (int i = 0; i < kOfLane; ++i) {
          const uint32_t bits = topk_magnitude(lane.v.x[i]);
          if (i < lane.n && (bits & mask) == prefix) {
            block.add(&shared.bins[bits >> shift & (topk_bins(call.pass) - 1)], 1);
          }
        }
      }
    });
    block.sync();
    block.each([&](int t) {
      for (int bin = t; bin < kTopkBins; bin += kThreads) {
        if (shared.bins[bin] != 0) block.add(&call.state->histogram[call.pass][bin], shared.bins[bin]);
      }
    });
    block.sync();
  }
};

PYCOMM_DEVICE TopkCounts count_topk(const TopkLane& lane, uint32_t threshold) {
  TopkCounts counts{0, 0};
  PYCOMM_UNROLL
  for (int i = 0; i < kOfLane; ++i) {
    const uint32_t bits = topk_magnitude(lane.v.x[i]);
    counts.above += i < lane.n && bits > threshold;
    counts.equal += i < lane.n && bits == threshold;
  }
  return counts;
}

// Two counts in one word, which can be summed as such: a chunk has fewer than 2^16 elements.
PYCOMM_DEVICE uint32_t both(TopkCounts counts) { return counts.above | counts.equal << 16; }
PYCOMM_DEVICE TopkCounts apart(uint32_t sums) { return {sums & 0xffff, sums >> 16}; }
static_assert(kTopkChunk < 1 << 16);

struct TopkCount {
  using Args = TopkCall;
  static constexpr int kThreads = kTopkThreads;
  static constexpr int kResident = 4;
  using Shared = TopkShared;

  template <class Block>
  PYCOMM_DEVICE static void run(Block& block, const TopkCall& call, Shared& shared) {
    look_up(block, call, kTopkPasses, shared);
    for (int64_t chunk = block.index(); chunk < topk_chunks(call.count); chunk += block.blocks()) {
      block.each(
          [&](int t) { shared.sums[t] = both(count_topk(read_topk(call, chunk, t), shared.found.prefix)); });
      block.sync();
      for (int half = kThreads / 2; half > 0; half /= 2) {
        block.each([&](int t) {
          if (t < half) shared.sums[t] += shared.sums[t + half];
        });
        block.sync();
      }
      block.each([&](int t) {
        if (t == 0) call.chunks[chunk] = apart(shared.sums[0]);
      });
      block.sync();
    }
  }
};

// Replaces the counts of each chunk by the sums over all chunks before it. Runs in one block.
struct TopkPlace {
  using Args = TopkCall;
  static constexpr int kThreads = 1024;
  static constexpr int kResident = 1;
  struct Shared {
    uint32_t above[kThreads], equal[kThreads], other[kThreads];
  };

  template <class Block>
  PYCOMM_DEVICE static void run(Block& block, const TopkCall& call, Shared& shared) {
    const int64_t chunks = topk_chunks(call.count), of_thread = (chunks + kThreads - 1) / kThreads;
    const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    block.each([&](int t) {
      TopkCounts sum{0, 0};
      for (int64_t c = t * of_thread; c < least(chunks, (t + 1) * of_thread); ++c) {
        sum.above += call.chunks[c].above;
        sum.equal += call.chunks[c].equal;
      }
      shared.above[t] = sum.above;
      shared.equal[t] = sum.equal;
    });
    block.sync();
    scan(block, shared.above, shared.other);
    scan(block, shared.equal, shared.other);
    block.each([&](int t) {
      TopkCounts before = {t > 0 ? shared.above[t - 1] : 0, t > 0 ? shared.equal[t - 1] : 0};
      for (int64_t c = t * of_thread; c < least(chunks, (t + 1) * of_thread); ++c) {
        const TopkCounts own = call.chunks[c];
        call.chunks[c] = before;
        before.above += own.above;
        before.equal += own.equal;
      }
    });
    block.sync();
  }
};

struct TopkWrite {
  using Args = TopkCall;
  static constexpr int kThreads = kTopkThreads;
  static constexpr int kResident = 4;
  using Shared = TopkShared;

  template <class Block>
  PYCOMM_DEVICE static void run(Block& block, const TopkCall& call, Shared& shared) {
    typename Block::template PerThread<TopkLane> lanes;
    look_up(block, call, kTopkPasses, shared);
    const TopkFound found = shared.found;
    const uint32_t ties = call.k - found.above;  // how many of those equal to the threshold are kept
    block.each([&](int t) {
      if (block.index() == 0 && t < 4) call.header[t] = t == 0 ? call.k : 0;
    });
    block.sync();
    for (int64_t chunk = block.index(); chunk < topk_chunks(call.count); chunk += block.blocks()) {
      block.each([&](int t) {
        lanes[t] = read_topk(call, chunk, t);
        shared.sums[t] = both(count_topk(lanes[t], found.prefix));
      });
      block.sync();
      scan(block, shared.sums, shared.other);
      block.each([&](int t) {
        const TopkLane& lane = lanes[t];
        TopkCounts before = call.chunks[chunk];
        if (t > 0) {
          const TopkCounts here = apart(shared.sums[t - 1]);
          before = {before.above + here.above, before.equal + here.equal};
        }
        Sixteen next;
        PYCOMM_UNROLL
        for (int i = 0; i < kOfLane; ++i) {
          const float v = lane.v.x[i];
          const uint32_t bits = topk_magnitude(v);
          const bool above = i < lane.n && bits > found.prefix;
          const bool equal = i < lane.n && bits == found.prefix;
          const bool kept = above || (equal && before.equal < ties);
          if (kept) {
            const uint32_t place = before.above + (before.equal < ties ? before.equal : ties);
            call.indices[place] = static_cast<uint32_t>(lane.begin + i);
            call.values[place] = canonical(v);
          }
          before.above += above;
          before.equal += equal;
          next.x[i] = kept ? 0.0f : v / call.residual_scale;
        }
        if (call.next_residual) {
          write_lane<Plain<float>>(call.next_residual, lane.begin, lane.n, call.next_residual_aligned, next);
        }
      });
      block.sync();
    }
  }
};

struct TopkAddCall {
  const uint32_t *header, *indices;
  const float* values;
  uint32_t capacity;
  float* sum;
  int64_t count;
};

// Indices ascend, so no two entries add to the same element.
struct TopkAdd {
  using Args = TopkAddCall;
  static constexpr int kThreads = 256;
  static constexpr int kResident = 1;
  struct Shared {};

  template <class Block>
  PYCOMM_DEVICE static void run(Block& block, const TopkAddCall& call, Shared&) {
    block.each([&](int t) {
      const int64_t entries = *call.header < call.capacity ? *call.header : call.capacity;
      for (int64_t i = block.index() * kThreads + t; i < entries; i += block.blocks() * kThreads) {
        const uint32_t index = call.indices[i];
        if (index < call.count) call.sum[index] = canonical(call.sum[index] + call.values[i]);
      }
    });
  }
};

inline int64_t topk_room(int64_t count) {
  return static_cast<int64_t>(sizeof(TopkState)) +
         (count + kTopkChunk - 1) / kTopkChunk * static_cast<int64_t>(sizeof(TopkCounts));
}

inline TopkCall make_topk_call(const TopkArgs& args, void* workspace) {
  TopkCall call{};
  call.x = args.x;
  call.dtype = args.dtype;
  call.x_aligned = is_aligned(args.x);
  call.count = static_cast<int64_t>(args.count);
  call.k = static_cast<uint32_t>(args.capacity < args.count ? args.capacity : args.count);
  call.residual = args.residual;
  call.next_residual = args.next_residual;
  call.residual_aligned = is_aligned(args.residual);
  call.next_residual_aligned = is_aligned(args.next_residual);
  call.residual_scale = args.residual_scale;
  call.state = static_cast<TopkState*>(workspace);
  call.chunks = reinterpret_cast<TopkCounts*>(call.state + 1);
  call.header = static_cast<uint32_t*>(args.record);
  call.indices = call.header + 4;
  call.values = reinterpret_cast<float*>(call.indices + args.capacity);
  return call;
}

}  // namespace pycomm::kernels::PYCOMM_ISA
