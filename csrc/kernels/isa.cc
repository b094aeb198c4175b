#include "kernels/isa.h"

#include <string>

#include "common/env.h"
#include "common/error.h"
#include "kernels/cpu/isa.h"

namespace pycomm::kernels {
namespace {

struct IsaList {
  const char* names[3];
  Isa isas[3];
  size_t count = 0;

  void add(const Isa& isa, bool runs_here) {
    if (!runs_here) return;
    names[count] = isa.name;
    isas[count++] = isa;
  }
};

#define PYCOMM_KERNELS(set)                                                                                 \
  Isa {                                                                                                     \
    #set, set::find, set::copy, set::copy_past, &set::codec_kernels, &set::pack_kernels, &set::topk_kernels \
  }

// The sets that this machine can run, the best one first.
const IsaList& available() {
  static const IsaList list = [] {
    IsaList found;
#if defined(__x86_64__)
    found.add(PYCOMM_KERNELS(avx512),
              __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
    found.add(PYCOMM_KERNELS(avx2),
              __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));  // these imply F16C
    found.add(PYCOMM_KERNELS(baseline), true);
#elif defined(__aarch64__)
    found.add(PYCOMM_KERNELS(neon), true);
#else
    found.add(PYCOMM_KERNELS(baseline), true);
#endif
    return found;
  }();
  return list;
}

}  // namespace

const Isa* find_isa(std::string_view name) {
  const IsaList& list = available();
  for (size_t i = 0; i < list.count; ++i) {
    if (name == list.names[i]) return &list.isas[i];
  }
  return nullptr;
}

const Isa& chosen_isa() {
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

const char* isa() { return chosen_isa().name; }

const char* const* available_isas(size_t* count) {
  *count = available().count;
  return available().names;
}

}  // namespace pycomm::kernels
