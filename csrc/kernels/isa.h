// The instruction sets that the CPU's kernels are compiled for. All give the same bits.
#pragma once

#include <cstddef>
#include <string_view>

namespace pycomm::kernels {

// The kernels of one instruction set. Functions that run kernels take it, so that tests can compare the sets.
struct Isa;

// The best one that this CPU has, or the one that PYCOMM_ISA names (ValueError if it is not available).
const Isa& chosen_isa();
// "baseline", "avx2", "avx512" or "neon".
const char* isa();
// The names of the sets that this machine can run, the best one first.
const char* const* available_isas(size_t* count);
const Isa* find_isa(std::string_view name);  // null if not available here

}  // namespace pycomm::kernels
