// The plans of a rank's calls, and the users' algorithms that some of them come from. Thread-safe.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "runtime/executor.h"
#include "runtime/fabric.h"
#include "runtime/token.h"

namespace pycomm::runtime {

class PlanCache {
 public:
  using Write = std::function<schedule::Schedule(const schedule::World&)>;

  // `fabric` must outlive it. `size`: of the group, whose windows decide how plans cut data.
  PlanCache(const Fabric& fabric, int size) : fabric_(fabric), size_(size) {}

  // The plan of a call, by the named algorithm (empty: the library chooses), for one rank of call.world.
  // Throws ValueError where that algorithm does not exist, is wrong, or cannot do what the call asks.
  std::shared_ptr<const Prepared> prepare(const schedule::Call& call, const std::string& algorithm, int rank);

  // A user's own algorithm, known from now on under its name for this collective. `write` must be pure.
  // Plans from it are proved before they run. Throws ValueError for a name that the library has taken.
  void add_algorithm(schedule::Collective collective, const std::string& name, Write write);

 private:
  struct Entry {
    schedule::Call call;
    std::string algorithm;
    int rank;
    std::shared_ptr<const Prepared> prepared;
  };
  struct UserAlgorithm {
    schedule::Collective collective;
    std::string name;
    Write write;
  };
  Write user_algorithm(schedule::Collective collective, const std::string& name) const;
  schedule::Plan lower_and_prove(const schedule::Call& call, const std::string& algorithm, int rank) const;

  const Fabric& fabric_;
  const int size_;
  mutable Token mutex_;
  std::array<Entry, 32> recent_;  // by a cheap hash: what a training loop calls
  std::unordered_multimap<uint64_t, Entry> all_;
  uint64_t generation_ = 0;  // grows with each algorithm that is added
  std::vector<UserAlgorithm> user_algorithms_;
};

}  // namespace pycomm::runtime
