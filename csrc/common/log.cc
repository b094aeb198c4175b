#include "common/log.h"

#include <unistd.h>

#include <cerrno>
#include <mutex>

#ifndef PYCOMM_VERSION
#define PYCOMM_VERSION "unknown"  // the build defines it
#endif

namespace pycomm {
namespace {

// Rank threads share a process, so each thread has its own rank; threads without one log as the rank that
// joined last.
struct LogRank {
  int rank = -1, size = -1;
};
thread_local LogRank this_thread;
std::mutex mutex;
LogRank last_joined;

void write_line(const std::string& text) {
  const LogRank log_rank = this_thread.rank >= 0 ? this_thread : last_joined;
  const auto word = [](int n) { return n < 0 ? std::string("-") : std::to_string(n); };
  const std::string line = "pycomm [" + word(log_rank.rank) + "/" + word(log_rank.size) + "] " + text + "\n";
  while (write(STDERR_FILENO, line.data(), line.size()) < 0 && errno == EINTR) continue;
}

}  // namespace

bool logging(LogLevel level) { return level <= env().debug; }

void set_log_rank(int rank, int size) {
  const std::lock_guard lock(mutex);
  this_thread = last_joined = {rank, size};
}

void write_log(LogLevel level, const std::string& text) {
  static constexpr const char* kNames[] = {"OFF", "WARN", "INFO", "TRACE"};
  static bool first = true;
  const std::lock_guard lock(mutex);
  if (first && logging(LogLevel::info)) write_line("INFO version " PYCOMM_VERSION);
  first = false;
  write_line(std::string(kNames[static_cast<int>(level)]) + " " + text);
}

void warn_of_misspelt_variables() {
  static std::once_flag warned;
  std::call_once(warned, [] {
    for (const std::string& text : misspelt(environ)) log(LogLevel::warn, text);
  });
}

}  // namespace pycomm
