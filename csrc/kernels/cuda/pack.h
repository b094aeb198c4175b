// The bodies of cuda::pack() and cuda::unpack(), and how a list of tensors is turned into their arguments.
//
// The list is passed as kernel parameters. A block processes tiles, and finds the tensor of a tile by binary
// search. A tile has as many chunks (arithmetic/stats.h) as the block has teams. A team of 32 / V threads
// processes a whole chunk, where V is the number of elements that a thread reads and writes at once. So each
// lane of the statistics belongs to one thread, which adds in order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "kernels/arithmetic/ops.h"
#include "kernels/arithmetic/small_float.h"
#include "kernels/arithmetic/stats.h"
#include "kernels/cuda/memory.h"
#include "kernels/pack.h"

namespace pycomm::kernels::PYCOMM_ISA {

// The statistics of one chunk; those of a call lie in a row, in the order of the list.
struct alignas(16) ChunkStats {
  double sum_squares;
  uint32_t max_magnitude;  // bits of a float32
  uint16_t nans, infs;
};

inline constexpr int kPackItems = 448;  // items of one launch
inline constexpr int kPackThreads = 64;

struct PackCall {
  void* tensors[kPackItems];
  int64_t offsets[kPackItems];  // from the bucket's start, in elements
  int64_t counts[kPackItems];
  uint32_t first_tiles[kPackItems];
  uint32_t first_chunks[kPackItems];
  DType dtypes[kPackItems];
  bool aligned[kPackItems];  // vectors can be read and written
  bool as_is[kPackItems];    // equal types, no scaling: the bits are kept
  bool store[kPackItems];    // false: as_is, and already in its place
  int num_items;
  uint32_t tiles;
  float scale;
  void* bucket;
  ChunkStats* chunks;  // null: no statistics
};

// How many elements a thread reads and writes at once.
constexpr int pack_vector(size_t one, size_t other) { return one == 4 && other == 4 ? 4 : 8; }
constexpr int64_t pack_tile(int vector) { return kPackThreads * vector / kStatsLanes * kStatsChunk; }

template <class A, class B>
inline constexpr bool kSame = false;
template <class A>
inline constexpr bool kSame<A, A> = true;

// Packs tensors of any format into a bucket of format B, or unpacks them from it.
template <class B, bool kPacks>
struct Pack {
  using Args = PackCall;
  static constexpr int kThreads = kPackThreads;
  static constexpr int kResident = 8;
  static constexpr int kTeams = kThreads / 4;  // at most, with 8 elements a thread
  struct Shared {
    double lanes[kTeams][kStatsLanes + 1];  // odd rows avoid bank conflicts
    uint32_t max_magnitude[kThreads];
    uint16_t nans[kThreads], infs[kThreads];
  };

  // The statistics of a thread's share of a chunk.
  template <int kV>
  struct Share {
    double squares[kV];
    uint32_t max_magnitude, top;  // without NaNs; with them
  };

  struct Tile {
    const char* src;
    char* dst;
    int64_t count;  // the tensor's elements
    int64_t begin;  // the tile's first element in the tensor
    uint32_t first_chunk;
    int item;
  };

  // dst = cast(src * scale) for one element, with its statistics
  template <class From, class To, int kV>
  PYCOMM_DEVICE static typename To::Raw cast(const PackCall& call, bool as_is, typename From::Raw code,
                                             Share<kV>& share, int lane) {
    float x = From::decode(code);
    typename To::Raw result;
    if constexpr (kSame<From, To>) {
      x = as_is ? x : x * call.scale;
      result = as_is ? code : To::encode(x);
    } else {
      x = x * call.scale;
      result = To::encode(x);
    }
    if (call.chunks) {
      share.top = magnitude(x) > share.top ? magnitude(x) : share.top;
      x = numeric(x);
      share.squares[lane] = add_square(share.squares[lane], x);
      share.max_magnitude = magnitude(x) > share.max_magnitude ? magnitude(x) : share.max_magnitude;
    }
    return result;
  }

  template <class From, class To>
  PYCOMM_DEVICE static void cast_tile(const PackCall& call, const Tile& tile, int thread, Shared& shared) {
    using In = typename From::Raw;
    using Out = typename To::Raw;
    constexpr int kV = pack_vector(sizeof(In), sizeof(Out));
    constexpr int kTeam = kStatsLanes / kV;
    constexpr int kRuns = kV == 4 ? 4 : 2;  // runs whose loads are in flight
    const bool as_is = call.as_is[tile.item], store = call.store[tile.item],
               aligned = call.aligned[tile.item];
    const int team = thread / kTeam, lane = thread % kTeam * kV;
    const int64_t begin = tile.begin + team * kStatsChunk;
    const int64_t left = tile.count - begin;
    const int n = static_cast<int>(left < 0 ? 0 : left < kStatsChunk ? left : kStatsChunk);
    const char* src = tile.src + begin * static_cast<int64_t>(sizeof(In));
    char* dst = tile.dst + begin * static_cast<int64_t>(sizeof(Out));
    Share<kV> share{};
    const int whole = aligned ? n / kV * kV : 0;  // elements that are processed in vectors
    for (int first = lane; first < whole; first += kStatsLanes * kRuns) {
      Run<In, kV> in[kRuns];
      PYCOMM_UNROLL
      for (int r = 0; r < kRuns; ++r) {
        const int i = first + r * kStatsLanes;
        if (i < whole) in[r] = read_run<In, kV>(src + i * sizeof(In));
      }
      PYCOMM_UNROLL
      for (int r = 0; r < kRuns; ++r) {
        const int i = first + r * kStatsLanes;
        if (i >= whole) break;
        Run<Out, kV> out;
        PYCOMM_UNROLL
        for (int v = 0; v < kV; ++v) out.x[v] = cast<From, To>(call, as_is, in[r].x[v], share, v);
        if (store) write_run(dst + i * sizeof(Out), out);
      }
    }
    // The remaining elements of this thread's lanes, one by one.
    int first = lane;
    if (whole > lane) first += (whole - lane + kStatsLanes - 1) / kStatsLanes * kStatsLanes;
    for (; first < n; first += kStatsLanes) {
      PYCOMM_UNROLL
      for (int v = 0; v < kV; ++v) {
        const int i = first + v;
        if (i < n) {
          const In in = read_element<In>(src + i * sizeof(In));
          const Out out = cast<From, To>(call, as_is, in, share, v);
          if (store) write_element<Out>(dst + i * sizeof(Out), out);
        }
      }
    }
    if (!call.chunks) return;
    PYCOMM_UNROLL
    for (int v = 0; v < kV; ++v) shared.lanes[team][lane + v] = share.squares[v];
    shared.max_magnitude[thread] = share.max_magnitude;
    uint16_t nans = 0, infs = 0;
    if (special<To>(To::encode(as_float(share.top))) != 0) {  // encode is monotonic: else there are none
      for (int first = lane; first < n; first += kStatsLanes) {
        for (int i = first; i < first + kV && i < n; ++i) {
          const int kind = special<To>(read_element<Out>(dst + i * sizeof(Out)));
          infs = static_cast<uint16_t>(infs + (kind == 1));
          nans = static_cast<uint16_t>(nans + (kind == 2));
        }
      }
    }
    shared.nans[thread] = nans;
    shared.infs[thread] = infs;
  }

  // The first thread of a team writes the chunk's statistics.
  PYCOMM_DEVICE static void write_stats(const PackCall& call, const Tile& tile, int team_size, int thread,
                                        Shared& shared) {
    const int team = thread / team_size;
    const int64_t begin = tile.begin + team * kStatsChunk;
    if (thread % team_size != 0 || begin >= tile.count) return;
    constexpr int kHalf = kStatsLanes / 2;
    double sums[kHalf];  // the first step of fold()
    PYCOMM_UNROLL
    for (int i = 0; i < kHalf; ++i) sums[i] = shared.lanes[team][i] + shared.lanes[team][i + kHalf];
    ChunkStats stats{};
    stats.sum_squares = fold(sums, kHalf);
    for (int t = thread; t < thread + team_size; ++t) {
      if (shared.max_magnitude[t] > stats.max_magnitude) stats.max_magnitude = shared.max_magnitude[t];
      stats.nans = static_cast<uint16_t>(stats.nans + shared.nans[t]);
      stats.infs = static_cast<uint16_t>(stats.infs + shared.infs[t]);
    }
    call.chunks[tile.first_chunk + begin / kStatsChunk] = stats;
  }

  template <class F>
  PYCOMM_DEVICE static void cast_item(const PackCall& call, const Tile& tile, int thread, Shared& shared) {
    if constexpr (kPacks) {
      cast_tile<F, B>(call, tile, thread, shared);
    } else {
      cast_tile<B, F>(call, tile, thread, shared);
    }
  }

  PYCOMM_DEVICE static int item_size(DType dtype) {
    return dtype == DType::float32 ? 4 : dtype == DType::float16 || dtype == DType::bfloat16 ? 2 : 1;
  }

  PYCOMM_DEVICE static Tile find(const PackCall& call, uint32_t index) {
    int item = 0, end = call.num_items;  // `item` becomes the last whose first tile is at or before index
    while (end - item > 1) {
      const int middle = (item + end) / 2;
      if (call.first_tiles[middle] <= index) {
        item = middle;
      } else {
        end = middle;
      }
    }
    char* place =
        static_cast<char*>(call.bucket) + call.offsets[item] * static_cast<int64_t>(sizeof(typename B::Raw));
    char* tensor = static_cast<char*>(call.tensors[item]);
    const int vector = pack_vector(sizeof(typename B::Raw), item_size(call.dtypes[item]));
    return {.src = kPacks ? tensor : place,
            .dst = kPacks ? place : tensor,
            .count = call.counts[item],
            .begin = (index - call.first_tiles[item]) * pack_tile(vector),
            .first_chunk = call.first_chunks[item],
            .item = item};
  }

  template <class Block>
  PYCOMM_DEVICE static void run(Block& block, const PackCall& call, Shared& shared) {
    for (int64_t index = block.index(); index < call.tiles; index += block.blocks()) {
      const Tile tile = find(call, static_cast<uint32_t>(index));
      const DType dtype = call.dtypes[tile.item];
      block.each([&](int thread) {
        switch (dtype) {
          case DType::float32:
            return cast_item<Wide<float>>(call, tile, thread, shared);
          case DType::float16:
            return cast_item<Float16>(call, tile, thread, shared);
          case DType::bfloat16:
            return cast_item<BFloat16>(call, tile, thread, shared);
          case DType::float8_e4m3fn:
            return cast_item<Float8E4M3>(call, tile, thread, shared);
          case DType::float8_e5m2:
            return cast_item<Float8E5M2>(call, tile, thread, shared);
          default:
            return;  // there are no others
        }
      });
      block.sync();
      if (call.chunks) {
        const int team = kStatsLanes / pack_vector(sizeof(typename B::Raw), item_size(dtype));
        block.each([&](int thread) { write_stats(call, tile, team, thread, shared); });
        block.sync();
      }
    }
  }
};

// Folds the statistics of the chunks to those of the call.
struct FinishCall {
  const ChunkStats* chunks;
  int64_t count;
  Stats* stats;
};

struct Finish {
  using Args = FinishCall;
  static constexpr int kThreads = kStatsColumns;
  static constexpr int kResident = 1;
  struct Shared {
    double columns[kThreads];
    uint32_t max_magnitude[kThreads];
    int64_t nans[kThreads], infs[kThreads];
  };

  template <class Block>
  PYCOMM_DEVICE static void run(Block& block, const FinishCall& call, Shared& shared) {
    block.each([&](int column) {
      constexpr int kAhead = 8;
      double sum = 0;
      uint32_t most = 0;
      int64_t nans = 0, infs = 0;
      for (int64_t c = column; c < call.count; c += kAhead * kThreads) {
        ChunkStats chunk[kAhead];
        PYCOMM_UNROLL
        for (int a = 0; a < kAhead; ++a) {
          chunk[a] = c + a * kThreads < call.count ? call.chunks[c + a * kThreads] : ChunkStats{};
        }
        PYCOMM_UNROLL
        for (int a = 0; a < kAhead; ++a) {
          sum += chunk[a].sum_squares;
          most = chunk[a].max_magnitude > most ? chunk[a].max_magnitude : most;
          nans += chunk[a].nans;
          infs += chunk[a].infs;
        }
      }
      shared.columns[column] = sum;
      shared.max_magnitude[column] = most;
      shared.nans[column] = nans;
      shared.infs[column] = infs;
    });
    block.sync();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      block.each([&](int i) {
        if (i >= half) return;
        shared.columns[i] += shared.columns[i + half];
        const uint32_t other = shared.max_magnitude[i + half];
        if (other > shared.max_magnitude[i]) shared.max_magnitude[i] = other;
        shared.nans[i] += shared.nans[i + half];
        shared.infs[i] += shared.infs[i + half];
      });
      block.sync();
    }
    block.each([&](int i) {
      if (i != 0) return;
      call.stats->sum_squares = shared.columns[0];
      call.stats->max_abs = as_float(shared.max_magnitude[0]);
      call.stats->nans = shared.nans[0];
      call.stats->infs = shared.infs[0];
    });
    block.sync();
  }
};

inline int64_t count_chunks(std::span<const PackItem> items) {
  int64_t chunks = 0;
  for (const PackItem& item : items) chunks += (item.count + kStatsChunk - 1) / kStatsChunk;
  return chunks;
}

// Calls launch(call) for each launch that a list needs. `chunks`: room for the statistics of all chunks, or
// null.
template <class Launch>
void make_pack_calls(const PackArgs& args, ChunkStats* chunks, Launch launch) {
  PackCall call{};
  call.bucket = args.bucket;
  call.scale = static_cast<float>(args.scale);
  call.chunks = chunks;
  const auto size = static_cast<int64_t>(size_of(args.dtype));
  int64_t first_chunk = 0, tiles = 0;
  const auto flush = [&] {
    call.tiles = static_cast<uint32_t>(tiles);
    if (call.num_items > 0) launch(call);
    call.num_items = 0;
    tiles = 0;
  };
  for (const PackItem& item : args.items) {
    const void* place = static_cast<char*>(args.bucket) + item.offset * size;
    const bool as_is = item.dtype == args.dtype && call.scale == 1;
    const bool stays = as_is && place == item.tensor;
    if (item.count == 0 || (stays && !chunks)) continue;
    const int vector = pack_vector(size_of(args.dtype), size_of(item.dtype));
    const auto apart = [&](const void* p, size_t element) {
      return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(access_bytes(element * vector));
    };
    const int i = call.num_items++;
    call.tensors[i] = item.tensor;
    call.offsets[i] = item.offset;
    call.counts[i] = item.count;
    call.first_tiles[i] = static_cast<uint32_t>(tiles);
    call.first_chunks[i] = static_cast<uint32_t>(first_chunk);
    call.dtypes[i] = item.dtype;
    call.aligned[i] = apart(place, size_of(args.dtype)) == 0 && apart(item.tensor, size_of(item.dtype)) == 0;
    call.as_is[i] = as_is;
    call.store[i] = !stays;
    tiles += (item.count + pack_tile(vector) - 1) / pack_tile(vector);
    first_chunk += (item.count + kStatsChunk - 1) / kStatsChunk;
    if (call.num_items == kPackItems) flush();
  }
  flush();
}

template <class Visit>
bool pick_bucket(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::float32:
      return visit.template operator()<Wide<float>>(), true;
    case DType::float16:
      return visit.template operator()<Float16>(), true;
    case DType::bfloat16:
      return visit.template operator()<BFloat16>(), true;
    case DType::float8_e4m3fn:
      return visit.template operator()<Float8E4M3>(), true;
    case DType::float8_e5m2:
      return visit.template operator()<Float8E5M2>(), true;
    default:
      return false;
  }
}

}  // namespace pycomm::kernels::PYCOMM_ISA
