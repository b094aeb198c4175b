// Calls with codecs on float32 by rank threads, and comparisons of the ranks' results.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "rank_threads.h"
#include "schedule/lower/layout.h"

namespace float_calls {

using namespace pycomm;
using namespace pycomm::runtime;

using Floats = std::vector<float>;

inline Floats noise(int64_t count, int seed) {
  std::mt19937 random(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;
  Floats x(count);
  for (float& value : x) value = normal(random);
  return x;
}

inline Request request(const Communicator& comm, Collective kind, const Coding& coding, const Floats& in,
                       Floats& out) {
  Request request;
  request.call.world = {.collective = kind, .size = comm.size()};
  const auto count = static_cast<int64_t>(kind == Collective::reduce_scatter ? out.size() : in.size());
  request.call.counts = schedule::uniform_counts(request.call.world, count);
  request.call.in_place = in.data() == out.data();
  request.coding = std::make_shared<Coding>(coding);
  request.in = in.data();
  request.out = out.data();
  return request;
}

// Residuals with `now` to be added by the next call; those that this call does not write stay `unwritten`.
inline std::shared_ptr<Residuals> residuals_of(const Floats& now, float unwritten = NAN) {
  auto residuals = std::make_shared<Residuals>(static_cast<int64_t>(now.size()));
  std::ranges::copy(now, residuals->now());
  std::fill_n(residuals->next(), now.size(), unwritten);
  return residuals;
}

inline Floats owed(Residuals& residuals) { return {residuals.now(), residuals.now() + residuals.count()}; }

inline void run(Communicator& comm, const Request& request) {
  Patience patience;
  comm.execute(request, patience);
}

// A copy of each rank's result, so that one rank can compare them.
class Copies {
 public:
  void add(const Floats& x) {
    const std::lock_guard lock(mutex_);
    all_.push_back(x);
  }
  bool equal() const {  // bit for bit
    return std::ranges::all_of(all_, [&](const Floats& x) {
      return x.size() == all_[0].size() &&
             std::memcmp(x.data(), all_[0].data(), x.size() * sizeof(float)) == 0;
    });
  }

 private:
  std::mutex mutex_;
  std::vector<Floats> all_;
};

inline double relative_error(const Floats& x, const std::vector<double>& exact) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    error += (x[i] - exact[i]) * (x[i] - exact[i]);
    norm += exact[i] * exact[i];
  }
  return error / norm;
}

inline std::vector<double> sum_of(int n, int64_t count) {
  std::vector<double> sum(count);
  for (int r = 0; r < n; ++r) {
    const Floats x = noise(count, r);
    for (int64_t i = 0; i < count; ++i) sum[i] += x[i];
  }
  return sum;
}

}  // namespace float_calls
