#include "kernels/combine.h"

#include <cstring>

#include "kernels/cpu/isa.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace pycomm::kernels {

CombineFn find_combine(DType dtype, Op op, const Isa& isa) { return isa.find_combine(dtype, op); }

void copy_bytes(void* dst, const void* src, size_t bytes, bool stream) {
  if (dst == src || bytes == 0) return;
  if (!stream) {
    std::memcpy(dst, src, bytes);
    return;
  }
  stream_copy(dst, src, bytes);
  stream_fence();
}

#if defined(__SSE2__)

void stream_copy(void* dst, const void* src, size_t bytes) {
  constexpr size_t kLine = 64;
  auto* to = static_cast<unsigned char*>(dst);
  const auto* from = static_cast<const unsigned char*>(src);
  size_t head = (kLine - reinterpret_cast<uintptr_t>(to) % kLine) % kLine;
  if (head > bytes) head = bytes;
  std::memcpy(to, from, head);
  size_t i = head;
  for (; i + kLine <= bytes; i += kLine) {
    const auto* line = reinterpret_cast<const __m128i*>(from + i);
    auto* out = reinterpret_cast<__m128i*>(to + i);
    const __m128i a = _mm_loadu_si128(line), b = _mm_loadu_si128(line + 1);
    const __m128i c = _mm_loadu_si128(line + 2), d = _mm_loadu_si128(line + 3);
    _mm_stream_si128(out, a);
    _mm_stream_si128(out + 1, b);
    _mm_stream_si128(out + 2, c);
    _mm_stream_si128(out + 3, d);
  }
  std::memcpy(to + i, from + i, bytes - i);
}

void stream_fence() { _mm_sfence(); }

#else

void stream_copy(void* dst, const void* src, size_t bytes) { std::memcpy(dst, src, bytes); }

void stream_fence() {}

#endif

}  // namespace pycomm::kernels
