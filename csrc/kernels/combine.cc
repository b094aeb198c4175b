#include "kernels/combine.h"

#include <cstring>
#include <string>
#include <string_view>

#include "common/env.h"
#include "common/error.h"
#include "kernels/cpu/isa.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace pycomm::kernels {
namespace {

struct Isa {
  const char* name;
  CombineFn (*find)(DType, Op);
};

struct IsaList {
  const char* names[3];
  Isa isas[3];
  size_t count = 0;

  void add(const char* name, CombineFn (*find)(DType, Op), bool runs_here) {
    if (!runs_here) return;
    names[count] = name;
    isas[count++] = {name, find};
  }
};

// Those that this machine can run, the best one first.
const IsaList& available() {
  static const IsaList list = [] {
    IsaList found;
#if defined(__x86_64__)
    found.add("avx512", avx512::find,
              __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
    found.add("avx2", avx2::find,
              __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));  // both came after F16C
    found.add("baseline", baseline::find, true);
#elif defined(__aarch64__)
    found.add("neon", neon::find, true);
#else
    found.add("baseline", baseline::find, true);
#endif
    return found;
  }();
  return list;
}

const Isa* find_isa(std::string_view name) {
  const IsaList& list = available();
  for (size_t i = 0; i < list.count; ++i) {
    if (name == list.names[i]) return &list.isas[i];
  }
  return nullptr;
}

const Isa& chosen() {
  static const Isa& isa = []() -> const Isa& {
    const std::string& wanted = env().isa;
    if (wanted.empty()) return available().isas[0];
    if (wanted == "baseline") return available().isas[available().count - 1];
    if (const Isa* named = find_isa(wanted)) return *named;
    std::string names;
    for (size_t i = 0; i < available().count; ++i) names += std::string(i ? ", " : "") + available().names[i];
    throw ValueError("PYCOMM_ISA=" + wanted + " is not available on this machine; use one of " + names +
                     ", or unset it");
  }();
  return isa;
}

}  // namespace

CombineFn find_combine(DType dtype, Op op) { return chosen().find(dtype, op); }

const char* isa() { return chosen().name; }

const char* const* available_isas(size_t* count) {
  *count = available().count;
  return available().names;
}

CombineFn find_combine_for(const char* isa, DType dtype, Op op) {
  const Isa* named = find_isa(isa);
  return named == nullptr ? nullptr : named->find(dtype, op);
}

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
