// Runs the GPU kernels' bodies (csrc/kernels/cuda/grid.h) on the CPU: block after block, thread after thread.
// The bodies are compiled in a namespace of their own, pycomm::kernels::emulated.
//
// Besides wrong results this finds, under AddressSanitizer and UBSan above all: accesses that are out of
// bounds or misaligned; results that depend on the order of threads or blocks, which changes from run to run;
// and a missing sync(), since two each() without one between them are an error.
#pragma once

#define PYCOMM_ISA emulated

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

namespace emulated {

enum class Order { forward, backward, shuffled };

inline std::vector<int64_t> permutation(int64_t n, Order order, uint64_t seed) {
  std::vector<int64_t> all(static_cast<size_t>(n));
  std::iota(all.begin(), all.end(), 0);
  if (order == Order::backward) std::reverse(all.begin(), all.end());
  if (order == Order::shuffled) std::shuffle(all.begin(), all.end(), std::mt19937_64(seed));
  return all;
}

template <int kThreadsOfBlock>
class Block {
 public:
  static constexpr int kThreads = kThreadsOfBlock;
  template <class T>
  struct PerThread {
    std::array<T, kThreads> of;
    T& operator[](int thread) { return of[static_cast<size_t>(thread)]; }
  };

  Block(int64_t index, int64_t blocks, Order order)
      : index_(index), blocks_(blocks), threads_(permutation(kThreads, order, 7)) {}

  int64_t index() const { return index_; }
  int64_t blocks() const { return blocks_; }
  template <class F>
  void each(const F& f) {
    if (!synced_) throw std::logic_error("two each() without a sync() between them");
    synced_ = false;
    for (int64_t thread : threads_) f(static_cast<int>(thread));
  }
  void sync() { synced_ = true; }
  uint32_t add(uint32_t* p, uint32_t x) const {
    const uint32_t before = *p;
    *p += x;
    return before;
  }

 private:
  int64_t index_, blocks_;
  std::vector<int64_t> threads_;
  bool synced_ = true;
};

template <class Body>
void run(const typename Body::Args& args, int64_t blocks, Order order) {
  for (int64_t index : permutation(std::max<int64_t>(blocks, 1), order, 11)) {
    const auto shared = std::make_unique<typename Body::Shared>();
    std::memset(static_cast<void*>(shared.get()), 0xa5, sizeof *shared);
    Block<Body::kThreads> block(index, std::max<int64_t>(blocks, 1), order);
    Body::run(block, args, *shared);
  }
}

}  // namespace emulated
