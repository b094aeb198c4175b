// Every environment variable that the native library reads, in one struct, read once. `0` means off.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace pycomm {

// How much is logged: a level includes those before it.
enum class LogLevel : uint8_t { off, warn, info, trace };

struct Env {
  // PYCOMM_DEBUG=0|WARN|INFO|TRACE: what is logged to stderr. INFO starts with a line that names the version.
  LogLevel debug = LogLevel::warn;
  // PYCOMM_ISA=baseline|avx2|avx512|neon: the instruction set of the kernels; empty: the best that this CPU
  // has; 0: baseline. Naming one that the CPU lacks is an error when the kernels are chosen.
  std::string isa;
  // PYCOMM_TIMEOUT=seconds: how long a group waits for a late rank; 0: forever (infinity here).
  double timeout_s = 600;
  // PYCOMM_SPIN_US=microseconds: how long a wait spins before it sleeps, if every rank has a core of its own;
  // 0: it sleeps at once.
  double spin_us = 50;
  // PYCOMM_SINGLE_COPY=0|1: whether ranks may read each other's large inputs through the kernel, if all ranks
  // of a group can; 0: this is not even tried.
  bool single_copy = true;
  // PYCOMM_PROGRESS_CORE=number: the core that a group's progress thread stays on, of those that the process may
  // use: 1 is the first, -1 the last; 0: any of them.
  int progress_core = 0;
  // PYCOMM_VERIFY=0|1: whether a plan is proved before it first runs.
  bool verify = false;
};

// Reads the variables through `get`, which returns null for one that is not set; an empty one counts as not
// set. Throws ValueError that names the variable, its value, and what is allowed.
Env read_env(const std::function<const char*(const char* name)>& get);

// Warnings about the strings "NAME=value" of `environment` (as in `environ`) whose name is not read but is
// near one that is: each suggests the name that was probably meant.
std::vector<std::string> misspelt(const char* const* environment);

// This process's settings, read at the first call. If that call throws, the next one reads them again.
const Env& env();

}  // namespace pycomm
