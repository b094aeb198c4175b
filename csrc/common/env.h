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
  // has; 0 is baseline. One that the CPU lacks is an error where the kernels are chosen.
  std::string isa;
  // PYCOMM_TIMEOUT=seconds: how long a group waits for a rank that is late; 0: without end (infinity here).
  double timeout_s = 600;
  // PYCOMM_SPIN_US=microseconds: how long a wait spins before it sleeps, where every rank has a core of its
  // own; 0: it sleeps at once.
  double spin_us = 50;
  // PYCOMM_SINGLE_COPY=0|1: whether large inputs may be read through the kernel by the ranks that want them,
  // if all ranks of a group can; 0: it is not even tried.
  bool single_copy = true;
  // PYCOMM_VERIFY=0|1: whether a plan is proved before it first runs.
  bool verify = false;
};

// Reads the variables by `get`, which returns null for one that is not set; an empty one counts as not set.
// Throws ValueError that names variable, value, and what is allowed.
Env read_env(const std::function<const char*(const char* name)>& get);

// Those of "NAME=value" strings, as in `environ`, that nobody reads and that are near one that is read: in
// words, with the name that may be meant.
std::vector<std::string> misspelt(const char* const* environment);

// This process's, read at the first call; one that throws is read again at the next.
const Env& env();

}  // namespace pycomm
