// The body of cuda::combine(), and how a call is turned into its arguments.
//
// A thread processes kVector elements of every source (16 bytes of a raw one) in groups of four sources,
// whose loads are all in flight before the first is used. A group is a subtree of four leaves; the subtrees
// form the balanced tree in the order of a binary counter (see cpu/combine_isa.cc). A call with few sources
// needs no stack, and a thread then processes two vectors at once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "kernels/arithmetic/ops.h"
#include "kernels/arithmetic/small_float.h"
#include "kernels/combine.h"
#include "kernels/cuda.h"
#include "kernels/cuda/memory.h"

namespace pycomm::kernels::PYCOMM_ISA {

inline constexpr int kOperands = kernels::cuda::kMaxOperands;

struct CombineCall {
  const void* srcs[kOperands];
  void* dsts[kOperands];
  bool raw[kOperands];  // true: the source is raw; false: partial
  int num_srcs, num_dsts;
  bool partial;  // true: the destinations are partial; false: final
  // Elements [head, head + vectors * kVector) are processed in vectors, those before and after one by one.
  int64_t count, head, vectors;
  double prescale, divisor;
};

inline constexpr int kGroup = 4;   // sources that are loaded at once
inline constexpr int kLevels = 5;  // depth of the stack of groups: kOperands / kGroup = 2^kLevels
static_assert(kOperands == kGroup << kLevels);

// Elements of format F with the operator O; kMany: more sources than one group has.
template <class F, class O, bool kMany>
struct Combine {
  using Args = CombineCall;
  using Raw = typename F::Raw;
  using Value = typename F::Value;
  using Partial = Plain<Value>;
  static constexpr int kThreads = 256;
  static constexpr int kResident = 1;
  static constexpr int kVector = kAccess / static_cast<int>(sizeof(Raw));
  static constexpr int kVectors = kMany ? 1 : 2;  // that a thread processes at once
  struct Shared {};

  template <int kN>
  struct Values {
    Value x[kN];
  };

  // Reads one element (at any address) or a vector of elements from `at` on.
  template <class T, int kN>
  PYCOMM_DEVICE static Run<T, kN> read(const void* base, int64_t at) {
    const void* p = static_cast<const char*>(base) + at * static_cast<int64_t>(sizeof(T));
    if constexpr (kN == 1) {
      return {{read_element<T>(p)}};
    } else {
      return read_run<T, kN>(p);
    }
  }
  template <class T, int kN>
  PYCOMM_DEVICE static void write(void* base, int64_t at, const Run<T, kN>& run) {
    void* p = static_cast<char*>(base) + at * static_cast<int64_t>(sizeof(T));
    if constexpr (kN == 1) {
      write_element<T>(p, run.x[0]);
    } else {
      write_run<T, kN>(p, run);
    }
  }

  template <int kN>
  PYCOMM_DEVICE static Values<kN> leaf(const CombineCall& call, int j, int64_t at, const Run<Raw, kN>& raw) {
    Values<kN> leaf;
    if (call.raw[j] || sizeof(Raw) == sizeof(Value)) {
      PYCOMM_UNROLL
      for (int i = 0; i < kN; ++i) {
        leaf.x[i] = F::decode(raw.x[i]);
        if constexpr (kIsFloat<Value>) {
          leaf.x[i] = leaf.x[i] * static_cast<Value>(call.raw[j] ? call.prescale : 1.0);
        }
      }
    } else {
      const auto partial = read<Value, kN>(call.srcs[j], at);
      PYCOMM_UNROLL
      for (int i = 0; i < kN; ++i) leaf.x[i] = partial.x[i];
    }
    return leaf;
  }

  template <int kN>
  PYCOMM_DEVICE static Values<kN> merge(const Values<kN>& a, const Values<kN>& b) {
    Values<kN> merged;
    PYCOMM_UNROLL
    for (int i = 0; i < kN; ++i) merged.x[i] = O::apply(a.x[i], b.x[i]);
    return merged;
  }

  template <int kN>
  struct Group {
    Run<Raw, kN> raw[kGroup];
  };

  template <int kN>
  PYCOMM_DEVICE static void load(const CombineCall& call, int first, int64_t at, Group<kN>& group) {
    PYCOMM_UNROLL
    for (int u = 0; u < kGroup; ++u) {
      if (first + u < call.num_srcs && (call.raw[first + u] || sizeof(Raw) == sizeof(Value))) {
        group.raw[u] = read<Raw, kN>(call.srcs[first + u], at);
      } else {
        group.raw[u] = {};
      }
    }
  }

  // Combines the one to four leaves of a group, as a tree.
  template <int kN>
  PYCOMM_DEVICE static Values<kN> reduce(const CombineCall& call, int first, int64_t at,
                                         const Group<kN>& group) {
    const int leaves = call.num_srcs - first;
    Values<kN> left = leaf<kN>(call, first, at, group.raw[0]);
    if (leaves > 1) left = merge(left, leaf<kN>(call, first + 1, at, group.raw[1]));
    if (leaves > 2) {
      Values<kN> right = leaf<kN>(call, first + 2, at, group.raw[2]);
      if (leaves > 3) right = merge(right, leaf<kN>(call, first + 3, at, group.raw[3]));
      left = merge(left, right);
    }
    return left;
  }

  template <class To, int kN>
  PYCOMM_DEVICE static void store_as(const CombineCall& call, int64_t at, const Values<kN>& values) {
    Run<typename To::Raw, kN> run;
    PYCOMM_UNROLL
    for (int i = 0; i < kN; ++i) run.x[i] = To::encode(values.x[i]);
    for (int d = 0; d < call.num_dsts; ++d) write(call.dsts[d], at, run);
  }

  template <int kN>
  PYCOMM_DEVICE static void store(const CombineCall& call, int64_t at, Values<kN> values) {
    if (call.partial) return store_as<Partial>(call, at, values);
    if constexpr (kIsFloat<Value> && kIsSum<O>) {
      if (call.divisor != 1) {
        PYCOMM_UNROLL
        for (int i = 0; i < kN; ++i) values.x[i] = values.x[i] / static_cast<Value>(call.divisor);
      }
    }
    store_as<F>(call, at, values);
  }

  template <int kN>
  PYCOMM_DEVICE static void many(const CombineCall& call, int64_t at) {
    Values<kN> stack[kLevels] = {};
    Group<kN> group;
    for (int first = 0, done = 0;; first += kGroup, ++done) {
      load(call, first, at, group);
      Values<kN> tree = reduce(call, first, at, group);
      const bool last = first + kGroup >= call.num_srcs;
      bool carried = true;
      PYCOMM_UNROLL
      for (int level = 0; level < kLevels; ++level) {
        if (carried && (done >> level & 1)) {
          tree = merge(stack[level], tree);
        } else if (carried && !last) {
          stack[level] = tree;
          carried = false;
        }
      }
      if (last) return store(call, at, tree);
    }
  }

  // Combines the vectors v, v + kThreads, ... that exist.
  PYCOMM_DEVICE static void few(const CombineCall& call, int64_t v) {
    Group<kVector> group[kVectors];
    PYCOMM_UNROLL
    for (int u = 0; u < kVectors; ++u) {
      if (v + u * kThreads < call.vectors) load(call, 0, place(call, v + u * kThreads), group[u]);
    }
    PYCOMM_UNROLL
    for (int u = 0; u < kVectors; ++u) {
      if (v + u * kThreads < call.vectors) {
        const int64_t at = place(call, v + u * kThreads);
        store(call, at, reduce(call, 0, at, group[u]));
      }
    }
  }

  PYCOMM_DEVICE static int64_t place(const CombineCall& call, int64_t v) { return call.head + v * kVector; }

  PYCOMM_DEVICE static void element(const CombineCall& call, int64_t at) {
    if constexpr (kMany) {
      many<1>(call, at);
    } else {
      Group<1> group;
      load(call, 0, at, group);
      store(call, at, reduce(call, 0, at, group));
    }
  }

  template <class Block>
  PYCOMM_DEVICE static void run(Block& block, const CombineCall& call, Shared&) {
    block.each([&](int thread) {
      const int64_t blocks = block.blocks(), index = block.index();
      constexpr int kStep = kThreads * kVectors;
      for (int64_t v = index * kStep + thread; v < call.vectors; v += blocks * kStep) {
        if constexpr (kMany) {
          many<kVector>(call, place(call, v));
        } else {
          few(call, v);
        }
      }
      const int64_t edges = call.count - call.vectors * kVector;
      for (int64_t i = index * kThreads + thread; i < edges; i += blocks * kThreads) {
        element(call, i < call.head ? i : i + call.vectors * kVector);
      }
    });
  }

  // How many blocks have work.
  static int64_t blocks(const CombineCall& call) {
    const int64_t steps = (call.vectors + kThreads * kVectors - 1) / (kThreads * kVectors);
    const int64_t edges = (call.count - call.vectors * kVector + kThreads - 1) / kThreads;
    return steps > edges ? steps : edges;
  }
};

// Calls run.template operator()<F, O, parts>() with the format and operator of a pair; an element of dtype is
// `parts` elements of F. False if there is no such pair.
template <class F, class Run>
bool pick_float(Op op, Run& run) {
  switch (op) {
    case Op::sum:
    case Op::avg:
      return run.template operator()<F, Sum, 1>(), true;
    case Op::prod:
      return run.template operator()<F, Prod, 1>(), true;
    case Op::min:
      return run.template operator()<F, Min, 1>(), true;
    case Op::max:
      return run.template operator()<F, Max, 1>(), true;
    case Op::band:
    case Op::bor:
    case Op::bxor:
      return false;
  }
  return false;
}

// Bitwise operators treat elements of any width as bytes.
template <int kBytes, class Run>
bool pick_bits(Op op, Run& run) {
  switch (op) {
    case Op::band:
      return run.template operator()<Plain<uint8_t>, Band, kBytes>(), true;
    case Op::bor:
      return run.template operator()<Plain<uint8_t>, Bor, kBytes>(), true;
    case Op::bxor:
      return run.template operator()<Plain<uint8_t>, Bxor, kBytes>(), true;
    case Op::sum:
    case Op::prod:
    case Op::min:
    case Op::max:
    case Op::avg:
      return false;
  }
  return false;
}

template <class T, class Unsigned, class Run>
bool pick_integer(Op op, Run& run) {
  switch (op) {
    case Op::sum:
      return run.template operator()<Plain<Unsigned>, Sum, 1>(), true;
    case Op::prod:
      return run.template operator()<Plain<Unsigned>, Prod, 1>(), true;
    case Op::min:
      return run.template operator()<Plain<T>, Min, 1>(), true;
    case Op::max:
      return run.template operator()<Plain<T>, Max, 1>(), true;
    case Op::avg:
      return false;
    case Op::band:
    case Op::bor:
    case Op::bxor:
      return pick_bits<sizeof(T)>(op, run);
  }
  return false;
}

template <class T, class Run>
bool pick_complex(Op op, Run& run) {
  switch (op) {
    case Op::sum:
    case Op::avg:
      return run.template operator()<Wide<T>, Sum, 2>(), true;
    case Op::prod:
      return run.template operator()<Wide<Complex<T>>, Prod, 1>(), true;
    case Op::min:
    case Op::max:
    case Op::band:
    case Op::bor:
    case Op::bxor:
      return false;
  }
  return false;
}

template <class Run>
bool pick_combine(DType dtype, Op op, Run run) {
  switch (dtype) {
    case DType::float32:
      return pick_float<Wide<float>>(op, run);
    case DType::float64:
      return pick_float<Wide<double>>(op, run);
    case DType::float16:
      return pick_float<Float16>(op, run);
    case DType::bfloat16:
      return pick_float<BFloat16>(op, run);
    case DType::float8_e4m3fn:
      return pick_float<Float8E4M3>(op, run);
    case DType::float8_e5m2:
      return pick_float<Float8E5M2>(op, run);
    case DType::int8:
      return pick_integer<int8_t, uint8_t>(op, run);
    case DType::int16:
      return pick_integer<int16_t, uint16_t>(op, run);
    case DType::int32:
      return pick_integer<int32_t, uint32_t>(op, run);
    case DType::int64:
      return pick_integer<int64_t, uint64_t>(op, run);
    case DType::uint8:
      return pick_integer<uint8_t, uint8_t>(op, run);
    case DType::uint16:
      return pick_integer<uint16_t, uint16_t>(op, run);
    case DType::uint32:
      return pick_integer<uint32_t, uint32_t>(op, run);
    case DType::uint64:
      return pick_integer<uint64_t, uint64_t>(op, run);
    case DType::bool_:
      if (op == Op::min) op = Op::band;
      if (op == Op::max) op = Op::bor;
      return pick_bits<1>(op, run);
    case DType::complex64:
      return pick_complex<float>(op, run);
    case DType::complex128:
      return pick_complex<double>(op, run);
  }
  return false;
}

// The call in elements of Raw and Value; each of the caller's elements is `parts` of them.
template <class Raw, class Value>
CombineCall make_combine_call(const CombineArgs& args, int parts) {
  constexpr int64_t kVector = kAccess / static_cast<int64_t>(sizeof(Raw));
  CombineCall call{};
  call.num_srcs = args.num_srcs;
  call.num_dsts = args.num_dsts;
  call.partial = args.dst_format == Format::partial;
  call.count = static_cast<int64_t>(args.count) * parts;
  call.prescale = args.prescale;
  call.divisor = args.divisor;
  // The elements before the first vector of the first destination; a vector of every other operand must begin
  // there, too.
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const auto size = [](bool raw) { return raw ? sizeof(Raw) : sizeof(Value); };
  int64_t head = 0;
  while (head < kVector && (address(args.dsts[0]) + head * size(!call.partial)) % kAccess != 0) ++head;
  bool aligned = head < kVector && head < call.count;
  for (int j = 0; j < args.num_srcs; ++j) {
    call.srcs[j] = args.srcs[j];
    call.raw[j] = args.src_formats[j] != Format::partial;
    aligned = aligned && (address(args.srcs[j]) + head * size(call.raw[j])) % kAccess == 0;
  }
  for (int d = 0; d < args.num_dsts; ++d) {
    call.dsts[d] = args.dsts[d];
    aligned = aligned && (address(args.dsts[d]) + head * size(!call.partial)) % kAccess == 0;
  }
  call.head = aligned ? head : call.count;
  call.vectors = aligned ? (call.count - head) / kVector : 0;
  return call;
}

}  // namespace pycomm::kernels::PYCOMM_ISA
