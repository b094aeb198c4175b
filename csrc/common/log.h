// The library's logger: lines to stderr, each written whole, as `pycomm [rank/size] LEVEL text`. PYCOMM_DEBUG
// sets the level.
#pragma once

#include <sstream>
#include <string>

#include "common/env.h"

namespace pycomm {

bool logging(LogLevel level);
// Sets the rank that this thread's lines name. Lines before the first call say [-/-].
void set_log_rank(int rank, int size);
void write_log(LogLevel level, const std::string& text);

// Warns, once per process, of environment variables that look like misspelt settings.
void warn_of_misspelt_variables();

// Builds the text only where it will be seen: log(LogLevel::info, "window of ", bytes, " bytes").
template <class... Parts>
void log(LogLevel level, const Parts&... parts) {
  if (!logging(level)) return;
  std::ostringstream text;
  (text << ... << parts);
  write_log(level, text.str());
}

}  // namespace pycomm
