// The bodies of cuda::shared_amax(), shared_encode() and shared_decode(), over the lanes of lanes.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/codec.h"
#include "kernels/cuda/encoding.h"
#include "kernels/cuda/lanes.h"

namespace pycomm::kernels::PYCOMM_ISA {

struct SharedCall {
  const void* x;  // the input; the output of a decode
  void* q;
  const float* amax;
  float* new_amax;
  DType dtype;
  bool x_aligned, q_aligned;
  int width;
  int32_t limit;
  int64_t count;
  float divisor;
  EncodeCall encode;
};

inline constexpr int kLanesOfShared = static_cast<int>(kSharedBlock) / kOfLane;

PYCOMM_DEVICE Values read_shared(const SharedCall& call, const Lane16& at) {
  return with_residuals(call.encode, at, read_floats(call.dtype, call.x, at.begin, at.n, call.x_aligned));
}

struct SharedAmax {
  using Args = SharedCall;
  static constexpr int kThreads = kLanes;
  static constexpr int kResident = 1;
  struct Shared {
    uint32_t amax[kLanes];
  };

  template <class Block>
  PYCOMM_DEVICE static void run(Block& block, const SharedCall& call, Shared& shared) {
    for (int64_t half = block.index(); half * kHalf < call.count; half += block.blocks()) {
      block.each([&](int lane) {
        const Values values = read_shared(call, lane_of(half, lane, call.count));
        uint32_t most = 0;
        PYCOMM_UNROLL
        for (int i = 0; i < kOfLane; ++i) {
          const uint32_t magnitude = magnitude_of(values.v.x[i]);
          most = magnitude > most ? magnitude : most;
        }
        shared.amax[lane] = most;
      });
      block.sync();
      block.each([&](int lane) {
        const Lane16 at = lane_of(half, lane, call.count);
        if (lane % kLanesOfShared != 0 || at.n == 0) return;
        uint32_t most = 0;
        for (int l = lane; l < lane + kLanesOfShared; ++l)
          most = shared.amax[l] > most ? shared.amax[l] : most;
        call.new_amax[at.begin / kSharedBlock] = as_float(if_less(most, kFloatInf, most, kFloatNan));
      });
      block.sync();
    }
  }
};

template <class T>
PYCOMM_DEVICE void write_integers(void* q, const Lane16& at, bool aligned,
                                  const int32_t (&integers)[kOfLane]) {
  char* p = static_cast<char*>(q) + at.begin * static_cast<int64_t>(sizeof(T));
  Run<T, kOfLane> run;
  PYCOMM_UNROLL
  for (int i = 0; i < kOfLane; ++i) run.x[i] = static_cast<T>(integers[i]);
  if (aligned && at.n == kOfLane) return write_run(p, run);
  PYCOMM_UNROLL
  for (int i = 0; i < kOfLane; ++i) {
    if (i < at.n) write_element<T>(p + i * sizeof(T), run.x[i]);
  }
}

template <class T>
PYCOMM_DEVICE void read_integers(const void* q, const Lane16& at, bool aligned,
                                 int32_t (&integers)[kOfLane]) {
  const char* p = static_cast<const char*>(q) + at.begin * static_cast<int64_t>(sizeof(T));
  Run<T, kOfLane> run{};
  if (aligned && at.n == kOfLane) {
    run = read_run<T, kOfLane>(p);
  } else {
    PYCOMM_UNROLL
    for (int i = 0; i < kOfLane; ++i) {
      if (i < at.n) run.x[i] = read_element<T>(p + i * sizeof(T));
    }
  }
  PYCOMM_UNROLL
  for (int i = 0; i < kOfLane; ++i) integers[i] = run.x[i];
}

PYCOMM_DEVICE Sixteen decode_shared(const int32_t (&integers)[kOfLane], float s) {
  Sixteen decoded;
  PYCOMM_UNROLL
  for (int i = 0; i < kOfLane; ++i) decoded.x[i] = static_cast<float>(integers[i]) * s;
  return decoded;
}

struct SharedEncode {
  using Args = SharedCall;
  static constexpr int kThreads = kLanes;
  static constexpr int kResident = 1;
  struct Shared {};

  PYCOMM_DEVICE static void encode(const SharedCall& call, const Lane16& at) {
    const Values values = read_shared(call, at);
    const SharedCode code(call.limit);
    const float s = code.scale(call.amax[at.begin / kSharedBlock]);
    int32_t integers[kOfLane] = {};
    if (is_scale(s)) {
      const RandomBits<8> random = draw<8>(call.encode.draw, values.piece);
      PYCOMM_UNROLL
      for (int i = 0; i < kOfLane; ++i) integers[i] = code.encode(values.v.x[i], s, random.of(i));
    }
    if (call.width == 8) {
      write_integers<int8_t>(call.q, at, call.q_aligned, integers);
    } else if (call.width == 16) {
      write_integers<int16_t>(call.q, at, call.q_aligned, integers);
    } else {
      write_integers<int32_t>(call.q, at, call.q_aligned, integers);
    }
    if (!call.encode.next_residual) return;
    keep_residuals(call.encode, at, values, decode_shared(integers, s));
  }

  template <class Block>
  PYCOMM_DEVICE static void run(Block& block, const SharedCall& call, Shared&) {
    block.each([&](int lane) {
      for (int64_t half = block.index(); half * kHalf < call.count; half += block.blocks()) {
        const Lane16 at = lane_of(half, lane, call.count);
        if (at.n > 0) encode(call, at);
      }
    });
  }
};

struct SharedDecode {
  using Args = SharedCall;
  static constexpr int kThreads = kLanes;
  static constexpr int kResident = 1;
  struct Shared {};

  PYCOMM_DEVICE static void decode(const SharedCall& call, const Lane16& at) {
    int32_t integers[kOfLane];
    if (call.width == 8) {
      read_integers<int8_t>(call.q, at, call.q_aligned, integers);
    } else if (call.width == 16) {
      read_integers<int16_t>(call.q, at, call.q_aligned, integers);
    } else {
      read_integers<int32_t>(call.q, at, call.q_aligned, integers);
    }
    Sixteen x = decode_shared(integers, SharedCode(call.limit).scale(call.amax[at.begin / kSharedBlock]));
    if (call.divisor != 1) {
      PYCOMM_UNROLL
      for (int i = 0; i < kOfLane; ++i) x.x[i] = x.x[i] / call.divisor;
    }
    write_floats(call.dtype, const_cast<void*>(call.x), at.begin, at.n, call.x_aligned, x);
  }

  template <class Block>
  PYCOMM_DEVICE static void run(Block& block, const SharedCall& call, Shared&) {
    block.each([&](int lane) {
      for (int64_t half = block.index(); half * kHalf < call.count; half += block.blocks()) {
        const Lane16 at = lane_of(half, lane, call.count);
        if (at.n > 0) decode(call, at);
      }
    });
  }
};

// A call on elements [begin, begin + count); fields that only an encode needs stay zero.
inline SharedCall make_shared_call(DType dtype, const void* x, const void* q, int width, int64_t limit,
                                   const float* amax, int64_t begin, int64_t count) {
  SharedCall call{};
  const auto size = static_cast<int64_t>(size_of(dtype));
  call.x = static_cast<const char*>(x) + begin * size;
  call.q = q ? const_cast<char*>(static_cast<const char*>(q)) + begin * width / 8 : nullptr;
  call.amax = amax ? amax + begin / kSharedBlock : nullptr;
  call.dtype = dtype;
  call.x_aligned = is_aligned(call.x);
  call.q_aligned = is_aligned(call.q);
  call.width = width;
  call.limit = static_cast<int32_t>(limit);
  call.count = count;
  call.divisor = 1;
  return call;
}

}  // namespace pycomm::kernels::PYCOMM_ISA
