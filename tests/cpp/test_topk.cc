// Top-k against a sort; and sums of records, hostile ones among them.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "float_table.h"
#include "isas.h"
#include "kernels/topk.h"

using namespace pycomm;
using namespace pycomm::kernels;

namespace {

using Floats = std::vector<float>;

float quiet(float x) { return std::isnan(x) ? std::bit_cast<float>(0x7fc00000u) : x; }
bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Larger first: NaN, Inf, finite ones; of equal magnitudes the lower index.
std::vector<uint32_t> largest(const Floats& v, size_t k) {
  std::vector<uint32_t> order(v.size());
  for (size_t i = 0; i < v.size(); ++i) order[i] = static_cast<uint32_t>(i);
  const auto rank = [&](uint32_t i) {
    return std::isnan(v[i]) ? std::numeric_limits<double>::max() : std::fmin(std::fabs(double{v[i]}), 1e300);
  };
  const auto middle = order.begin() + static_cast<std::ptrdiff_t>(std::min(k, v.size()));
  std::partial_sort(order.begin(), middle, order.end(),
                    [&](uint32_t a, uint32_t b) { return rank(a) != rank(b) ? rank(a) > rank(b) : a < b; });
  order.erase(middle, order.end());
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<uint8_t> record_of(const std::vector<uint32_t>& indices, const Floats& v, size_t capacity) {
  std::vector<uint8_t> record(16 + 8 * capacity);
  const auto count = static_cast<uint32_t>(indices.size());
  std::memcpy(record.data(), &count, 4);
  for (size_t i = 0; i < indices.size(); ++i) {
    const float value = quiet(v[indices[i]]);
    std::memcpy(record.data() + 16 + 4 * i, &indices[i], 4);
    std::memcpy(record.data() + 16 + 4 * capacity + 4 * i, &value, 4);
  }
  return record;
}

enum class Kind { normal, ascending, few_values, zeros, special, heavy };
constexpr Kind kKinds[] = {Kind::normal, Kind::ascending, Kind::few_values,
                           Kind::zeros,  Kind::special,   Kind::heavy};

Floats values(size_t count, Kind kind, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Floats x(count);
  for (float& value : x) value = normal(random);
  if (kind == Kind::ascending)
    std::sort(x.begin(), x.end(), [](float a, float b) { return std::fabs(a) < std::fabs(b); });
  for (float& value : x) {
    if (kind == Kind::few_values) value = std::round(value);
    if (kind == Kind::zeros) value = random() % 2 ? 0.0f : -0.0f;
    if (kind == Kind::heavy) value = std::exp(20 * value);
    if (kind != Kind::special) continue;
    const uint32_t odd[] = {0x7fc00000, 0xff800001, 0x7f800000, 0xff800000,
                            0x00000001, 0x7f7fffff, 0x7fffffff};
    if (random() % 30 == 0) value = std::bit_cast<float>(odd[random() % 7]);
  }
  return x;
}

void against_sort(const Floats& x, size_t capacity) {
  const Floats e = values(x.size(), Kind::normal, 99);
  for (const float k : {0.0f, 1.0f, 0.3f}) {  // 0: without residuals
    Floats v = x;
    for (size_t i = 0; k != 0 && i < x.size(); ++i) {
      volatile float product = k * e[i], sum = x[i] + product;
      v[i] = sum;
    }
    const std::vector<uint32_t> expected = largest(v, capacity);
    Floats left = v;
    for (float& value : left) value = k == 0 ? value : value / k;
    for (const uint32_t i : expected) left[i] = 0;
    for (const Isa* isa : isas()) {
      for (const bool in_place : {false, true}) {
        std::vector<uint8_t> record(static_cast<size_t>(topk_record_bytes(static_cast<int64_t>(capacity))),
                                    0xa5);
        std::vector<uint8_t> around(x.size() * 4 + 1);  // x at an odd address
        if (!x.empty()) std::memcpy(around.data() + 1, x.data(), x.size() * 4);
        Floats now = e, next(x.size());
        topk_encode({.dtype = DType::float32,
                     .x = around.data() + 1,
                     .count = x.size(),
                     .capacity = capacity,
                     .record = record.data(),
                     .residual = k != 0 ? now.data() : nullptr,
                     .next_residual = k == 0     ? nullptr
                                      : in_place ? now.data()
                                                 : next.data(),
                     .residual_scale = k == 0 ? 1 : k},
                    *isa);
        CHECK(record == record_of(expected, v, capacity));
        if (k == 0) continue;
        Floats& kept = in_place ? now : next;
        for (float& value : kept) value = quiet(value);
        Floats wanted = left;
        for (float& value : wanted) value = quiet(value);
        CHECK(same_bits(kept, wanted));
      }
    }
  }
}

}  // namespace

TEST(every_length) {
  for (size_t count = 0; count < 4100; count += count < 40 ? 1 : 173) {
    for (const Kind kind : kKinds) {
      for (const size_t k : {size_t{0}, size_t{1}, count / 100, count / 3, count, count + 7}) {
        against_sort(values(count, kind, static_cast<uint32_t>(count)), k);
      }
    }
  }
}

// Long enough for a guess from a sample, which fails where the large values stand aside.
TEST(large) {
  const size_t count = 700000;
  for (const Kind kind : kKinds) {
    for (const size_t k : {size_t{3}, size_t{7000}, size_t{300000}}) against_sort(values(count, kind, 5), k);
  }
  Floats aside(count, 1);
  for (size_t i = 0; i < count; i += 170) {
    for (size_t j = i; j < std::min(i + 18, count); ++j) aside[j] = static_cast<float>(j);
  }
  against_sort(aside, 100000);
}

TEST(half_precision) {
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    const Floats x = values(3000, Kind::few_values, 8);
    std::vector<uint16_t> raw;
    for (const float value : x) raw.push_back(static_cast<uint16_t>(table_of(dtype)->encode(value)));
    std::vector<uint8_t> record(static_cast<size_t>(topk_record_bytes(500)));
    topk_encode(
        {.dtype = dtype, .x = raw.data(), .count = x.size(), .capacity = 500, .record = record.data()});
    CHECK(record == record_of(largest(x, 500), x, 500));
  }
}

TEST(sums) {
  const Floats x = values(5000, Kind::special, 3), y = values(5000, Kind::normal, 4);
  std::vector<uint8_t> record(static_cast<size_t>(topk_record_bytes(400)));
  topk_encode(
      {.dtype = DType::float32, .x = x.data(), .count = x.size(), .capacity = 400, .record = record.data()});
  std::vector<uint8_t> around(y.size() * 4 + 1);
  std::memcpy(around.data() + 1, y.data(), y.size() * 4);
  topk_decode_add(record.data(), 400, reinterpret_cast<float*>(around.data() + 1), y.size());
  Floats expected = y, got(y.size());
  for (const uint32_t i : largest(x, 400)) {
    volatile float sum = y[i] + x[i];
    expected[i] = quiet(sum);
  }
  std::memcpy(got.data(), around.data() + 1, got.size() * 4);
  CHECK(same_bits(got, expected));
}

// Whatever a record says, nothing outside of the sum is written, and nothing at all if it does not fit.
TEST(whether_what_a_record_touches_is_finite) {
  const Floats x = values(500, Kind::normal, 3);
  std::vector<uint8_t> record(static_cast<size_t>(topk_record_bytes(20)));
  topk_encode(
      {.dtype = DType::float32, .x = x.data(), .count = 500, .capacity = 20, .record = record.data()});
  const std::vector<uint32_t> touched = largest(x, 20);
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    std::vector<uint8_t> out(500 * size_of(dtype));
    CHECK(topk_finite(record.data(), 20, dtype, out.data()));
    for (size_t i = 0; i < 500; ++i) {
      uint8_t* top = &out[(i + 1) * size_of(dtype) - 2];  // the sign and the exponent
      top[0] = dtype == DType::float16 ? 0 : 0x80;
      top[1] = dtype == DType::float16 ? 0x7c : 0x7f;
      const bool is_touched = std::ranges::find(touched, i) != touched.end();
      CHECK_EQ(topk_finite(record.data(), 20, dtype, out.data()), !is_touched);
      top[0] = top[1] = 0;
    }
  }
}

TEST(hostile_records) {
  std::mt19937 random(6);
  const size_t capacity = 20, count = 100;
  int refused = 0, taken = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    std::vector<uint8_t> record(static_cast<size_t>(topk_record_bytes(capacity)));
    const Floats x = values(count, Kind::normal, random());
    topk_encode({.dtype = DType::float32,
                 .x = x.data(),
                 .count = count,
                 .capacity = capacity,
                 .record = record.data()});
    for (int damage = static_cast<int>(random() % 4); damage > 0; --damage) {
      record[random() % (trial % 2 ? record.size() : 40)] = static_cast<uint8_t>(random());
    }
    uint32_t entries, last = 0;
    std::memcpy(&entries, record.data(), 4);
    bool fits = entries <= capacity;
    for (uint32_t i = 0; fits && i < entries; ++i) {
      uint32_t index;
      std::memcpy(&index, record.data() + 16 + 4 * i, 4);
      fits = index < count && (i == 0 || index > last);
      last = index;
    }
    Floats sum(count + 32, 2);
    bool threw = false;
    try {
      topk_decode_add(record.data(), capacity, sum.data() + 16, count);
    } catch (const ValueError&) {
      threw = true;
    }
    CHECK_EQ(threw, !fits);
    ++(threw ? refused : taken);
    for (size_t i = 0; i < sum.size(); ++i) {
      if (threw || i < 16 || i >= count + 16) CHECK_EQ(sum[i], 2);
    }
  }
  CHECK(refused > 1000);
  CHECK(taken > 1000);
}
