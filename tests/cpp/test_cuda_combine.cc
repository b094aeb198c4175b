// The body of cuda::combine(), run on the CPU, against the CPU's kernels: the same bits.
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "emulated_grid.h"
#include "kernels/combine.h"
#include "kernels/cuda/combine.h"

using namespace pycomm;
using namespace pycomm::kernels;

namespace {

using Byte = unsigned char;
using ::emulated::Order;

std::mt19937_64 random_bits(1);

struct Emulate {
  const CombineArgs& args;
  int64_t most_blocks;
  Order order;

  template <class Body>
  void run(const pycomm::kernels::emulated::CombineCall& call) const {
    ::emulated::run<Body>(call, std::min(Body::blocks(call), most_blocks), order);
  }
  template <class F, class O, int kParts>
  void operator()() const {
    namespace e = pycomm::kernels::emulated;
    const auto call = e::make_combine_call<typename F::Raw, typename F::Value>(args, kParts);
    if (args.num_srcs > e::kGroup) return run<e::Combine<F, O, true>>(call);
    run<e::Combine<F, O, false>>(call);
  }
};

bool is_floating(DType d) { return d < DType::int8 || d == DType::complex64 || d == DType::complex128; }

// Moderate numbers for most, and any bits for some: NaN, Inf and subnormal ones among them.
void fill(DType dtype, Byte* p, size_t bytes) {
  const size_t size = dtype == DType::complex64 ? 4 : dtype == DType::complex128 ? 8 : size_of(dtype);
  for (size_t at = 0; at < bytes; at += size) {
    uint64_t bits = random_bits();
    if (dtype == DType::bool_) bits &= 1;
    if (is_floating(dtype) && random_bits() % 8 != 0) {
      const double x = (static_cast<double>(bits >> 40) / (1 << 20) - 8) * (bits & 1 ? 1 : 1e-3);
      if (size == 8) std::memcpy(&bits, &x, 8);
      const float narrow = static_cast<float>(x);
      if (size == 4) std::memcpy(&bits, &narrow, 4);
    }
    std::memcpy(p + at, &bits, size);
  }
}

template <class T>
bool both_nan(const Byte* a, const Byte* b) {
  T x, y;
  std::memcpy(&x, a, sizeof x);
  std::memcpy(&y, b, sizeof y);
  return std::isnan(x) && std::isnan(y);
}

// Equal bits, save that a NaN among partial results is any NaN.
bool same(DType held, bool partial, const Byte* a, const Byte* b, size_t bytes) {
  if (bytes == 0 || std::memcmp(a, b, bytes) == 0) return true;
  if (!partial || !is_floating(held)) return false;
  const size_t size = held == DType::float64 || held == DType::complex128 ? 8 : 4;
  for (size_t at = 0; at < bytes; at += size) {
    if (std::memcmp(a + at, b + at, size) == 0) continue;
    if (!(size == 8 ? both_nan<double>(a + at, b + at) : both_nan<float>(a + at, b + at))) return false;
  }
  return true;
}

struct Call {
  DType dtype;
  Op op;
  std::vector<Format> formats;
  Format dst;
  size_t count;
  size_t misplaced;  // bytes from a 16-byte boundary: of all operands, or of all but the first
  bool all_alike;
  double prescale = 1, divisor = 1;
  int64_t blocks = 3;
  Order order = Order::shuffled;
};

void check_call(const Call& c) {
  constexpr size_t kGuard = 32;
  const auto held = [&](Format f) { return f == Format::partial ? accumulator(c.dtype) : c.dtype; };
  const auto allocate = [&](size_t bytes) { return std::vector<Byte>(bytes + 16 + 2 * kGuard, 0xa5); };
  const auto place = [&](std::vector<Byte>& memory, bool first) {
    Byte* p = memory.data() + kGuard;
    return p + (16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 + (first && !c.all_alike ? 0 : c.misplaced);
  };
  std::vector<std::vector<Byte>> sources;
  std::vector<const void*> srcs;
  for (size_t j = 0; j < c.formats.size(); ++j) {
    const size_t bytes = c.count * size_of(held(c.formats[j]));
    sources.push_back(allocate(bytes));
    Byte* p = place(sources.back(), j == 0);
    fill(held(c.formats[j]), p, bytes);
    srcs.push_back(p);
  }
  const size_t bytes = c.count * size_of(held(c.dst));
  std::vector<Byte> one = allocate(bytes), two = allocate(bytes), want(bytes + 1);
  void* dsts[2] = {place(one, true), place(two, false)};
  void* wanted = want.data();
  CombineArgs args{.dsts = &wanted,
                   .srcs = srcs.data(),
                   .src_formats = c.formats.data(),
                   .num_dsts = 1,
                   .num_srcs = static_cast<int>(srcs.size()),
                   .dst_format = c.dst,
                   .count = c.count,
                   .prescale = c.prescale,
                   .divisor = c.divisor};
  find_combine(c.dtype, c.op, *find_isa(isa()))(args);
  args.dsts = dsts;
  args.num_dsts = 2;
  CHECK(pycomm::kernels::emulated::pick_combine(c.dtype, c.op, Emulate{args, c.blocks, c.order}));
  for (int d = 0; d < 2; ++d) {
    const auto* got = static_cast<const Byte*>(dsts[d]);
    const std::vector<Byte>& memory = d == 0 ? one : two;
    const auto untouched = [](const Byte* from, const Byte* to) {
      return std::all_of(from, to, [](Byte b) { return b == 0xa5; });
    };
    const bool guarded =
        untouched(memory.data(), got) && untouched(got + bytes, memory.data() + memory.size());
    if (!guarded || !same(held(c.dst), c.dst == Format::partial, got, want.data(), bytes)) {
      check::fail(__FILE__, __LINE__,
                  std::string(name(c.dtype)) + " " + name(c.op) + " k=" + std::to_string(srcs.size()) +
                      " -> " + check::show(c.dst) + " count " + std::to_string(c.count) + " misplaced " +
                      std::to_string(c.misplaced) + (c.all_alike ? " all" : " others") +
                      (guarded ? "" : ": wrote beside"));
    }
  }
}

template <class F>
void each_pair(F f) {
  for (int d = 0; d < kNumDTypes; ++d) {
    for (int o = 0; o < kNumOps; ++o) {
      if (supports(static_cast<DType>(d), static_cast<Op>(o))) f(static_cast<DType>(d), static_cast<Op>(o));
    }
  }
}

constexpr Format raw = Format::raw, partial = Format::partial, final = Format::final;

}  // namespace

TEST(every_pair_and_number_of_sources) {
  each_pair([](DType dtype, Op op) {
    for (size_t k : {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31}) {
      std::vector<Format> mixed(k, raw);
      for (size_t j = 0; j < k; j += 3) mixed[j] = partial;
      const double divisor = op == Op::avg ? static_cast<double>(k) : 1;
      const double prescale = op == Op::sum && is_floating(dtype) ? 0.3 : 1;
      for (size_t count : {5, 1029}) {
        check_call({dtype, op, std::vector<Format>(k, raw), final, count, 0, true, prescale, divisor});
        check_call({dtype, op, mixed, final, count, 0, true, prescale, divisor});
        if (k > 1) check_call({dtype, op, std::vector<Format>(k, partial), partial, count, 0, true});
        check_call({dtype, op, mixed, partial, count, 0, true, prescale});
      }
    }
  });
}

TEST(as_many_sources_as_there_may_be) {
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float8_e5m2, DType::complex128}) {
    for (size_t k : {33, 64, 100, 127, 128}) {
      check_call({dtype, Op::sum, std::vector<Format>(k, raw), final, 301, 0, true});
    }
  }
}

TEST(every_length_and_place) {
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float8_e4m3fn, DType::int16,
                      DType::bool_, DType::complex64, DType::complex128}) {
    const Op op = dtype == DType::bool_ ? Op::bxor : Op::sum;
    for (size_t count = 0; count <= 70; ++count) {
      const size_t place = count % 16;
      check_call({dtype, op, {raw, raw, raw}, final, count, place, true});
      check_call({dtype, op, {raw, raw, raw}, final, count, place, false});
      check_call({dtype, op, {raw, partial}, partial, count, place, true});
    }
    for (size_t place = 0; place < 16; ++place) {
      if (dtype != DType::bool_)
        check_call({dtype, Op::prod, std::vector<Format>(5, raw), final, 90, place, true});
      check_call({dtype, op, std::vector<Format>(2, raw), final, 2100, place, true});
      check_call({dtype, op, std::vector<Format>(5, raw), final, 2100, place, false});
    }
  }
}

TEST(launch_shapes_and_orders) {
  for (DType dtype : {DType::float32, DType::float16, DType::int8}) {
    for (int64_t blocks : {1, 2, 7, 1000}) {
      for (Order order : {Order::forward, Order::backward, Order::shuffled}) {
        check_call({dtype, Op::sum, {raw, raw}, final, 40'003, 0, true, 1, 1, blocks, order});
        check_call(
            {dtype, Op::sum, std::vector<Format>(6, raw), final, 40'003, 2, false, 1, 1, blocks, order});
      }
    }
  }
}

// The destination is a source.
TEST(in_place) {
  for (size_t k : {2, 6}) {
    std::vector<std::vector<float>> sources(k, std::vector<float>(5003));
    std::vector<const void*> srcs;
    for (auto& source : sources) {
      fill(DType::float32, reinterpret_cast<Byte*>(source.data()), 4 * source.size());
      srcs.push_back(source.data());
    }
    std::vector<float> want(5003);
    void* dst = want.data();
    const std::vector<Format> formats(k, raw);
    CombineArgs args{.dsts = &dst,
                     .srcs = srcs.data(),
                     .src_formats = formats.data(),
                     .num_dsts = 1,
                     .num_srcs = static_cast<int>(k),
                     .dst_format = final,
                     .count = want.size()};
    find_combine(DType::float32, Op::sum)(args);
    dst = sources[1].data();
    pycomm::kernels::emulated::pick_combine(DType::float32, Op::sum, Emulate{args, 4, Order::shuffled});
    CHECK(std::memcmp(dst, want.data(), 4 * want.size()) == 0);
  }
}

// A body that reads what another thread writes, or does not wait for it, is found out.
namespace {
struct Neighbour {
  using Args = uint32_t*;
  static constexpr int kThreads = 8;
  struct Shared {
    uint32_t x[kThreads];
  };
  template <class B>
  static void run(B& block, uint32_t* out, Shared& shared) {
    block.each([&](int t) { shared.x[t] = static_cast<uint32_t>(t); });
    if (*out != 0) block.sync();
    block.each([&](int t) { out[t] = shared.x[(t + 1) % kThreads]; });
  }
};
}  // namespace

TEST(the_emulation_finds_a_missing_sync) {
  uint32_t out[8] = {0};
  CHECK_THROWS(std::logic_error, (::emulated::run<Neighbour>(out, 1, Order::forward), 0));
  out[0] = 1;
  ::emulated::run<Neighbour>(out, 1, Order::backward);
  CHECK_EQ(out[7], 0u);
  CHECK_EQ(out[3], 4u);
}
