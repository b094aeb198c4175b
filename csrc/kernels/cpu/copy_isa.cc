// Copies for one instruction set. The destination's cache lines are stored whole and in order; the source is
// read where it lies, since a load that crosses a line costs less than a store that does.
#include "kernels/cpu/isa.h"
#include "kernels/cpu/strips.h"

namespace pycomm::kernels::PYCOMM_ISA {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kStep = 2 * kLine;
constexpr size_t kShort = 4 * kLine;  // below, libc is as fast
static_assert(kShort >= kLine + kStep);

PYCOMM_INLINE void copy_step(char* to, const char* from) {
  constexpr int kVectors = kStep / sizeof(Words);
  Words x[kVectors];
  for (int i = 0; i < kVectors; ++i) x[i] = load<Words>(from + i * sizeof(Words));
  for (int i = 0; i < kVectors; ++i) store(to + i * sizeof(Words), x[i]);
}

template <bool kPast>
PYCOMM_INLINE void copy_run(char* to, const char* from, size_t bytes) {
  if (bytes < kShort) {
    std::memcpy(to, from, bytes);
    return;
  }
  copy_step(to, from);  // the first lines, of which the loop begins with the first whole one
  for (size_t i = kLine - reinterpret_cast<uintptr_t>(to) % kLine; i + kStep <= bytes; i += kStep) {
    if constexpr (kPast) {
      stream_lines(to + i, from + i, kStep / kLine);
    } else {
      copy_step(to + i, from + i);
    }
  }
  copy_step(to + bytes - kStep, from + bytes - kStep);  // what is left, and some before it once more
}

}  // namespace

void copy(void* dst, const void* src, size_t bytes) {
  copy_run<false>(static_cast<char*>(dst), static_cast<const char*>(src), bytes);
}

void copy_past(void* dst, const void* src, size_t bytes) {
  copy_run<true>(static_cast<char*>(dst), static_cast<const char*>(src), bytes);
}

}  // namespace pycomm::kernels::PYCOMM_ISA
