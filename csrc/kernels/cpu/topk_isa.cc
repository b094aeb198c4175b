#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/arithmetic/codec_rounding.h"
#include "kernels/codec.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/topk_kernels.h"
#include "kernels/cpu/vectors.h"

namespace pycomm::kernels::PYCOMM_ISA {
namespace {

constexpr size_t kGroup = 4 * kWidth;  // elements that are examined at a time

// A bit for each element of a group: set if its magnitude exceeds `below`.
PYCOMM_INLINE uint64_t reach(const float* x, Integers below) {
  Integers reached[4];
  for (int v = 0; v < 4; ++v) {
    const Words magnitude = load<Words>(x + v * kWidth) & 0x7fffffff;
    reached[v] = __builtin_bit_cast(Integers, magnitude) > below;
  }
  return mask_of_four(reached);
}

// Elements are seldom kept, so groups with any are found first, without a branch.
size_t scan(const float* x, size_t n, uint32_t least, uint32_t index, uint32_t* indices, float* values) {
  if (least > kFloatNan) return 0;
  constexpr uint32_t kAnyNan = kFloatInf + 1;
  const Integers below = Integers{} + (static_cast<int32_t>(least < kAnyNan ? least : kAnyNan) - 1);
  const auto* element = in<float>(x);
  uint64_t masks[kTile / kGroup];
  uint32_t groups[kTile / kGroup];
  size_t hits = 0, i = 0;
  const auto enter = [&](uint64_t mask) PYCOMM_LAMBDA {
    masks[hits] = mask;
    groups[hits] = static_cast<uint32_t>(i);
    hits += mask != 0;
  };
  for (; i + kGroup <= n; i += kGroup) {
    prefetch(x + i, kGroup * sizeof *x);
    enter(reach(x + i, below));
  }
  if (i < n) {
    float rest[kGroup] = {};
    std::memcpy(rest, x + i, (n - i) * sizeof *x);
    enter(reach(rest, below) & ((uint64_t{1} << (n - i)) - 1));
  }
  size_t found = 0;
  for (size_t hit = 0; hit < hits; ++hit) {
    uint64_t mask = masks[hit];
    do {
      const uint32_t at = groups[hit] + static_cast<uint32_t>(__builtin_ctzll(mask));
      indices[found] = index + at;
      values[found++] = canonical(element[at].value);
      mask &= mask - 1;
    } while (mask != 0);
  }
  return found;
}

void keep_residual(float* next, const float* v, size_t n, float k) {
  auto* to = out<float>(next);
  const auto* value = in<float>(v);
  for (size_t i = 0; i < n; ++i) to[i].value = value[i].value / k;
}

}  // namespace

const TopkKernels topk_kernels = {.scan = scan, .keep_residual = keep_residual};

}  // namespace pycomm::kernels::PYCOMM_ISA
