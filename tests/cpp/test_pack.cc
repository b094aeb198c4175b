// pack and unpack against an independent reference, which works on one element at a time in float64 and
// tables; and the statistics against their definition, written as a recursion.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/dtype.h"
#include "common/error.h"
#include "float_table.h"
#include "isas.h"
#include "kernels/pack.h"

using namespace pycomm;
using namespace pycomm::kernels;

namespace {

using Bytes = std::vector<unsigned char>;
constexpr DType kFloats[] = {DType::float32, DType::float16, DType::bfloat16, DType::float8_e4m3fn,
                             DType::float8_e5m2};

// ---- the reference ----

uint32_t code_at(DType dtype, const unsigned char* data, int64_t i) {
  uint32_t code = 0;
  std::memcpy(&code, data + i * size_of(dtype), size_of(dtype));  // little endian
  return code;
}

double decoded(DType dtype, uint32_t code) {
  const Table* table = table_of(dtype);
  return table ? table->decode(code) : std::bit_cast<float>(code);
}

uint32_t encoded(DType dtype, double x) {
  if (const Table* table = table_of(dtype)) return table->encode(x);
  return std::isnan(x) ? 0x7fc00000 : std::bit_cast<uint32_t>(static_cast<float>(x));
}

// The square sums' order as arithmetic/stats.h says it: position i of n holds i's and those of i + n/2
// further on.
double folded(const std::vector<double>& sums, size_t at, size_t n, size_t step) {
  return n == 1 ? sums[at] : folded(sums, at, n / 2, 2 * step) + folded(sums, at + step, n / 2, 2 * step);
}

struct Expected {
  std::vector<Bytes> outs;
  Stats stats;
  long double exact_squares = 0;
};

struct Tensor {
  DType dtype;
  Bytes data;
  int64_t count() const { return static_cast<int64_t>(data.size() / size_of(dtype)); }
};

Expected reference(const std::vector<Tensor>& tensors, DType to, double scale) {
  Expected result;
  const double factor = static_cast<float>(scale);
  std::vector<double> columns(1024, 0.0);
  size_t chunk = 0;
  for (const Tensor& tensor : tensors) {
    Bytes& out = result.outs.emplace_back(tensor.count() * size_of(to));
    for (int64_t begin = 0; begin < tensor.count(); begin += 1024, ++chunk) {
      std::vector<double> lanes(32, 0.0);
      for (int64_t i = begin; i < std::min(begin + 1024, tensor.count()); ++i) {
        const uint32_t source = code_at(tensor.dtype, tensor.data.data(), i);
        // The product of two float32 is exact in float64.
        volatile float product = static_cast<float>(decoded(tensor.dtype, source) * factor);
        const double x = product;
        const uint32_t code = tensor.dtype == to && scale == 1 ? source : encoded(to, x);
        std::memcpy(out.data() + i * size_of(to), &code, size_of(to));
        result.stats.nans += std::isnan(decoded(to, code));
        result.stats.infs += std::isinf(decoded(to, code));
        if (std::isnan(x)) continue;
        lanes[i % 32] += x * x;
        result.exact_squares += static_cast<long double>(x) * x;
        result.stats.max_abs = std::max(result.stats.max_abs, std::fabs(static_cast<float>(x)));
      }
      columns[chunk % 1024] += folded(lanes, 0, 32, 1);
    }
  }
  result.stats.sum_squares = folded(columns, 0, 1024, 1);
  return result;
}

// ---- values ----

enum class Kind { ordinary, any_bits };

// ordinary: of all magnitudes that the smaller formats have, no NaN or infinity. any_bits: all there is.
Tensor make(DType dtype, int64_t count, Kind kind, uint64_t seed) {
  std::mt19937_64 bits(seed);
  Tensor tensor{dtype, Bytes(count * size_of(dtype))};
  for (int64_t i = 0; i < count; ++i) {
    uint32_t code = static_cast<uint32_t>(bits());
    if (dtype != DType::float32) code &= (1u << (8 * size_of(dtype))) - 1;
    if (kind == Kind::ordinary) {
      const double sign = bits() & 1 ? -1 : 1;
      code = encoded(dtype, sign * std::ldexp(static_cast<double>(bits() >> 40) / (1 << 24),
                                              static_cast<int>(bits() % 10) - 8));
    }
    std::memcpy(tensor.data.data() + i * size_of(dtype), &code, size_of(dtype));
  }
  return tensor;
}

// ---- running ----

// Memory with a mark around what is written, at a chosen distance from a cache line.
struct Placed {
  static constexpr size_t kGuard = 64;
  Bytes memory;
  size_t begin, size;
  Placed(size_t bytes, size_t misplaced) : memory(bytes + 4 * kGuard, 0xa5), size(bytes) {
    begin =
        kGuard + (kGuard - reinterpret_cast<uintptr_t>(memory.data()) % kGuard) % kGuard + misplaced % kGuard;
  }
  unsigned char* data() { return memory.data() + begin; }
  bool guarded() const {
    const auto marked = [](unsigned char b) { return b == 0xa5; };
    return std::all_of(memory.begin(), memory.begin() + begin, marked) &&
           std::all_of(memory.begin() + begin + size, memory.end(), marked);
  }
};

std::string show(const Stats& s) {
  return check::show(s.sum_squares) + ", " + check::show(s.max_abs) + ", " + check::show(s.nans) + ", " +
         check::show(s.infs);
}

// Packs, or unpacks from a bucket of `dtype`, with every instruction set, with statistics and without.
void check_both_ways(const std::vector<Tensor>& tensors, DType to, double scale, size_t misplaced,
                     const std::string& title) {
  const Expected want = reference(tensors, to, scale);
  for (const std::string& isa : isa_names()) {
    for (bool packs : {true, false}) {
      for (bool counts : {true, false}) {
        // The side that is read and the side that is written, each a bucket or apart.
        std::vector<Placed> read, written;
        std::vector<PackItem> items;
        int64_t total = 0;
        for (const Tensor& t : tensors) total += t.count();
        const DType bucket_type = packs ? to : tensors.empty() ? to : tensors[0].dtype;
        Placed bucket(total * size_of(bucket_type), misplaced);
        int64_t offset = 0;
        for (size_t j = 0; j < tensors.size(); ++j) {
          const Tensor& t = tensors[j];
          const size_t apart = packs ? t.data.size() : t.count() * size_of(to);
          Placed& side = (packs ? read : written).emplace_back(apart, misplaced + 3 * j);
          unsigned char* in_bucket = bucket.data() + offset * size_of(bucket_type);
          if (!t.data.empty()) std::memcpy(packs ? side.data() : in_bucket, t.data.data(), t.data.size());
          items.push_back({side.data(), packs ? t.dtype : to, t.count(), offset});
          offset += t.count();
        }
        Stats stats{-1, -1, -1, -1};
        const PackArgs args{items, bucket.data(), bucket_type, scale};
        (packs ? pack : unpack)(args, counts ? &stats : nullptr, *find_isa(isa));
        const std::string where = title + (packs ? " pack " : " unpack ") + isa + (counts ? " counted" : "");
        for (size_t j = 0; j < tensors.size(); ++j) {
          const unsigned char* got = packs ? bucket.data() + items[j].offset * size_of(to)
                                           : static_cast<unsigned char*>(items[j].tensor);
          if (!want.outs[j].empty() && std::memcmp(got, want.outs[j].data(), want.outs[j].size()) != 0) {
            size_t at = 0;
            while (got[at] == want.outs[j][at]) ++at;
            check::fail(__FILE__, __LINE__,
                        where + ": tensor " + std::to_string(j) + " differs at byte " + std::to_string(at));
          }
          if (!packs && !written[j].guarded())
            check::fail(__FILE__, __LINE__, where + ": written beyond the tensor");
        }
        if (packs && !bucket.guarded())
          check::fail(__FILE__, __LINE__, where + ": written beyond the bucket");
        if (counts && !(stats == want.stats)) {
          check::fail(__FILE__, __LINE__, where + ": " + show(stats) + " against " + show(want.stats));
        }
      }
    }
  }
}

std::string title(DType from, DType to, double scale, int64_t count) {
  return std::string(name(from)) + " to " + name(to) + " times " + check::show(scale) + ", " +
         std::to_string(count);
}

constexpr double kScales[] = {1, 0.3, -1024, 1e-3, -0.0};

}  // namespace

TEST(every_pair_of_types) {
  for (DType from : kFloats) {
    for (DType to : kFloats) {
      for (double scale : kScales) {
        for (int64_t count : {0, 1, 31, 33, 1023, 1025, 4099}) {
          for (Kind kind : {Kind::ordinary, Kind::any_bits}) {
            check_both_ways({make(from, count, kind, count)}, to, scale, count * 5 + 1,
                            title(from, to, scale, count));
          }
        }
      }
    }
  }
}

TEST(every_length) {
  const Tensor longest = make(DType::float32, 4099, Kind::any_bits, 1);
  for (int64_t count = 0; count <= 4099; ++count) {
    Tensor part = longest;
    part.data.resize(count * 4);
    check_both_ways({part}, DType::bfloat16, 0.7, count, "length " + std::to_string(count));
  }
}

// All codes of the small formats, and floats around every one of their values and midpoints.
TEST(every_code) {
  for (DType dtype : kFloats) {
    const Table* table = table_of(dtype);
    if (!table) continue;
    Tensor codes{dtype, {}}, near{DType::float32, {}};
    for (uint32_t code = 0; code < 1u << (8 * size_of(dtype)); ++code) {
      for (size_t b = 0; b < size_of(dtype); ++b)
        codes.data.push_back(static_cast<unsigned char>(code >> 8 * b));
    }
    const auto add = [&](float x) {
      const auto* bytes = reinterpret_cast<const unsigned char*>(&x);
      near.data.insert(near.data.end(), bytes, bytes + sizeof x);
    };
    for (size_t code = 0; code + 1 < table->values.size(); ++code) {
      for (double x : {table->values[code], (table->values[code] + table->values[code + 1]) / 2}) {
        const auto exact = static_cast<float>(x);
        for (float y : {exact, std::nextafterf(exact, 1e38f), std::nextafterf(exact, -1e38f)})
          add(y), add(-y);
      }
    }
    for (uint32_t bits :
         {0x7f800000u, 0xff800000u, 0x7fc00001u, 0xffffffffu, 0x7f800001u, 0x7f7fffffu, 1u, 0x80000001u}) {
      add(std::bit_cast<float>(bits));
    }
    for (DType to : kFloats) check_both_ways({codes}, to, 1, 2, std::string("codes of ") + name(dtype));
    check_both_ways({near}, dtype, 1, 2, std::string("floats near ") + name(dtype));
  }
}

TEST(lists_of_tensors) {
  for (double scale : {1.0, 0.125}) {
    for (DType from : {DType::float32, DType::bfloat16}) {
      for (DType to : {DType::float32, DType::float16}) {
        std::vector<Tensor> tensors;
        for (int64_t count : {5, 0, 1024, 1, 3000, 0, 64, 2047})
          tensors.push_back(make(from, count, Kind::ordinary, count));
        tensors.push_back(make(from, 100, Kind::any_bits, 8));
        for (size_t misplaced : {0, 2, 17}) check_both_ways(tensors, to, scale, misplaced, "list");
        check_both_ways({}, to, scale, 0, "nothing");
      }
    }
  }
}

TEST(mixed_types_pack_into_one) {
  const std::vector<Tensor> tensors = {make(DType::float32, 700, Kind::ordinary, 1),
                                       make(DType::float16, 1500, Kind::ordinary, 2),
                                       make(DType::float8_e5m2, 33, Kind::any_bits, 3)};
  const Expected want = reference(tensors, DType::bfloat16, 2);
  std::vector<Tensor> copies = tensors;
  Bytes bucket(3000 * 2);
  const std::vector<PackItem> items = {{copies[0].data.data(), DType::float32, 700, 0},
                                       {copies[1].data.data(), DType::float16, 1500, 768},
                                       {copies[2].data.data(), DType::float8_e5m2, 33, 2304}};
  Stats stats;
  pack({items, bucket.data(), DType::bfloat16, 2}, &stats);
  CHECK(stats == want.stats);
  for (size_t j = 0; j < items.size(); ++j) {
    CHECK(std::memcmp(bucket.data() + items[j].offset * 2, want.outs[j].data(), want.outs[j].size()) == 0);
  }
}

// Past the cache, from and to any alignment, with more chunks than columns; a NaN in the middle.
TEST(large_ones_are_streamed) {
  for (size_t misplaced : {0, 4, 16, 61}) {
    std::vector<Tensor> tensors;
    for (int64_t count : {3'000'001, 7, 333'333, 150})
      tensors.push_back(make(DType::float32, count, Kind::ordinary, count));
    const uint32_t nan = 0x7fc12345;
    std::memcpy(tensors[0].data.data() + 4 * 1'234'567, &nan, 4);
    for (double scale : {1.0, 0.25}) check_both_ways(tensors, DType::float32, scale, misplaced, "large");
  }
  check_both_ways({make(DType::bfloat16, 7'000'003, Kind::ordinary, 1)}, DType::float16, 1, 2,
                  "large, 16 bits");
}

TEST(sums_of_squares_are_exact_to_many_digits) {
  std::vector<Tensor> tensors = {make(DType::float32, 2'000'000, Kind::ordinary, 5)};
  const Expected want = reference(tensors, DType::bfloat16, 1);
  Bytes bucket(4'000'000);
  const std::vector<PackItem> items = {{tensors[0].data.data(), DType::float32, 2'000'000, 0}};
  Stats stats;
  pack({items, bucket.data(), DType::bfloat16}, &stats);
  CHECK(std::fabs(stats.sum_squares - want.exact_squares) < 1e-13 * want.exact_squares);
}

TEST(what_lies_in_its_place) {
  for (const std::string& isa : isa_names()) {
    for (DType dtype : kFloats) {
      for (int64_t count : {3, 1024, 5000}) {
        const Tensor tensor = make(dtype, count, Kind::any_bits, 3);
        for (double scale : {1.0, 0.5}) {
          const Expected want = reference({tensor}, dtype, scale);
          for (bool counts : {false, true}) {
            Placed bucket(tensor.data.size(), 0);
            std::memcpy(bucket.data(), tensor.data.data(), tensor.data.size());
            const PackItem item{bucket.data(), dtype, count, 0};
            Stats stats;
            pack({{&item, 1}, bucket.data(), dtype, scale}, counts ? &stats : nullptr, *find_isa(isa));
            CHECK(std::memcmp(bucket.data(), want.outs[0].data(), want.outs[0].size()) == 0);
            CHECK(bucket.guarded());
            if (counts) CHECK(stats == want.stats);
          }
        }
      }
    }
    // Another type of the same size.
    Tensor tensor = make(DType::float16, 2000, Kind::any_bits, 4);
    const Expected want = reference({tensor}, DType::bfloat16, 1);
    const PackItem item{tensor.data.data(), DType::float16, 2000, 0};
    Stats stats;
    pack({{&item, 1}, tensor.data.data(), DType::bfloat16}, &stats, *find_isa(isa));
    CHECK(tensor.data == want.outs[0]);
    CHECK(stats == want.stats);
  }
}

// In place of equal types nothing is written: the memory may be read-only.
TEST(known_statistics) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  float x[] = {3, -4, nan, 70000, -inf, 1e-45f};
  uint16_t half[6];
  const PackItem item{x, DType::float32, 6, 0};
  Stats stats;
  pack({{&item, 1}, half, DType::float16}, &stats);
  CHECK(stats.sum_squares == inf && stats.max_abs == inf);
  CHECK_EQ(stats.nans, 1);
  CHECK_EQ(stats.infs, 2);  // 70000 is one in float16
  x[4] = 0;
  pack({{&item, 1}, half, DType::float16}, &stats);
  CHECK_EQ(stats.sum_squares, 25 + 70000.0 * 70000.0);
  CHECK_EQ(stats.max_abs, 70000);
  uint8_t e4m3[6];
  pack({{&item, 1}, e4m3, DType::float8_e4m3fn}, &stats);
  CHECK_EQ(stats.nans, 2);  // it has no infinity
  CHECK_EQ(stats.infs, 0);
}

TEST(other_types_are_refused) {
  double x[4] = {};
  float y[4] = {1, 2, 3, 4}, bucket[8] = {};
  const PackItem items[] = {{y, DType::float32, 4, 0}, {x, DType::float64, 4, 4}};
  CHECK_THROWS(TypeError, pack({items, bucket, DType::float32}, nullptr));
  CHECK_EQ(bucket[0], 0);  // before anything has moved
  CHECK_THROWS(TypeError, pack({{items, 1}, bucket, DType::int32}, nullptr));
}
