// Calls that consist of several plans: topk, shared_int, lossless.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "float_calls.h"

using namespace float_calls;

TEST(topk_adds_the_largest_of_every_rank) {
  for (const int n : {1, 2, 3}) {
    for (const int64_t count : {1, 50, 5000}) {
      for (const int64_t k : {int64_t{1}, count / 10 + 1, count + 5}) {
        std::vector<double> exact(count);
        std::vector<Floats> left(n);
        for (int r = 0; r < n; ++r) {
          Floats x = noise(count, r);
          std::vector<int64_t> order(count);
          std::iota(order.begin(), order.end(), 0);
          std::ranges::stable_sort(order, std::greater{}, [&](int64_t i) { return std::abs(x[i]); });
          for (int64_t i = 0; i < std::min(k, count); ++i) {
            exact[order[i]] += x[order[i]];
            x[order[i]] = 0;
          }
          left[r] = x;
        }
        run_threads(n, [&](Communicator& comm) {
          Patience patience;
          const Floats x = noise(count, comm.rank());
          for (const double prescale : {1.0, 0.5}) {
            for (const Op op : {Op::sum, Op::avg}) {
              Floats out(count);
              const auto residuals = residuals_of(Floats(count));
              Request r = request(comm, Collective::all_reduce, {.residuals = residuals}, x, out);
              r.composite = TopK{k};
              r.call.op = op;
              r.call.prescale = prescale;
              Bound bound = comm.bind(r);
              if (op == Op::avg) {
                comm.submit(bound)->wait(INFINITY, patience);
              } else {
                comm.run(bound, patience);
              }
              bool right = true;
              for (int64_t i = 0; i < count; ++i) {
                const double should = exact[i] * prescale / (op == Op::avg ? n : 1);
                right = right && std::abs(out[i] - should) <= 1e-6 * (1 + std::abs(should));
              }
              CHECK(right);
              CHECK(owed(*residuals) == left[comm.rank()]);
            }
          }
        });
      }
    }
  }
}

// Integers add exactly: no algorithm, trip or rank's order shows in the bits.
TEST(shared_int_does_not_depend_on_the_algorithm) {
  const int64_t count = 10007;
  const int n = 3;
  const std::vector<double> exact = sum_of(n, count);
  for (const int width : {8, 16, 32}) {
    Copies copies;
    run_threads(n, [&](Communicator& comm) {
      Patience patience;
      const Floats x = noise(count, comm.rank());
      for (const char* algorithm : {"two_shot", "ring", "one_shot", "tree"}) {
        Floats out(count);
        Request r = request(comm, Collective::all_reduce, {.codec = {.seed = 9}, .step = 2}, x, out);
        r.call.op = Op::avg;
        r.algorithm = algorithm;
        r.composite = SharedInt{width};
        Bound bound = comm.bind(r);
        if (algorithm[0] == 't') {
          comm.submit(bound)->wait(INFINITY, patience);
        } else {
          comm.run(bound, patience);
        }
        copies.add(out);
        for (float& value : out) value *= n;
        // A step is 1 / q_max of a block's largest: some 4 of 42 steps of one bit a rank.
        CHECK(relative_error(out, exact) < (width == 8 ? 3e-3 : 1e-6));
      }
    });
    CHECK(copies.equal());
  }
}

// Blocks of all lengths, of which one rank's cannot be made smaller, by calls that run again on other data.
TEST(lossless_changes_no_bit) {
  const int n = 3;
  const auto block = [](int rank, int64_t count, int step) {
    std::vector<uint16_t> x;
    std::mt19937 random(static_cast<unsigned>(100 * rank + step));
    for (const float value : noise(count, 100 * rank + step)) {
      const auto any = static_cast<uint16_t>(random());
      x.push_back(rank == step ? any : static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16));
    }
    return x;
  };
  for (const std::vector<int64_t>& counts : {std::vector<int64_t>{70000, 70000, 70000}, {500, 0, 90000}}) {
    run_threads(n, [&](Communicator& comm) {
      Patience patience;
      std::vector<uint16_t> in(counts[comm.rank()]), out(std::reduce(counts.begin(), counts.end())),
          sent(500);
      Request gather, spread;
      gather.call.world = {.collective = Collective::all_gather, .size = n};
      gather.call.counts = counts;
      gather.in = in.data();
      gather.out = out.data();
      spread.call.world = {.collective = Collective::broadcast, .size = n, .root = 1};
      spread.call.counts = {500};
      spread.call.in_place = true;
      spread.in = spread.out = sent.data();
      for (Request* request : {&gather, &spread}) {
        request->call.dtype = DType::bfloat16;
        request->composite = Lossless{};
      }
      Bound gathers = comm.bind(gather), spreads = comm.bind(spread);
      for (int step = 0; step < 4; ++step) {
        std::ranges::copy(block(comm.rank(), counts[comm.rank()], step), in.begin());
        std::ranges::copy(block(comm.rank(), 500, step), sent.begin());
        if (step % 2) {
          comm.submit(gathers)->wait(INFINITY, patience);
          comm.submit(spreads)->wait(INFINITY, patience);
        } else {
          comm.run(gathers, patience);
          comm.run(spreads, patience);
        }
        std::vector<uint16_t> all;
        for (int r = 0; r < n; ++r) {
          const auto part = block(r, counts[r], step);
          all.insert(all.end(), part.begin(), part.end());
        }
        CHECK(out == all);
        CHECK(sent == block(1, 500, step));
      }
      gather.call.dtype = DType::float32;
      CHECK_THROWS(TypeError, comm.bind(gather));
    });
  }
}
