// The bodies of cuda::shared_amax(), shared_encode() and shared_decode(), run on the CPU, against the CPU's
// kernels: the same bytes.
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "emulated_grid.h"
#include "kernels/codec.h"
#include "kernels/cuda/shared_int.h"

using namespace pycomm;
using namespace pycomm::kernels;

namespace {

namespace e = pycomm::kernels::emulated;
using ::emulated::Order;

std::mt19937_64 random_bits(1);

template <class Body>
void run(const e::SharedCall& call) {
  for (const Order order : {Order::forward, Order::shuffled}) ::emulated::run<Body>(call, 3, order);
}

std::vector<unsigned char> make(DType dtype, int64_t count, size_t misplaced) {
  std::vector<unsigned char> bytes(misplaced + static_cast<size_t>(count) * size_of(dtype));
  float magnitude = 1;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t bits = random_bits();
    if (i % 128 == 0)
      magnitude = std::ldexp(1.f, static_cast<int>(bits % 24) - 12) * (bits >> 30 & 7 ? 1.f : 0.f);
    float x = (static_cast<float>(bits >> 40) / (1 << 23) - 1) * magnitude;
    if (bits % 3001 == 0) x = bits & 1024 ? -INFINITY : std::nanf("1");
    const uint16_t half = dtype == DType::float16 ? e::Float16::encode(x) : e::BFloat16::encode(x);
    unsigned char* to = bytes.data() + misplaced + static_cast<size_t>(i) * size_of(dtype);
    if (dtype == DType::float32) std::memcpy(to, &x, 4);
    if (dtype != DType::float32) std::memcpy(to, &half, 2);
  }
  return bytes;
}

void check_case(DType dtype, int64_t count, int width, int world, size_t misplaced, bool residual,
                const std::vector<Segment>& segments) {
  const std::string title = std::string(name(dtype)) + " " + std::to_string(count) + " width " +
                            std::to_string(width) + " misplaced " + std::to_string(misplaced) +
                            (residual ? " residual" : "") + (segments.empty() ? "" : " segments");
  const auto n = static_cast<size_t>(count), blocks = (n + 127) / 128;
  const std::vector<unsigned char> memory = make(dtype, count, misplaced);
  const void* x = memory.data() + misplaced;
  std::vector<float> errors(n), next_got(n), next_want(n);
  for (float& error : errors) error = static_cast<float>(random_bits() % 100) * 1e-4f;
  Encoding encoding{.step = 3, .turn = 1, .rank = 2, .index = 1024, .segments = segments};
  if (residual) encoding.residual = errors.data();
  if (residual) encoding.residual_scale = 0.5f;
  const int64_t limit = shared_limit(width, world);

  std::vector<float> amax_got(blocks, -1), amax_want(blocks, -2);
  shared_amax(dtype, x, n, amax_want.data(), encoding);
  e::each_launch(encoding, count, [&](int64_t begin, int64_t some, const e::Segments& of_launch) {
    e::SharedCall call = e::make_shared_call(dtype, x, nullptr, 32, 0, nullptr, begin, some);
    call.encode = e::make_encode_call(encoding, true, 0, begin, some, of_launch);
    call.new_amax = amax_got.data() + begin / 128;
    run<e::SharedAmax>(call);
  });
  CHECK(std::memcmp(amax_got.data(), amax_want.data(), 4 * blocks) == 0);

  const size_t bytes = n * static_cast<size_t>(width) / 8;
  std::vector<unsigned char> q_got(bytes + 20, 1), q_want(bytes + 20, 1);
  if (residual) encoding.next_residual = next_want.data();
  shared_encode(dtype, x, n, amax_want.data(), width, limit, 99, encoding, q_want.data() + misplaced % 5,
                chosen_isa());
  if (residual) encoding.next_residual = next_got.data();
  e::each_launch(encoding, count, [&](int64_t begin, int64_t some, const e::Segments& of_launch) {
    e::SharedCall call = e::make_shared_call(dtype, x, q_got.data() + misplaced % 5, width, limit,
                                             amax_want.data(), begin, some);
    call.encode = e::make_encode_call(encoding, true, 99, begin, some, of_launch);
    run<e::SharedEncode>(call);
  });
  if (q_got != q_want) check::fail(__FILE__, __LINE__, title + ": integers differ");
  if (std::memcmp(next_got.data(), next_want.data(), 4 * n) != 0) {
    check::fail(__FILE__, __LINE__, title + ": residuals differ");
  }

  std::vector<unsigned char> out_got(n * size_of(dtype) + 20, 2), out_want(n * size_of(dtype) + 20, 2);
  const unsigned char* q = q_want.data() + misplaced % 5;
  shared_decode(q, n, amax_want.data(), width, limit, world, dtype, out_want.data() + misplaced,
                chosen_isa());
  e::SharedCall call =
      e::make_shared_call(dtype, out_got.data() + misplaced, q, width, limit, amax_want.data(), 0, count);
  call.divisor = static_cast<float>(world);
  run<e::SharedDecode>(call);
  if (out_got != out_want) check::fail(__FILE__, __LINE__, title + ": values differ");
}

}  // namespace

TEST(every_type_and_width) {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    for (const int width : {8, 16, 32}) {
      for (const int64_t count : {1, 127, 128, 129, 1023, 5000}) {
        for (const size_t misplaced : {0, 4, 7}) {
          for (const bool residual : {false, true})
            check_case(dtype, count, width, 3, misplaced, residual, {});
        }
      }
    }
  }
}

TEST(segments) {
  const std::vector<Segment> segments = {{0, 1500, 4}, {1536, 1537, 9}, {1792, 4000, 12}, {4352, 9000, 77}};
  for (const int width : {8, 32}) {
    check_case(DType::float32, 6000, width, 2, 0, true, segments);
    check_case(DType::bfloat16, 2999, width, 2, 0, false, segments);
  }
}
