// The bodies of cuda::transcode(), and how a call is turned into their arguments.
//
// A lane (lanes.h) reads its elements of every source, decodes them and sums them as the balanced tree, in
// groups of four sources as in combine.h. To encode, the lanes of a block exchange their largest magnitudes;
// with sign also the magnitudes, with rotated blocks also the values.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/codec.h"
#include "kernels/cuda.h"
#include "kernels/cuda/encoding.h"
#include "kernels/cuda/lanes.h"

namespace pycomm::kernels::PYCOMM_ISA {

struct RotatedCode : Int4Code {};

template <class A, class B>
inline constexpr bool kIs = false;
template <class A>
inline constexpr bool kIs<A, A> = true;

template <class C>
concept Scaled = requires { typename C::Scale; };

// The layout of a codec's tile on the wire.
template <class C>
struct Wire {
  static constexpr int kBlock = kTile;
  static constexpr int kScaleBytes = 0;
  static constexpr int kTileBytes = kTile * C::kBits / 8;
  static constexpr int kRandomBits = C::kRandomBits;
};
template <Scaled C>
struct Wire<C> {
  static constexpr int kBlock = C::kBlock;
  static constexpr int kScaleBytes = static_cast<int>(kTile / C::kBlock * sizeof(typename C::Scale));
  static constexpr int kTileBytes = kScaleBytes + kTile * C::kBits / 8;
  static constexpr int kRandomBits = 8;
};

inline constexpr int kWireOperands = kernels::cuda::kMaxOperands;

struct TranscodeCall {
  const void* srcs[kWireOperands];
  void* dsts[kWireOperands];
  Format formats[kWireOperands];
  bool src_aligned[kWireOperands], dst_aligned[kWireOperands];
  int num_srcs, num_dsts;
  DType dtype;
  bool partial;  // floats are written as partial results, else as final ones
  int64_t count;
  float prescale, divisor;
  EncodeCall encode;
};

// The codes of a lane, as bytes.
template <class C, int kElements = kOfLane>
struct Codes {
  static constexpr int kBytes = kElements * C::kBits / 8;
  Run<uint8_t, kBytes> bytes;

  PYCOMM_DEVICE uint32_t get(int i) const {
    if constexpr (C::kBits == 16) {
      return bytes.x[2 * i] | static_cast<uint32_t>(bytes.x[2 * i + 1]) << 8;
    } else {
      constexpr int kPerByte = 8 / C::kBits;
      return bytes.x[i / kPerByte] >> i % kPerByte * C::kBits & ((1u << C::kBits) - 1);
    }
  }
  // The code's bits must be zero before.
  PYCOMM_DEVICE void put(int i, uint32_t code) {
    if constexpr (C::kBits == 16) {
      bytes.x[2 * i] = static_cast<uint8_t>(code);
      bytes.x[2 * i + 1] = static_cast<uint8_t>(code >> 8);
    } else {
      constexpr int kPerByte = 8 / C::kBits;
      bytes.x[i / kPerByte] = static_cast<uint8_t>(bytes.x[i / kPerByte] | code << i % kPerByte * C::kBits);
    }
  }
};

// How many bytes the codes of a tile of n elements take; up to 16 of them lie beyond the last element's.
template <class C>
PYCOMM_DEVICE int code_area(int n) {
  return ((n * C::kBits + 7) / 8 + kAccess - 1) / kAccess * kAccess;
}

template <int kBytes>
PYCOMM_DEVICE Run<uint8_t, kBytes> read_bytes(const char* p, bool aligned) {
  if (aligned) return read_run<uint8_t, kBytes>(p);
  Run<uint8_t, kBytes> run;
  PYCOMM_UNROLL
  for (int b = 0; b < kBytes; ++b) run.x[b] = static_cast<uint8_t>(p[b]);
  return run;
}

template <int kBytes>
PYCOMM_DEVICE void write_bytes(char* p, bool aligned, const Run<uint8_t, kBytes>& run) {
  if (aligned) return write_run(p, run);
  PYCOMM_UNROLL
  for (int b = 0; b < kBytes; ++b) p[b] = static_cast<char>(run.x[b]);
}

// The codes from element `first` of a tile on; zeros beyond the tile's end.
template <class C, int kElements>
PYCOMM_DEVICE Codes<C, kElements> read_codes(const void* wire, bool aligned, const Lane16& at, int first) {
  constexpr int kBytes = Codes<C, kElements>::kBytes;
  const char* p = static_cast<const char*>(wire) + at.tile * Wire<C>::kTileBytes + Wire<C>::kScaleBytes;
  const int offset = first * C::kBits / 8, area = code_area<C>(at.tile_n);
  Codes<C, kElements> codes{};
  if (offset + kBytes <= area) {
    codes.bytes = read_bytes<kBytes>(p + offset, aligned);
  } else if constexpr (kBytes > kAccess) {
    if (offset < area) {
      const auto half = read_bytes<kAccess>(p + offset, aligned);
      PYCOMM_UNROLL
      for (int b = 0; b < kAccess; ++b) codes.bytes.x[b] = half.x[b];
    }
  }
  return codes;
}

template <class C>
PYCOMM_DEVICE void write_codes(void* wire, bool aligned, const Lane16& at, const Codes<C>& codes) {
  constexpr int kBytes = Codes<C>::kBytes;
  char* p = static_cast<char*>(wire) + at.tile * Wire<C>::kTileBytes + Wire<C>::kScaleBytes;
  const int offset = at.of_tile * C::kBits / 8, area = code_area<C>(at.tile_n);
  if (offset + kBytes <= area) {
    write_bytes(p + offset, aligned, codes.bytes);
  } else if constexpr (kBytes > kAccess) {
    if (offset < area) {
      Run<uint8_t, kAccess> half;
      PYCOMM_UNROLL
      for (int b = 0; b < kAccess; ++b) half.x[b] = codes.bytes.x[b];
      write_bytes(p + offset, aligned, half);
    }
  }
}

template <Scaled C>
PYCOMM_DEVICE const char* scale_at(const void* wire, const Lane16& at) {
  return static_cast<const char*>(wire) + at.tile * Wire<C>::kTileBytes +
         at.of_tile / C::kBlock * static_cast<int>(sizeof(typename C::Scale));
}

// The steps of the Hadamard transform on elements that are 8, 4, 2 and 1 apart.
template <class T>
PYCOMM_DEVICE void rotate_lane(T (&x)[kOfLane]) {
  PYCOMM_UNROLL
  for (int apart = kOfLane / 2; apart > 0; apart /= 2) {
    PYCOMM_UNROLL
    for (int i = 0; i < kOfLane; ++i) {
      if ((i & apart) == 0) {
        const T a = x[i], b = x[i + apart];
        x[i] = a + b;
        x[i + apart] = a - b;
      }
    }
  }
}

// Decodes the elements of one of the two lanes that share a rotated block.
PYCOMM_DEVICE Sixteen decode_rotated(const Codes<RotatedCode, 2 * kOfLane>& codes, bool second, float s) {
  int32_t sums[kOfLane];
  PYCOMM_UNROLL
  for (int i = 0; i < kOfLane; ++i) {
    const int32_t a = Int4Code::integer(codes.get(i)), b = Int4Code::integer(codes.get(i + kOfLane));
    sums[i] = second ? a - b : a + b;
  }
  rotate_lane(sums);
  Sixteen decoded;
  PYCOMM_UNROLL
  for (int i = 0; i < kOfLane; ++i) decoded.x[i] = Hadamard::decode(sums[i], s);
  return decoded;
}

template <class C>
PYCOMM_DEVICE Sixteen decode_codes(const Codes<C>& codes, [[maybe_unused]] float s) {
  Sixteen decoded;
  PYCOMM_UNROLL
  for (int i = 0; i < kOfLane; ++i) {
    if constexpr (Scaled<C>) {
      decoded.x[i] = C::decode(codes.get(i), s);
    } else {
      decoded.x[i] = C::decode(static_cast<uint16_t>(codes.get(i)));
    }
  }
  return decoded;
}

template <class C>
PYCOMM_DEVICE Sixteen read_wire(const void* wire, bool aligned, const Lane16& at) {
  float s = 0;
  if constexpr (Scaled<C>) s = C::value(read_element<typename C::Scale>(scale_at<C>(wire, at)));
  if constexpr (kIs<C, RotatedCode>) {
    const int first = at.of_tile / C::kBlock * C::kBlock;
    return decode_rotated(read_codes<C, 2 * kOfLane>(wire, aligned, at, first), first != at.of_tile, s);
  } else {
    return decode_codes<C>(read_codes<C, kOfLane>(wire, aligned, at, at.of_tile), s);
  }
}

// Sums a lane's elements over all sources; kMany: there are more than four.
template <class C, bool kMany>
struct Sources {
  static constexpr int kGroup = 4, kLevels = 5;
  static_assert(kWireOperands == kGroup << kLevels);

  PYCOMM_DEVICE static Sixteen leaf(const TranscodeCall& call, int j, const Lane16& at) {
    const Format format = call.formats[j];
    if (format == Format::wire) return read_wire<C>(call.srcs[j], call.src_aligned[j], at);
    const DType dtype = format == Format::partial ? DType::float32 : call.dtype;
    const float prescale = format == Format::partial ? 1.0f : call.prescale;
    Sixteen lane = read_floats(dtype, call.srcs[j], at.begin, at.n, call.src_aligned[j]);
    PYCOMM_UNROLL
    for (int i = 0; i < kOfLane; ++i) lane.x[i] = lane.x[i] * prescale;
    return lane;
  }

  PYCOMM_DEVICE static void add(Sixteen& a, const Sixteen& b) {
    PYCOMM_UNROLL
    for (int i = 0; i < kOfLane; ++i) a.x[i] = a.x[i] + b.x[i];
  }

  // The tree of those of the sources [first, first + 4) that exist.
  PYCOMM_DEVICE static Sixteen group(const TranscodeCall& call, int first, const Lane16& at) {
    const int leaves = call.num_srcs - first;
    Sixteen left = leaf(call, first, at);
    if (leaves > 1) add(left, leaf(call, first + 1, at));
    if (leaves > 2) {
      Sixteen right = leaf(call, first + 2, at);
      if (leaves > 3) add(right, leaf(call, first + 3, at));
      add(left, right);
    }
    return left;
  }

  PYCOMM_DEVICE static Sixteen sum(const TranscodeCall& call, const Lane16& at) {
    if constexpr (!kMany) return group(call, 0, at);
    Sixteen stack[kLevels] = {};
    for (int first = 0, done = 0;; first += kGroup, ++done) {
      Sixteen tree = group(call, first, at);
      const bool last = first + kGroup >= call.num_srcs;
      bool carried = true;
      PYCOMM_UNROLL
      for (int level = 0; level < kLevels; ++level) {
        if (carried && (done >> level & 1)) {
          add(stack[level], tree);
          tree = stack[level];
        } else if (carried && !last) {
          stack[level] = tree;
          carried = false;
        }
      }
      if (last) return tree;
    }
  }
};

PYCOMM_DEVICE void divide(const TranscodeCall& call, Sixteen& lane) {
  if (call.divisor == 1) return;
  PYCOMM_UNROLL
  for (int i = 0; i < kOfLane; ++i) lane.x[i] = lane.x[i] / call.divisor;
}

// Transcodes to floats.
template <class C, bool kMany>
struct Decode {
  using Args = TranscodeCall;
  static constexpr int kThreads = kLanes;
  static constexpr int kResident = 1;
  struct Shared {};

  template <class Block>
  PYCOMM_DEVICE static void run(Block& block, const TranscodeCall& call, Shared&) {
    block.each([&](int lane) {
      for (int64_t half = block.index(); half * kHalf < call.count; half += block.blocks()) {
        const Lane16 at = lane_of(half, lane, call.count);
        if (at.n == 0) continue;
        Sixteen sum = Sources<C, kMany>::sum(call, at);
        if (!call.partial) divide(call, sum);
        const DType dtype = call.partial ? DType::float32 : call.dtype;
        for (int d = 0; d < call.num_dsts; ++d) {
          write_floats(dtype, call.dsts[d], at.begin, at.n, call.dst_aligned[d], sum);
        }
      }
    });
  }
};

// Sums 8 elements by halves: a[0] + a[4], ...
PYCOMM_DEVICE float fold8(const float* a, int stride) {
  const float a0 = a[0] + a[4 * stride], a1 = a[stride] + a[5 * stride];
  const float a2 = a[2 * stride] + a[6 * stride], a3 = a[3 * stride] + a[7 * stride];
  return (a0 + a2) + (a1 + a3);
}

// Transcodes to the wire.
template <class C, bool kMany>
struct Encode {
  using Args = TranscodeCall;
  static constexpr int kThreads = kLanes;
  static constexpr int kResident = 1;
  static constexpr bool kSign = kIs<C, SignCode>, kRotated = kIs<C, RotatedCode>;
  static constexpr int kLanesOfBlock = Wire<C>::kBlock / kOfLane;

  struct Shared {
    uint32_t amax[kLanes];
    float sums[kLanes];
    float values[kSign || kRotated ? kLanes : 1][kOfLane + 1];  // odd rows avoid bank conflicts
    Codes<C> codes[kRotated ? kLanes : 1];
  };

  // What a lane keeps from one each() to the next.
  struct State {
    Lane16 at;
    Values in;
    Sixteen y;  // the rotated values
    float s;
  };

  PYCOMM_DEVICE static uint32_t largest(const Sixteen& lane) {
    uint32_t most = 0;
    PYCOMM_UNROLL
    for (int i = 0; i < kOfLane; ++i) {
      const uint32_t magnitude = magnitude_of(lane.x[i]);
      most = magnitude > most ? magnitude : most;
    }
    return most;
  }

  // Computes the values to encode: the sum, divided, with its residual; zeros between tensors.
  PYCOMM_DEVICE static void gather(const TranscodeCall& call, State& state) {
    const Lane16& at = state.at;
    Sixteen v = Sources<C, kMany>::sum(call, at);
    divide(call, v);
    state.in = with_residuals(call.encode, at, v);
  }

  PYCOMM_DEVICE static auto scale_of(const State& state, int lane, const Shared& shared) {
    const int first = lane / kLanesOfBlock * kLanesOfBlock;
    uint32_t amax = 0;
    PYCOMM_UNROLL
    for (int l = 0; l < kLanesOfBlock; ++l)
      amax = shared.amax[first + l] > amax ? shared.amax[first + l] : amax;
    if constexpr (kSign) {
      const int count = state.in.piece.present + (lane - first) * kOfLane;
      const int there = count < 0 ? 0 : count > C::kBlock ? C::kBlock : count;
      return C::scale(amax, fold8(&shared.sums[first], 1), there);
    } else {
      return C::scale(amax);
    }
  }

  template <bool kStochastic>
  PYCOMM_DEVICE static Codes<C> encode_as(const Sixteen& x, [[maybe_unused]] float s,
                                          const RandomBits<Wire<C>::kRandomBits>& random) {
    Codes<C> codes{};
    [[maybe_unused]] const float factor = inverse(s);
    PYCOMM_UNROLL
    for (int i = 0; i < kOfLane; ++i) {
      if constexpr (kSign) {
        codes.put(i, C::encode(x.x[i]));
      } else if constexpr (Scaled<C>) {
        codes.put(i, C::template round<kStochastic>(x.x[i] * factor, random.of(i)));
      } else {
        codes.put(i, C::template encode<kStochastic>(x.x[i], random.of(i)));
      }
    }
    return codes;
  }

  PYCOMM_DEVICE static Codes<C> encode(const TranscodeCall& call, const State& state) {
    const Sixteen& x = kRotated ? state.y : state.in.v;
    const RandomBits<Wire<C>::kRandomBits> none{};
    if constexpr (Scaled<C>) {
      if (!is_scale(state.s)) return {};
    }
    if constexpr (!kSign) {
      if (call.encode.draw.stochastic) {
        return encode_as<true>(x, state.s, draw<Wire<C>::kRandomBits>(call.encode.draw, state.in.piece));
      }
    }
    return encode_as<false>(x, state.s, none);
  }

  template <class Block>
  PYCOMM_DEVICE static void run(Block& block, const TranscodeCall& call, Shared& shared) {
    typename Block::template PerThread<State> states;
    const int64_t halves = (call.count + kTile - 1) / kTile * 2;
    for (int64_t half = block.index(); half < halves; half += block.blocks()) {
      block.each([&](int lane) {
        State& state = states[lane];
        state.at = lane_of(half, lane, call.count);
        gather(call, state);
        shared.amax[lane] = largest(state.in.v);
        if constexpr (kSign || kRotated) {
          PYCOMM_UNROLL
          for (int i = 0; i < kOfLane; ++i) {
            shared.values[lane][i] =
                kSign ? SignCode::share(state.in.v.x[i]) : Hadamard::share(state.in.v.x[i]);
          }
        }
      });
      block.sync();
      if constexpr (kSign) {
        block.each([&](int lane) {  // a lane sums two columns of its block's 8 x 16 shares
          const int first = lane / 8 * 8, column = lane % 8;
          shared.sums[lane] = fold8(&shared.values[first][column], kOfLane + 1) +
                              fold8(&shared.values[first][column + 8], kOfLane + 1);
        });
        block.sync();
      }
      if constexpr (kRotated) {
        block.each([&](int lane) {
          State& state = states[lane];
          const bool second = lane % 2 != 0;
          PYCOMM_UNROLL
          for (int i = 0; i < kOfLane; ++i) {
            const float a = shared.values[lane / 2 * 2][i], b = shared.values[lane / 2 * 2 + 1][i];
            state.y.x[i] = second ? a - b : a + b;
          }
          rotate_lane(state.y.x);
          shared.amax[lane] = largest(state.y);
        });
        block.sync();
      }
      block.each([&](int lane) {
        State& state = states[lane];
        const Lane16& at = state.at;
        state.s = 0;
        if constexpr (Scaled<C>) {
          const auto scale = scale_of(state, lane, shared);
          state.s = C::value(scale);
          if (lane % kLanesOfBlock == 0) {
            for (int d = 0; d < call.num_dsts; ++d) {
              write_element(const_cast<char*>(scale_at<C>(call.dsts[d], at)), scale);
            }
          }
        }
        const Codes<C> codes = encode(call, state);
        for (int d = 0; d < call.num_dsts; ++d) write_codes<C>(call.dsts[d], call.dst_aligned[d], at, codes);
        if constexpr (kRotated) {
          shared.codes[lane] = codes;
        } else if (call.encode.next_residual) {
          keep_residuals(call.encode, state.at, state.in, decode_codes<C>(codes, state.s));
        }
      });
      block.sync();
      if constexpr (kRotated) {
        block.each([&](int lane) {
          if (!call.encode.next_residual) return;
          const State& state = states[lane];
          Codes<C, 2 * kOfLane> codes;
          PYCOMM_UNROLL
          for (int b = 0; b < Codes<C>::kBytes; ++b) {
            codes.bytes.x[b] = shared.codes[lane / 2 * 2].bytes.x[b];
            codes.bytes.x[b + Codes<C>::kBytes] = shared.codes[lane / 2 * 2 + 1].bytes.x[b];
          }
          keep_residuals(call.encode, state.at, state.in, decode_rotated(codes, lane % 2 != 0, state.s));
        });
        block.sync();
      }
    }
  }
};

// Calls visit.template operator()<C>() with C the arithmetic of the codec.
template <class Visit>
bool pick_codec(const Codec& codec, Visit visit) {
  switch (codec.kind) {
    case CodecKind::none:
      return false;
    case CodecKind::fp16:
      return visit.template operator()<Float16Code>(), true;
    case CodecKind::bf16:
      return visit.template operator()<BFloat16Code>(), true;
    case CodecKind::fp8_e4m3:
      return visit.template operator()<Float8E4M3Code>(), true;
    case CodecKind::fp8_e5m2:
      return visit.template operator()<Float8E5M2Code>(), true;
    case CodecKind::mxfp8:
      if (codec.ceil_scale) return visit.template operator()<Mxfp8Code<true>>(), true;
      return visit.template operator()<Mxfp8Code<false>>(), true;
    case CodecKind::int8:
      return visit.template operator()<Int8Code>(), true;
    case CodecKind::int4:
      if (codec.hadamard) return visit.template operator()<RotatedCode>(), true;
      return visit.template operator()<Int4Code>(), true;
    case CodecKind::sign:
      return visit.template operator()<SignCode>(), true;
  }
  return false;
}

// The arguments of the launch for elements [begin, begin + count).
inline TranscodeCall make_transcode_call(const TranscodeArgs& args, int64_t tile_bytes, int64_t begin,
                                         int64_t count, const Segments& segments) {
  TranscodeCall call{};
  const auto at = [&](const void* p, Format format) {
    const int64_t size = format == Format::partial ? 4 : static_cast<int64_t>(size_of(args.dtype));
    return static_cast<const char*>(p) + (format == Format::wire ? begin / kTile * tile_bytes : begin * size);
  };
  for (int j = 0; j < args.num_srcs; ++j) {
    call.srcs[j] = at(args.srcs[j], args.src_formats[j]);
    call.formats[j] = args.src_formats[j];
    call.src_aligned[j] = is_aligned(call.srcs[j]);
  }
  for (int d = 0; d < args.num_dsts; ++d) {
    call.dsts[d] = const_cast<char*>(at(args.dsts[d], args.dst_format));
    call.dst_aligned[d] = is_aligned(call.dsts[d]);
  }
  call.num_srcs = args.num_srcs;
  call.num_dsts = args.num_dsts;
  call.dtype = args.dtype;
  call.partial = args.dst_format == Format::partial;
  call.count = count;
  call.prescale = static_cast<float>(args.prescale);
  call.divisor = static_cast<float>(args.divisor);
  call.encode = make_encode_call(args.encoding, args.codec->rounding == Rounding::stochastic,
                                 args.codec->seed, begin, count, segments);
  return call;
}

}  // namespace pycomm::kernels::PYCOMM_ISA
