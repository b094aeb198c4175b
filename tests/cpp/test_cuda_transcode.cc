// The bodies of cuda::transcode(), run on the CPU, against the CPU's transcode(): the same bytes.
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "emulated_grid.h"
#include "kernels/codec.h"
#include "kernels/cuda/transcode.h"

using namespace pycomm;
using namespace pycomm::kernels;

namespace {

namespace e = pycomm::kernels::emulated;
using ::emulated::Order;
using Bytes = std::vector<unsigned char>;

constexpr Format raw = Format::raw, partial = Format::partial, final = Format::final, wire = Format::wire;
constexpr DType kFloats[] = {DType::float32, DType::float16, DType::bfloat16};

std::mt19937_64 random_bits(1);

// As transcode.cu does it.
struct Emulate {
  const TranscodeArgs& args;
  int64_t most_blocks;
  Order order;
  int* launches;

  template <class Body>
  void each(const Encoding& encoding) const {
    e::each_launch(encoding, static_cast<int64_t>(args.count),
                   [&](int64_t begin, int64_t count, const e::Segments& segments) {
                     const auto call =
                         e::make_transcode_call(args, tile_bytes(args.codec->kind), begin, count, segments);
                     ++*launches;
                     ::emulated::run<Body>(call, std::min((count + e::kHalf - 1) / e::kHalf, most_blocks),
                                           order);
                   });
  }
  template <class C>
  void operator()() const {
    const bool many = args.num_srcs > 4;
    if (args.dst_format == Format::wire) {
      return many ? each<e::Encode<C, true>>(args.encoding) : each<e::Encode<C, false>>(args.encoding);
    }
    return many ? each<e::Decode<C, true>>({}) : each<e::Decode<C, false>>({});
  }
};

struct Call {
  Codec codec;
  DType dtype;
  std::vector<Format> srcs;
  Format dst;
  int64_t count;
  size_t misplaced = 0;  // bytes
  double prescale = 1, divisor = 1;
  bool residual = false;
  double specials = 0;  // share of blocks of 256 with a NaN or an Inf
  std::vector<Segment> segments = {};
  int64_t index = 0;
  int64_t blocks = 5;
  Order order = Order::shuffled;
};

std::string title(const Call& c) {
  return std::string(name(c.codec.kind)) + (c.codec.rounding == Rounding::stochastic ? " stochastic" : "") +
         (c.codec.hadamard ? " rotated" : "") + (c.codec.ceil_scale ? " ceil" : "") + " " + name(c.dtype) +
         " k=" + std::to_string(c.srcs.size()) + " first " + check::show(c.srcs[0]) + " -> " +
         check::show(c.dst) + " count " + std::to_string(c.count) + " misplaced " +
         std::to_string(c.misplaced) + " segments " + std::to_string(c.segments.size()) +
         (c.residual ? " residual" : "");
}

// Of magnitudes that differ from block to block, with zeros, subnormal ones and, where asked, NaN and Inf.
void fill(DType dtype, unsigned char* p, int64_t count, double specials) {
  float magnitude = 1;
  bool special = false;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t bits = random_bits();
    if (i % 256 == 0) {
      magnitude = std::ldexp(1.f, static_cast<int>(bits % 20) - 12);
      if (bits >> 32 & 1 && dtype == DType::float32)
        magnitude = std::ldexp(1.f, static_cast<int>(bits % 250) - 126);
      special = static_cast<double>(bits >> 40) / (1 << 24) < specials;
    }
    float x = (static_cast<float>(bits >> 40) / (1 << 23) - 1) * magnitude;
    if (bits % 31 == 0) x = bits & 64 ? -0.f : 0.f;
    if (special && bits % 97 == 0) x = bits & 64 ? INFINITY : std::nanf("3");
    if (dtype == DType::float32) std::memcpy(p + 4 * i, &x, 4);
    const uint16_t half = dtype == DType::float16 ? e::Float16::encode(x) : e::BFloat16::encode(x);
    if (dtype != DType::float32) std::memcpy(p + 2 * i, &half, 2);
  }
}

struct Memory {
  static constexpr size_t kGuard = 64;
  Bytes bytes;
  size_t begin, size;
  Memory(size_t n, size_t misplaced) : bytes(n + 4 * kGuard, 0xa5), size(n) {
    begin = kGuard + (kGuard - reinterpret_cast<uintptr_t>(bytes.data()) % kGuard) % kGuard + misplaced;
  }
  unsigned char* data() { return bytes.data() + begin; }
  float* floats() { return reinterpret_cast<float*>(data()); }
};

// Returns the number of launches.
int check_call(const Call& c) {
  const auto bytes_of = [&](Format f, int64_t count) {
    return static_cast<size_t>(f == wire      ? wire_bytes(c.codec.kind, count)
                               : f == partial ? 4 * count
                                              : count * static_cast<int64_t>(size_of(c.dtype)));
  };
  std::vector<Memory> sources;
  std::vector<const void*> srcs;
  for (const Format f : c.srcs) {
    sources.emplace_back(bytes_of(f, c.count), c.misplaced);
    unsigned char* p = sources.back().data();
    if (f == wire) {
      Memory x(static_cast<size_t>(4 * c.count), 0);
      fill(DType::float32, x.data(), c.count, c.specials);
      const void* from = x.data();
      void* to = p;
      transcode({.codec = &c.codec,
                 .dtype = DType::float32,
                 .dsts = &to,
                 .srcs = &from,
                 .src_formats = &raw,
                 .num_dsts = 1,
                 .num_srcs = 1,
                 .dst_format = wire,
                 .count = static_cast<size_t>(c.count)});
    } else {
      fill(f == partial ? DType::float32 : c.dtype, p, c.count, c.specials);
    }
    srcs.push_back(p);
  }
  Memory got(bytes_of(c.dst, c.count), c.misplaced), also(bytes_of(c.dst, c.count), 0);
  Memory want(bytes_of(c.dst, c.count), c.misplaced);
  Memory e_got(static_cast<size_t>(4 * c.count), c.misplaced % 16 / 4 * 4);
  if (c.residual) fill(DType::float32, e_got.data(), c.count, 0);
  Memory e_want = e_got, next_got = e_got, next_want = e_got;
  void* dsts[2] = {want.data(), want.data()};
  TranscodeArgs args{.codec = &c.codec,
                     .dtype = c.dtype,
                     .dsts = dsts,
                     .srcs = srcs.data(),
                     .src_formats = c.srcs.data(),
                     .num_dsts = 1,
                     .num_srcs = static_cast<int>(srcs.size()),
                     .dst_format = c.dst,
                     .count = static_cast<size_t>(c.count),
                     .prescale = c.prescale,
                     .divisor = c.divisor,
                     .encoding = {.step = 7, .turn = 3, .rank = 5, .index = c.index, .segments = c.segments}};
  const auto residuals = [&](Memory& from, Memory& to) {
    if (!c.residual) return;
    args.encoding.residual = from.floats();
    args.encoding.next_residual = to.floats();
    args.encoding.residual_scale = 0.75f;
  };
  residuals(e_want, next_want);
  transcode(args);
  residuals(e_got, next_got);
  dsts[0] = got.data();
  dsts[1] = also.data();
  args.num_dsts = 2;
  int launches = 0;
  CHECK(e::pick_codec(c.codec, Emulate{args, c.blocks, c.order, &launches}));
  if (std::memcmp(got.data(), want.data(), got.size) != 0 ||
      std::memcmp(also.data(), want.data(), got.size) != 0) {
    size_t at = 0;
    while (at < got.size && got.data()[at] == want.data()[at]) ++at;
    check::fail(__FILE__, __LINE__, title(c) + ": differs at byte " + std::to_string(at));
  } else if (std::memcmp(next_got.data(), next_want.data(), next_got.size) != 0) {
    size_t at = 0;
    while (next_got.data()[at] == next_want.data()[at]) ++at;
    check::fail(__FILE__, __LINE__,
                title(c) + ": residual " + std::to_string(at / 4) +
                    " differs: " + check::show(next_got.floats()[at / 4]) + " against " +
                    check::show(next_want.floats()[at / 4]));
  }
  const auto guarded = [](Memory& m) {
    const auto marked = [](unsigned char b) { return b == 0xa5; };
    return std::all_of(m.bytes.begin(), m.bytes.begin() + static_cast<int64_t>(m.begin), marked) &&
           std::all_of(m.bytes.begin() + static_cast<int64_t>(m.begin + m.size), m.bytes.end(), marked);
  };
  if (!guarded(got) || !guarded(also) || !guarded(next_got))
    check::fail(__FILE__, __LINE__, title(c) + ": wrote beside");
  return launches;
}

template <class F>
void each_codec(F f) {
  for (int k = 1; k < kNumCodecs; ++k) {
    const auto kind = static_cast<CodecKind>(k);
    for (const Rounding rounding : {Rounding::nearest, Rounding::stochastic}) {
      for (const bool option : {false, true}) {
        if (option && kind != CodecKind::mxfp8 && kind != CodecKind::int4) continue;
        f(Codec{.kind = kind,
                .rounding = rounding,
                .ceil_scale = option && kind == CodecKind::mxfp8,
                .hadamard = option && kind == CodecKind::int4,
                .seed = 0x123456789abcdef});
      }
    }
  }
}

}  // namespace

TEST(encode_and_decode) {
  each_codec([](const Codec& codec) {
    for (const DType dtype : kFloats) {
      for (const int64_t count : {1, 17, 1023, 1024, 5000}) {
        for (const double specials : {0.0, 0.2}) {
          for (const size_t misplaced : {0, 1, 4}) {
            Call call{codec, dtype, {raw}, wire, count, misplaced, 0.3, 3, false, specials};
            check_call(call);
            call.residual = true;
            check_call(call);
            call.residual = false;
            call.srcs = {wire};
            call.dst = final;
            check_call(call);
            call.srcs = {wire, raw};
            call.dst = partial;
            check_call(call);
          }
        }
      }
    }
  });
}

TEST(sums_of_any_number_and_format) {
  each_codec([](const Codec& codec) {
    for (const size_t k : {2, 3, 4, 5, 8, 13}) {
      std::vector<Format> mixed;
      for (size_t j = 0; j < k; ++j) mixed.push_back(j % 3 == 0 ? wire : j % 3 == 1 ? raw : partial);
      for (const Format dst : {wire, final, partial}) {
        check_call({codec, DType::float32, mixed, dst, 2077, 0, 1, static_cast<double>(k), dst == wire});
        check_call({codec, DType::bfloat16, std::vector<Format>(k, wire), dst, 1500, 0, 1, 1, false, 0.1});
      }
    }
  });
}

TEST(every_length) {
  each_codec([](const Codec& codec) {
    for (int64_t count = 0; count <= 1100; count += count < 70 ? 1 : 13) {
      check_call({codec, DType::float32, {raw}, wire, count, 0, 1, 1, true});
      check_call({codec, DType::float32, {wire, partial}, wire, count});
    }
  });
}

TEST(segments) {
  std::vector<Segment> segments;
  int64_t end = 512;  // nothing before it
  for (uint64_t id = 0; id < 1200; ++id) {
    const int64_t length =
        static_cast<int64_t>(random_bits() % 5 == 0 ? random_bits() % 3000 : random_bits() % 300);
    segments.push_back({end, end + length, id * 977 % (1 << 24)});
    end = (end + length + 255) / 256 * 256 + (random_bits() % 4 == 0 ? 512 : 0);
  }
  const std::vector<Segment> few(segments.begin(), segments.begin() + 9);
  each_codec([&](const Codec& codec) {
    for (const bool residual : {false, true}) {
      for (const int64_t index : {0, 1024, 3072}) {
        check_call({codec, DType::float32, {raw}, wire, 7001, 0, 1, 1, residual, 0.02, few, index});
      }
    }
    const int launches = check_call(
        {codec, DType::bfloat16, {raw, wire}, wire, end - 2048 + 77, 0, 1, 2, true, 0, segments, 2048});
    CHECK_EQ(launches, 3);
  });
}

TEST(launch_shapes_and_orders) {
  each_codec([](const Codec& codec) {
    for (const int64_t blocks : {1, 3, 1000}) {
      for (const Order order : {Order::forward, Order::backward, Order::shuffled}) {
        check_call({codec, DType::float32, {raw}, wire, 9000, 0, 1, 1, true, 0, {}, 0, blocks, order});
      }
    }
  });
}
