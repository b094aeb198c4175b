// The bodies of cuda::topk_encode() and topk_decode_add(), run on the CPU, against the CPU's kernels: the
// same records.
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "emulated_grid.h"
#include "kernels/cuda/topk.h"
#include "kernels/topk.h"

using namespace pycomm;
using namespace pycomm::kernels;

namespace {

namespace e = pycomm::kernels::emulated;
using ::emulated::Order;
using Bytes = std::vector<unsigned char>;

std::mt19937_64 random_bits(1);

// As topk.cu does it.
void emulate(const TopkArgs& args, int64_t blocks, Order order) {
  std::vector<uint64_t> workspace(static_cast<size_t>(e::topk_room(static_cast<int64_t>(args.count)) / 8 + 2),
                                  0x7777);
  auto* room = workspace.data() + (reinterpret_cast<uintptr_t>(workspace.data()) % 16 ? 1 : 0);
  e::TopkCall call = e::make_topk_call(args, room);
  if (call.k < args.capacity) {
    std::memset(args.record, 0, static_cast<size_t>(topk_record_bytes(static_cast<int64_t>(args.capacity))));
  }
  const int64_t grid = std::min(blocks, e::topk_chunks(call.count));
  if (call.k > 0) {
    std::memset(static_cast<void*>(call.state), 0, sizeof *call.state);
    for (call.pass = 0; call.pass < e::kTopkPasses; ++call.pass)
      ::emulated::run<e::TopkHistogram>(call, grid, order);
  }
  ::emulated::run<e::TopkCount>(call, grid, order);
  ::emulated::run<e::TopkPlace>(call, 1, order);
  ::emulated::run<e::TopkWrite>(call, grid, order);
}

enum class Kind { ordinary, few_values, any_bits };

std::vector<float> make(size_t count, Kind kind) {
  std::vector<float> x(count);
  for (float& value : x) {
    const uint64_t bits = random_bits();
    const auto any = static_cast<uint32_t>(bits);
    value = (static_cast<float>(bits >> 40) / (1 << 23) - 1) * std::ldexp(1.f, static_cast<int>(bits % 12));
    if (kind == Kind::few_values) value = static_cast<float>(static_cast<int>(bits % 5)) - 2;
    if (kind == Kind::any_bits) std::memcpy(&value, &any, 4);
    if (kind == Kind::any_bits && bits >> 60 == 0) value = bits >> 59 & 1 ? INFINITY : std::nanf("5");
  }
  return x;
}

// Equal bits, save that what is left of a NaN is any NaN.
bool same(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], 4) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  }
  return true;
}

void check_case(DType dtype, size_t count, size_t capacity, Kind kind, bool residual, size_t misplaced = 0,
                int64_t blocks = 3, Order order = Order::shuffled) {
  const std::vector<float> x = make(count, kind), errors = make(count, Kind::ordinary);
  Bytes memory(count * size_of(dtype) + misplaced);
  for (size_t i = 0; i < count; ++i) {
    const uint16_t half = dtype == DType::float16 ? e::Float16::encode(x[i]) : e::BFloat16::encode(x[i]);
    unsigned char* to = memory.data() + misplaced + i * size_of(dtype);
    if (dtype == DType::float32) std::memcpy(to, &x[i], 4);
    if (dtype != DType::float32) std::memcpy(to, &half, 2);
  }
  const auto bytes = static_cast<size_t>(topk_record_bytes(static_cast<int64_t>(capacity)));
  Bytes got(bytes + 16, 3), want(bytes + 16, 3);
  std::vector<float> next_got = errors, next_want = errors;  // in place
  TopkArgs args{.dtype = dtype,
                .x = memory.data() + misplaced,
                .count = count,
                .capacity = capacity,
                .record = want.data()};
  const auto feed_back = [&](std::vector<float>& to) {
    if (!residual) return;
    args.residual = args.next_residual = to.data();
    args.residual_scale = 0.25f;
  };
  feed_back(next_want);
  topk_encode(args);
  feed_back(next_got);
  args.record = got.data();
  emulate(args, blocks, order);
  const std::string title = std::string(name(dtype)) + " " + std::to_string(capacity) + " of " +
                            std::to_string(count) + " kind " + check::show(kind) +
                            (residual ? " residual" : "");
  if (got != want) check::fail(__FILE__, __LINE__, title + ": records differ");
  if (!same(next_got, next_want)) check::fail(__FILE__, __LINE__, title + ": residuals differ");

  std::vector<float> sum_got = make(count, Kind::ordinary), sum_want = sum_got;
  topk_decode_add(want.data(), capacity, sum_want.data(), count);
  const auto* header = reinterpret_cast<const uint32_t*>(got.data());
  ::emulated::run<e::TopkAdd>({.header = header,
                               .indices = header + 4,
                               .values = reinterpret_cast<const float*>(header + 4 + capacity),
                               .capacity = static_cast<uint32_t>(capacity),
                               .sum = sum_got.data(),
                               .count = static_cast<int64_t>(count)},
                              2, order);
  if (count > 0 && std::memcmp(sum_got.data(), sum_want.data(), 4 * count) != 0) {
    check::fail(__FILE__, __LINE__, title + ": sums differ");
  }
}

}  // namespace

TEST(every_type_kind_and_k) {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    for (const Kind kind : {Kind::ordinary, Kind::few_values, Kind::any_bits}) {
      for (const size_t count : {1, 100, 4095, 4096, 4097, 30'011}) {
        for (const size_t k : {size_t{0}, size_t{1}, count / 100, count / 3, count - 1, count, count + 5}) {
          for (const bool residual : {false, true}) check_case(dtype, count, k, kind, residual);
        }
      }
    }
  }
}

TEST(nothing) { check_case(DType::float32, 0, 3, Kind::ordinary, false); }

TEST(misplaced) {
  for (const size_t misplaced : {1, 2, 4, 8})
    check_case(DType::float32, 9001, 90, Kind::ordinary, true, misplaced);
}

// More chunks than one thread of the block that places them has.
TEST(large) { check_case(DType::float32, 4096 * 1500 + 7, 60'000, Kind::ordinary, true, 0, 50); }

TEST(launch_shapes_and_orders) {
  for (const int64_t blocks : {1, 2, 7}) {
    for (const Order order : {Order::forward, Order::backward, Order::shuffled}) {
      check_case(DType::float32, 50'000, 500, Kind::few_values, true, 0, blocks, order);
    }
  }
}

// Entries of a record that was made from longer data.
TEST(what_does_not_fit_is_left_out) {
  uint32_t record[4 + 2 + 2] = {2, 0, 0, 0, 1, 7};
  const float values[] = {3, 4};
  std::memcpy(record + 6, values, 8);
  std::vector<float> sum(4, 1.f);
  const e::TopkAddCall call{record, record + 4, reinterpret_cast<const float*>(record + 6), 2, sum.data(), 4};
  ::emulated::run<e::TopkAdd>(call, 1, Order::forward);
  CHECK(sum == std::vector<float>({1, 4, 1, 1}));
}
