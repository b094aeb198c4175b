#include "common/env.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <string_view>
#include <utility>
#include <vector>

#include "common/error.h"
#include "common/words.h"

namespace pycomm {
namespace {

[[noreturn]] void reject(const char* variable, std::string_view value, const std::string& allowed) {
  throw ValueError(std::string(variable) + "='" + std::string(value) + "' is not understood: allowed are " +
                   allowed);
}

template <class T>
T parse_word(const char* variable, std::string_view value,
             std::initializer_list<std::pair<const char*, T>> words) {
  std::string allowed;
  for (const auto& [word, meaning] : words) {
    if (value == word) return meaning;
    allowed += (allowed.empty() ? "" : ", ") + std::string(word);
  }
  reject(variable, value, allowed);
}

double parse_number(const char* variable, std::string_view value, const char* allowed) {
  double number = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
  if (error != std::errc() || end != value.data() + value.size() || !std::isfinite(number) || number < 0)
    reject(variable, value, allowed);
  return number;
}

constexpr std::string_view kPrefix = "PYCOMM_";
// Variables that the launchers and the benchmarks set and read.
constexpr std::string_view kOthers[] = {"RANK", "SIZE", "JOB", "TAKEN", "BENCH_MPI_PYTHON"};

}  // namespace

Env read_env(const std::function<const char*(const char* name)>& get) {
  Env env;
  const auto read = [&](const char* variable, auto parse) {
    const char* value = get(variable);
    if (value && *value) parse(variable, std::string_view(value));
  };
  read("PYCOMM_DEBUG", [&](const char* variable, std::string_view value) {
    env.debug = parse_word<LogLevel>(variable, value,
                                     {{"0", LogLevel::off},
                                      {"WARN", LogLevel::warn},
                                      {"INFO", LogLevel::info},
                                      {"TRACE", LogLevel::trace}});
  });
  read("PYCOMM_ISA", [&](const char* variable, std::string_view value) {
    env.isa = parse_word<const char*>(variable, value,
                                      {{"0", "baseline"},
                                       {"baseline", "baseline"},
                                       {"avx2", "avx2"},
                                       {"avx512", "avx512"},
                                       {"neon", "neon"}});
  });
  read("PYCOMM_TIMEOUT", [&](const char* variable, std::string_view value) {
    const double seconds = parse_number(variable, value, "seconds, 0 for no timeout");
    env.timeout_s = seconds == 0 ? std::numeric_limits<double>::infinity() : seconds;
  });
  read("PYCOMM_SPIN_US", [&](const char* variable, std::string_view value) {
    env.spin_us = parse_number(variable, value, "microseconds, 0 to sleep at once");
  });
  read("PYCOMM_SINGLE_COPY", [&](const char* variable, std::string_view value) {
    env.single_copy = parse_word<bool>(variable, value, {{"0", false}, {"1", true}});
  });
  read("PYCOMM_PROGRESS_CORE", [&](const char* variable, std::string_view value) {
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), env.progress_core);
    if (error != std::errc() || end != value.data() + value.size())
      reject(variable, value, "1 for the first core, 2 for the second, -1 for the last, 0 for any");
  });
  read("PYCOMM_VERIFY", [&](const char* variable, std::string_view value) {
    env.verify = parse_word<bool>(variable, value, {{"0", false}, {"1", true}});
  });
  return env;
}

std::vector<std::string> misspelt(const char* const* environment) {
  std::vector<std::string_view> known(std::begin(kOthers), std::end(kOthers));
  read_env([&](const char* name) -> const char* {
    known.push_back(std::string_view(name).substr(kPrefix.size()));
    return nullptr;
  });
  std::vector<std::string> found;
  for (; environment && *environment; ++environment) {
    const std::string_view entry = *environment;
    const std::string_view variable = entry.substr(0, entry.find('='));
    if (!lower(variable).starts_with(lower(kPrefix))) continue;
    const std::string_view word = variable.substr(kPrefix.size());
    if (variable.starts_with(kPrefix) && std::ranges::find(known, word) != known.end()) continue;
    const std::string_view meant = nearest(word, known);
    if (meant.empty()) continue;
    found.push_back("the environment has " + std::string(variable) + ", which is not read: did you mean " +
                    std::string(kPrefix) + std::string(meant) + "? (docs/environment.md)");
  }
  return found;
}

const Env& env() {
  static const Env env = read_env([](const char* name) -> const char* { return std::getenv(name); });
  return env;
}

}  // namespace pycomm
