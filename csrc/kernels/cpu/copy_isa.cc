// Copies for one instruction set. The destination's cache lines are stored whole and in order; the source is
// read where it lies, since a load across two lines costs less than such a store.
//
// Bytes before the first whole line and after the last one are stored by vectors that overlap the others.
// Copies past the cache do not overlap: a line that is stored both ways comes into the cache after all, and
// reductions copy short blocks.
#include "kernels/cpu/isa.h"
#include "kernels/cpu/strips.h"

namespace pycomm::kernels::PYCOMM_ISA {
namespace {

constexpr size_t kStep = 2 * kLine;
constexpr size_t kShort = 4 * kLine;  // libc is as fast below this
static_assert(kShort >= kLine + kStep);

PYCOMM_INLINE void copy_step(char* to, const char* from) {
  constexpr int kVectors = kStep / sizeof(Words);
  Words x[kVectors];
  for (int i = 0; i < kVectors; ++i) x[i] = load<Words>(from + i * sizeof(Words));
  for (int i = 0; i < kVectors; ++i) store(to + i * sizeof(Words), x[i]);
}

struct Line {
  static constexpr int kVectors = kLine / sizeof(Words);
  Words x[kVectors];

  PYCOMM_INLINE static Line load_from(const char* from) {
    Line line;
    for (int i = 0; i < kVectors; ++i) line.x[i] = load<Words>(from + i * sizeof(Words));
    return line;
  }
  PYCOMM_INLINE void store_past(char* to) const {
    for (int i = 0; i < kVectors; ++i) stream(to + i * sizeof(Words), x[i]);
  }
};

// The next line is loaded before the current one is stored. Otherwise, where the destination lies up to a
// line beyond the source modulo 4 KiB, the load would seem to depend on the store just made, and wait for it.
PYCOMM_INLINE void copy_lines_past(char* to, const char* from, size_t lines) {
  if (lines == 0) return;
  Line line = Line::load_from(from);
  for (size_t i = kLine; i < lines * kLine; i += kLine) {
    const Line next = Line::load_from(from + i);
    line.store_past(to + i - kLine);
    line = next;
  }
  line.store_past(to + (lines - 1) * kLine);
}

// How many bytes lie before the first whole line.
PYCOMM_INLINE size_t before_line(const char* to) { return -reinterpret_cast<uintptr_t>(to) % kLine; }

}  // namespace

void copy(void* dst, const void* src, size_t bytes) {
  auto* to = static_cast<char*>(dst);
  const auto* from = static_cast<const char*>(src);
  if (bytes < kShort) {
    std::memcpy(to, from, bytes);
    return;
  }
  copy_step(to, from);
  for (size_t i = before_line(to); i + kStep <= bytes; i += kStep) copy_step(to + i, from + i);
  copy_step(to + bytes - kStep, from + bytes - kStep);
}

void copy_past(void* dst, const void* src, size_t bytes) {
  auto* to = static_cast<char*>(dst);
  const auto* from = static_cast<const char*>(src);
  const size_t head = before_line(to) < bytes ? before_line(to) : bytes;
  const size_t lines = (bytes - head) / kLine, end = head + lines * kLine;
  std::memcpy(to, from, head);
  copy_lines_past(to + head, from + head, lines);
  std::memcpy(to + end, from + end, bytes - end);
}

}  // namespace pycomm::kernels::PYCOMM_ISA
