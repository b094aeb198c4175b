#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/arithmetic/codec_rounding.h"
#include "kernels/codec.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/topk_kernels.h"

namespace pycomm::kernels::PYCOMM_ISA {
namespace {

// A byte for each element says whether it is kept; seldom does one, so that eight of them are looked at at
// once.
size_t scan(const float* x, size_t n, uint32_t least, uint32_t index, uint32_t* indices, float* values) {
  const uint32_t any_nan = kFloatInf + 1;
  const uint32_t bound = least > kFloatNan ? 0xffffffff : least > any_nan ? any_nan : least;
  alignas(64) uint8_t kept[kTile];
  for (size_t i = 0; i < n; ++i) kept[i] = magnitude_of(x[i]) >= bound;
  std::memset(kept + n, 0, -n % 8);
  size_t found = 0;
  for (size_t i = 0; i < n; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, kept + i, 8);
    for (; eight != 0; eight &= eight - 1) {
      const size_t at = i + static_cast<size_t>(__builtin_ctzll(eight)) / 8;
      indices[found] = index + static_cast<uint32_t>(at);
      values[found++] = canonical(x[at]);
    }
  }
  return found;
}

struct __attribute__((packed, may_alias)) Unaligned {
  float value;
};

void keep_residual(float* next, const float* v, size_t n, float k) {
  auto* to = reinterpret_cast<Unaligned*>(next);
  for (size_t i = 0; i < n; ++i) to[i].value = v[i] / k;
}

}  // namespace

const TopkKernels topk_kernels = {.scan = scan, .keep_residual = keep_residual};

}  // namespace pycomm::kernels::PYCOMM_ISA
