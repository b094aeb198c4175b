#include "kernels/copy.h"

#include "kernels/cpu/isa.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace pycomm::kernels {

void copy_bytes(void* dst, const void* src, size_t bytes, bool past, const Isa& isa) {
  if (dst == src) return;
  (past ? isa.copy_past : isa.copy)(dst, src, bytes);
}

#if defined(__SSE2__)
void stream_fence() { _mm_sfence(); }
#else
void stream_fence() {}
#endif

}  // namespace pycomm::kernels
