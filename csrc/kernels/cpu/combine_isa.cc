// The inner loops of combine() for one instruction set, which PYCOMM_ISA names and the compiler's flags
// enable.
//
// Elements are combined in blocks that fit the first-level cache. Within a block the sources are merged as
// the balanced tree, in the order of a binary counter: each source is a leaf that is pushed on a stack, and
// after leaf j as many pairs merge as j has trailing ones. Four leaves that need no conversion merge at once.
// The last merge is the root, and it stores. Two sources of one format are a root over the whole length, so
// the common case is one plain loop.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/arithmetic/ops.h"
#include "kernels/arithmetic/small_float.h"
#include "kernels/combine.h"
#include "kernels/copy.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/strips.h"

// Iterations are independent: a destination is disjoint from a source or identical with it. Two vectors
// at a time are a fifth faster than one, also for data in the second-level cache.
#if defined(__clang__)
#define PYCOMM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety) interleave_count(2)")
#else
#define PYCOMM_INDEPENDENT _Pragma("GCC ivdep") _Pragma("GCC unroll 2")
#endif

namespace pycomm::kernels::PYCOMM_ISA {
namespace {

constexpr size_t kBlockBytes = 4096;
constexpr int kMaxDepth = 17;  // enough for 2^16 leaves; a node has fewer ranks

// Complex numbers are copied part by part: the compiler does not vectorise copies of whole structs.
template <class T>
PYCOMM_INLINE T get(const Unaligned<T>& from) {
  return from.value;
}
template <class T>
PYCOMM_INLINE Complex<T> get(const Unaligned<Complex<T>>& from) {
  return {from.value.re, from.value.im};
}
template <class T>
PYCOMM_INLINE void put(Unaligned<T>& to, T x) {
  to.value = x;
}
template <class T>
PYCOMM_INLINE void put(Unaligned<Complex<T>>& to, Complex<T> x) {
  to.value.re = x.re;
  to.value.im = x.im;
}

// Small floats use the vectors of strips.h: the compiler vectorises a loop badly if its elements have two
// sizes.
template <class F>
inline constexpr bool kIsSmall = kIsFloat<typename F::Value> && sizeof(typename F::Raw) < sizeof(float);

// n elements of the format F, fewer than a strip, filled up to a whole one.
template <class F>
struct ShortStrip {
  typename F::Raw elements[kWidth] = {};
  ShortStrip() = default;
  ShortStrip(const void* from, size_t n) { std::memcpy(elements, from, n * sizeof elements[0]); }
  void copy_to(void* to, size_t n) const { std::memcpy(to, elements, n * sizeof elements[0]); }
};

// What an average does: it scales elements before they are summed, divides the sum, or both.
enum class Finish { none, scale, scale_and_divide, divide };
constexpr bool scales(Finish f) { return f == Finish::scale || f == Finish::scale_and_divide; }
constexpr bool divides(Finish f) { return f == Finish::divide || f == Finish::scale_and_divide; }
struct Factors {
  double prescale = 1, divisor = 1;
};
template <class F>
using Factor = std::conditional_t<kIsFloat<typename F::Value>, typename F::Value, double>;

template <Finish kFinish, class V, class F>
PYCOMM_INLINE V scaled(V value, F prescale) {
  if constexpr (scales(kFinish)) value *= prescale;
  return value;
}

// dsts[0..kDsts) = a op b
template <class From, class To, class O, Finish kFinish, int kDsts>
void merge(void* const* dsts, const void* a, const void* b, size_t n, Factors factors) {
  const auto* x = in<typename From::Raw>(a);
  const auto* y = in<typename From::Raw>(b);
  auto* first = out<typename To::Raw>(dsts[0]);
  auto* second = out<typename To::Raw>(dsts[kDsts - 1]);
  [[maybe_unused]] const auto prescale = static_cast<Factor<From>>(factors.prescale);
  [[maybe_unused]] const auto divisor = static_cast<Factor<From>>(factors.divisor);
  if constexpr (kIsSmall<From> || kIsSmall<To>) {
    const auto merged = [&](const void* of_x, const void* of_y) {
      Floats value = O::apply(scaled<kFinish>(decode(of_x, From{}), prescale),
                              scaled<kFinish>(decode(of_y, From{}), prescale));
      if constexpr (divides(kFinish)) value /= divisor;
      return value;
    };
    size_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      const Floats value = merged(x + i, y + i);
      encode(first + i, value, To{});
      if constexpr (kDsts == 2) encode(second + i, value, To{});
    }
    if (i < n) {
      const ShortStrip<From> rest_of_x(x + i, n - i), rest_of_y(y + i, n - i);
      ShortStrip<To> result;
      encode(result.elements, merged(rest_of_x.elements, rest_of_y.elements), To{});
      result.copy_to(first + i, n - i);
      if constexpr (kDsts == 2) result.copy_to(second + i, n - i);
    }
  } else {
    PYCOMM_INDEPENDENT
    for (size_t i = 0; i < n; ++i) {
      auto value = O::apply(scaled<kFinish>(From::decode(get(x[i])), prescale),
                            scaled<kFinish>(From::decode(get(y[i])), prescale));
      if constexpr (divides(kFinish)) value /= divisor;
      const auto result = To::encode(value);
      put(first[i], result);
      if constexpr (kDsts == 2) put(second[i], result);
    }
  }
}

// dsts[0..kDsts) = (a op b) op (c op d), for elements of the accumulator's type
template <class From, class To, class O, Finish kFinish, int kDsts>
void merge_four(void* const* dsts, const void* const* srcs, size_t n, Factors factors) {
  using T = typename From::Raw;
  const auto *a = in<T>(srcs[0]), *b = in<T>(srcs[1]), *c = in<T>(srcs[2]), *d = in<T>(srcs[3]);
  auto* first = out<typename To::Raw>(dsts[0]);
  auto* second = out<typename To::Raw>(dsts[kDsts - 1]);
  [[maybe_unused]] const auto prescale = static_cast<Factor<From>>(factors.prescale);
  [[maybe_unused]] const auto divisor = static_cast<Factor<From>>(factors.divisor);
  PYCOMM_INDEPENDENT
  for (size_t i = 0; i < n; ++i) {
    auto value = O::apply(O::apply(scaled<kFinish>(From::decode(get(a[i])), prescale),
                                   scaled<kFinish>(From::decode(get(b[i])), prescale)),
                          O::apply(scaled<kFinish>(From::decode(get(c[i])), prescale),
                                   scaled<kFinish>(From::decode(get(d[i])), prescale)));
    if constexpr (divides(kFinish)) value /= divisor;
    const auto result = To::encode(value);
    put(first[i], result);
    if constexpr (kDsts == 2) put(second[i], result);
  }
}

template <class From, class To, class O, Finish kFinish>
void merge_four_any(void* const* dsts, int num_dsts, const void* const* srcs, size_t n, Factors factors) {
  if (num_dsts == 1) {
    merge_four<From, To, O, kFinish, 1>(dsts, srcs, n, factors);
  } else {
    merge_four<From, To, O, kFinish, 2>(dsts, srcs, n, factors);
  }
}

template <class From, class To, class O, Finish kFinish>
void merge_any(void* const* dsts, int num_dsts, const void* a, const void* b, size_t n, Factors factors) {
  if (num_dsts == 1) {
    merge<From, To, O, kFinish, 1>(dsts, a, b, n, factors);
  } else {
    merge<From, To, O, kFinish, 2>(dsts, a, b, n, factors);
  }
}

// dst = x, divided by the divisor for an average
template <class From, class To, bool kAverage>
void convert(void* dst, const void* src, size_t n, double divisor) {
  const auto* x = in<typename From::Raw>(src);
  auto* to = out<typename To::Raw>(dst);
  if constexpr (kIsSmall<From> || kIsSmall<To>) {
    const auto converted = [&](const void* of_x) {
      Floats value = decode(of_x, From{});
      if constexpr (kAverage) value /= static_cast<float>(divisor);
      return value;
    };
    size_t i = 0;
    for (; i + kWidth <= n; i += kWidth) encode(to + i, converted(x + i), To{});
    if (i < n) {
      ShortStrip<To> result;
      encode(result.elements, converted(ShortStrip<From>(x + i, n - i).elements), To{});
      result.copy_to(to + i, n - i);
    }
  } else {
    PYCOMM_INDEPENDENT
    for (size_t i = 0; i < n; ++i) {
      auto value = From::decode(get(x[i]));
      if constexpr (kAverage) value /= static_cast<typename From::Value>(divisor);
      put(to[i], To::encode(value));
    }
  }
}

// dst = x * factor
template <class From>
void scale(void* dst, const void* src, size_t n, double factor) {
  const auto* x = in<typename From::Raw>(src);
  auto* to = out<typename From::Value>(dst);
  if constexpr (kIsSmall<From>) {
    const auto scaled = [&](const void* of_x) { return decode(of_x, From{}) * static_cast<float>(factor); };
    size_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(to + i, scaled(x + i));
    if (i < n) {
      ShortStrip<Plain<float>> result;
      store(result.elements, scaled(ShortStrip<From>(x + i, n - i).elements));
      result.copy_to(to + i, n - i);
    }
  } else {
    PYCOMM_INDEPENDENT
    for (size_t i = 0; i < n; ++i)
      put(to[i], From::decode(get(x[i])) * static_cast<typename From::Value>(factor));
  }
}

// What combine_blocks() needs of a type and an operator.
struct Steps {
  size_t size;      // bytes of a raw or final element
  size_t acc_size;  // bytes of a partial element
  // Converts raw elements to partial ones; null if they are the same.
  void (*load)(void* dst, const void* src, size_t n, double prescale);
  // dst = a op b, partial; dst may be a.
  void (*merge)(void* dst, const void* a, const void* b, size_t n);
  // dst = (a op b) op (c op d), partial, from elements of the accumulator's type, which are scaled first.
  void (*merge_four)(void* dst, const void* const* srcs, size_t n, double prescale);
  // The last merge, of partial elements, with the store to one or two destinations.
  void (*root)(void* const* dsts, int num_dsts, const void* a, const void* b, size_t n, bool final,
               Factors factors);
  // The whole reduction of exactly four sources, with the store of final elements; null if these have another
  // size than the accumulator's type.
  void (*root_of_four)(void* const* dsts, int num_dsts, const void* const* srcs, size_t n, Factors factors);
  // The store if there is nothing to merge.
  void (*store)(void* dst, const void* acc, size_t n, bool final, double divisor);
};

// Elements of format F with the operator O; an element has kPartsOfElement parts that the operator combines
// separately.
template <class F, class O, size_t kPartsOfElement = 1>
struct Kernel {
  using Raw = F;
  using Value = typename F::Value;
  using Partial = Plain<Value>;
  static constexpr size_t kParts = kPartsOfElement;
  static constexpr bool kAverages = kIsFloat<Value> && kIsSum<O>;

  static void merge_partial(void* dst, const void* a, const void* b, size_t n) {
    merge<Partial, Partial, O, Finish::none, 1>(&dst, a, b, n, {});
  }

  template <class From>
  static void root(void* const* dsts, int num_dsts, const void* a, const void* b, size_t n, bool final,
                   Factors factors) {
    if constexpr (kAverages && !std::is_same_v<From, Partial>) {
      if (factors.prescale != 1) {
        if (!final) return merge_any<From, Partial, O, Finish::scale>(dsts, num_dsts, a, b, n, factors);
        if (factors.divisor == 1)
          return merge_any<From, F, O, Finish::scale>(dsts, num_dsts, a, b, n, factors);
        return merge_any<From, F, O, Finish::scale_and_divide>(dsts, num_dsts, a, b, n, factors);
      }
    }
    if (!final) return merge_any<From, Partial, O, Finish::none>(dsts, num_dsts, a, b, n, factors);
    if constexpr (kAverages) {
      if (factors.divisor != 1)
        return merge_any<From, F, O, Finish::divide>(dsts, num_dsts, a, b, n, factors);
    }
    merge_any<From, F, O, Finish::none>(dsts, num_dsts, a, b, n, factors);
  }

  static void merge_four_partial(void* dst, const void* const* srcs, size_t n, double prescale) {
    if constexpr (kAverages) {
      if (prescale != 1) return merge_four<Partial, Partial, O, Finish::scale, 1>(&dst, srcs, n, {prescale});
    }
    merge_four<Partial, Partial, O, Finish::none, 1>(&dst, srcs, n, {});
  }

  static void root_of_four(void* const* dsts, int num_dsts, const void* const* srcs, size_t n,
                           Factors factors) {
    if constexpr (kAverages) {
      if (factors.prescale != 1 && factors.divisor != 1) {
        return merge_four_any<Partial, F, O, Finish::scale_and_divide>(dsts, num_dsts, srcs, n, factors);
      }
      if (factors.prescale != 1) {
        return merge_four_any<Partial, F, O, Finish::scale>(dsts, num_dsts, srcs, n, factors);
      }
      if (factors.divisor != 1) {
        return merge_four_any<Partial, F, O, Finish::divide>(dsts, num_dsts, srcs, n, factors);
      }
    }
    merge_four_any<Partial, F, O, Finish::none>(dsts, num_dsts, srcs, n, factors);
  }

  static constexpr auto root_of_four_if_alike() -> decltype(Steps::root_of_four) {
    if constexpr (kIsSum<O> && sizeof(typename F::Raw) == sizeof(Value)) return root_of_four;
    return nullptr;
  }

  static void store(void* dst, const void* acc, size_t n, bool final, double divisor) {
    if (!final) return convert<Partial, Partial, false>(dst, acc, n, divisor);
    if constexpr (kAverages) {
      if (divisor != 1) return convert<Partial, F, true>(dst, acc, n, divisor);
    }
    convert<Partial, F, false>(dst, acc, n, divisor);
  }

  static constexpr auto loader() -> decltype(Steps::load) {
    if constexpr (kIsFloat<Value>) return scale<F>;
    return nullptr;  // needs neither conversion nor scaling
  }

  static constexpr Steps kSteps = {
      sizeof(typename F::Raw), sizeof(Value),           loader(), merge_partial, merge_four_partial,
      root<Partial>,           root_of_four_if_alike(), store};
};

const char* at(const void* p, size_t offset) { return static_cast<const char*>(p) + offset; }
char* at(void* p, size_t offset) { return static_cast<char*>(p) + offset; }

// Reduces elements [begin, begin + n), at most a block, to dsts, which point at `begin` already.
void combine_block(const CombineArgs& args, const Steps& steps, size_t begin, size_t n, void* const* dsts,
                   int num_dsts) {
  alignas(kLine) unsigned char buffers[kMaxDepth][kBlockBytes];
  const void* stack[kMaxDepth];
  int depth = 0;
  const bool final = args.dst_format == Format::final;
  const bool alike = steps.load == nullptr || steps.size == steps.acc_size;  // raw and partial elements
  const auto scaled = [&](int j) { return args.src_formats[j] == Format::raw && args.prescale != 1; };
  const auto as_it_is = [&](int j) { return args.src_formats[j] != Format::raw || (alike && !scaled(j)); };
  const auto four_alike = [&](int j) {
    return std::all_of(args.src_formats + j, args.src_formats + j + 4, [&](Format format) {
      return format == args.src_formats[j] && (format != Format::raw || alike);
    });
  };
  for (int j = 0; j < args.num_srcs; ++j) {
    int merged = 0;
    if (j % 4 == 0 && j + 4 <= args.num_srcs && four_alike(j)) {
      const void* four[4];
      for (int i = 0; i < 4; ++i) four[i] = at(args.srcs[j + i], begin * steps.acc_size);
      const double prescale = scaled(j) ? args.prescale : 1;
      if (args.num_srcs == 4 && final && steps.root_of_four) {
        return steps.root_of_four(dsts, num_dsts, four, n, {prescale, args.divisor});
      }
      steps.merge_four(buffers[depth], four, n, prescale);
      stack[depth] = buffers[depth];
      j += 3;
      merged = 2;
    } else if (as_it_is(j)) {
      stack[depth] = at(args.srcs[j], begin * steps.acc_size);
    } else {
      steps.load(buffers[depth], at(args.srcs[j], begin * steps.size), n, args.prescale);
      stack[depth] = buffers[depth];
    }
    ++depth;
    const int merges =
        j + 1 == args.num_srcs ? merged + depth - 2 : __builtin_ctz(static_cast<unsigned>(j) + 1);
    for (; merged < merges; ++merged) {
      --depth;
      steps.merge(buffers[depth - 1], stack[depth - 1], stack[depth], n);
      stack[depth - 1] = buffers[depth - 1];
    }
  }
  if (depth == 2) {
    steps.root(dsts, num_dsts, stack[0], stack[1], n, final, {1, args.divisor});
  } else {
    for (int d = 0; d < num_dsts; ++d) steps.store(dsts[d], stack[0], n, final, args.divisor);
  }
}

void combine_blocks(const CombineArgs& args, const Steps& steps, size_t count) {
  const size_t size = args.dst_format == Format::partial ? steps.acc_size : steps.size;
  const size_t block = kBlockBytes / steps.acc_size;
  size_t n = block;
  if (args.stream) {  // the first block ends at the end of a cache line of the destination
    const size_t head = (kLine - reinterpret_cast<uintptr_t>(args.dsts[0]) % kLine) % kLine;
    if (head != 0 && head % size == 0) n = smaller(block, head / size);
  }
  for (size_t begin = 0; begin < count; begin += n, n = block) {
    n = smaller(n, count - begin);
    const size_t offset = begin * size;
    if (args.stream) {
      alignas(kLine) unsigned char results[kBlockBytes];
      void* const dst = results;
      combine_block(args, steps, begin, n, &dst, 1);
      for (int d = 0; d < args.num_dsts; ++d) copy_past(at(args.dsts[d], offset), results, n * size);
    } else {
      const int fused = args.num_dsts == 1 ? 1 : 2;
      void* const dsts[2] = {at(args.dsts[0], offset), at(args.dsts[fused - 1], offset)};
      combine_block(args, steps, begin, n, dsts, fused);
      for (int d = 2; d < args.num_dsts; ++d) copy(at(args.dsts[d], offset), dsts[0], n * size);
    }
  }
  if (args.stream) stream_fence();
}

void copy_to_all(const CombineArgs& args, size_t bytes) {
  const void* src = args.srcs[0];
  CopyFn& copy_block = args.stream ? copy_past : copy;
  // Writes a block to all destinations while it is in the cache.
  const size_t block = args.num_dsts == 1 ? bytes : kBlockBytes;
  for (size_t begin = 0; begin < bytes; begin += block) {
    for (int d = 0; d < args.num_dsts; ++d) {
      if (args.dsts[d] == src) continue;
      copy_block(at(args.dsts[d], begin), at(src, begin), smaller(block, bytes - begin));
    }
  }
  if (args.stream) stream_fence();
}

template <class K>
void combine(const CombineArgs& args) {
  const size_t count = args.count * K::kParts;
  if (count == 0) return;
  if (args.num_srcs == 1 && args.src_formats[0] == args.dst_format) {
    return copy_to_all(args,
                       count * (args.dst_format == Format::partial ? K::kSteps.acc_size : K::kSteps.size));
  }
  if (args.num_srcs == 2 && args.src_formats[0] == args.src_formats[1] && args.num_dsts <= 2 &&
      !args.stream) {
    const bool final = args.dst_format == Format::final;
    const auto root = args.src_formats[0] == Format::raw ? K::template root<typename K::Raw>
                                                         : K::template root<typename K::Partial>;
    return root(args.dsts, args.num_dsts, args.srcs[0], args.srcs[1], count, final,
                {args.prescale, args.divisor});
  }
  combine_blocks(args, K::kSteps, count);
}

template <class F>
CombineFn find_float(Op op) {
  switch (op) {
    case Op::sum:
    case Op::avg:
      return combine<Kernel<F, Sum>>;
    case Op::prod:
      return combine<Kernel<F, Prod>>;
    case Op::min:
      return combine<Kernel<F, Min>>;
    case Op::max:
      return combine<Kernel<F, Max>>;
    case Op::band:
    case Op::bor:
    case Op::bxor:
      return nullptr;
  }
  return nullptr;
}

// In two's complement only min and max depend on the sign.
template <class T, class Unsigned>
CombineFn find_integer(Op op) {
  switch (op) {
    case Op::sum:
      return combine<Kernel<Plain<Unsigned>, Sum>>;
    case Op::prod:
      return combine<Kernel<Plain<Unsigned>, Prod>>;
    case Op::min:
      return combine<Kernel<Plain<T>, Min>>;
    case Op::max:
      return combine<Kernel<Plain<T>, Max>>;
    case Op::avg:
      return nullptr;
    case Op::band:
      return combine<Kernel<Plain<Unsigned>, Band>>;
    case Op::bor:
      return combine<Kernel<Plain<Unsigned>, Bor>>;
    case Op::bxor:
      return combine<Kernel<Plain<Unsigned>, Bxor>>;
  }
  return nullptr;
}

// Bytes that are 0 or 1.
CombineFn find_bool(Op op) {
  switch (op) {
    case Op::min:
    case Op::band:
      return combine<Kernel<Plain<uint8_t>, Band>>;
    case Op::max:
    case Op::bor:
      return combine<Kernel<Plain<uint8_t>, Bor>>;
    case Op::bxor:
      return combine<Kernel<Plain<uint8_t>, Bxor>>;
    case Op::sum:
    case Op::prod:
    case Op::avg:
      return nullptr;
  }
  return nullptr;
}

// A sum of complex numbers is a sum of twice as many reals.
template <class T>
CombineFn find_complex(Op op) {
  switch (op) {
    case Op::sum:
    case Op::avg:
      return combine<Kernel<Wide<T>, Sum, 2>>;
    case Op::prod:
      return combine<Kernel<Wide<Complex<T>>, Prod>>;
    case Op::min:
    case Op::max:
    case Op::band:
    case Op::bor:
    case Op::bxor:
      return nullptr;
  }
  return nullptr;
}

}  // namespace

CombineFn find(DType dtype, Op op) {
  switch (dtype) {
    case DType::float32:
      return find_float<Wide<float>>(op);
    case DType::float64:
      return find_float<Wide<double>>(op);
    case DType::float16:
      return find_float<Float16>(op);
    case DType::bfloat16:
      return find_float<BFloat16>(op);
    case DType::float8_e4m3fn:
      return find_float<Float8E4M3>(op);
    case DType::float8_e5m2:
      return find_float<Float8E5M2>(op);
    case DType::int8:
      return find_integer<int8_t, uint8_t>(op);
    case DType::int16:
      return find_integer<int16_t, uint16_t>(op);
    case DType::int32:
      return find_integer<int32_t, uint32_t>(op);
    case DType::int64:
      return find_integer<int64_t, uint64_t>(op);
    case DType::uint8:
      return find_integer<uint8_t, uint8_t>(op);
    case DType::uint16:
      return find_integer<uint16_t, uint16_t>(op);
    case DType::uint32:
      return find_integer<uint32_t, uint32_t>(op);
    case DType::uint64:
      return find_integer<uint64_t, uint64_t>(op);
    case DType::bool_:
      return find_bool(op);
    case DType::complex64:
      return find_complex<float>(op);
    case DType::complex128:
      return find_complex<double>(op);
  }
  return nullptr;
}

}  // namespace pycomm::kernels::PYCOMM_ISA
