// Lines on stderr: which are written, that they are whole, and which rank they name.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "common/log.h"

using namespace pycomm;

namespace {

struct Costly {};
std::ostream& operator<<(std::ostream& to, const Costly&) {
  write_log(LogLevel::warn, "built");
  return to << "costly";
}

// What a process with this PYCOMM_DEBUG writes: the variable is read once in each.
std::string written(const char* debug, const std::function<void()>& body) {
  int ends[2];
  CHECK_EQ(pipe(ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    setenv("PYCOMM_DEBUG", debug, 1);
    body();
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char part[4096];
  for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) text.append(part, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  CHECK_EQ(status, 0);
  return text;
}

}  // namespace

TEST(a_level_includes_those_before_it) {
  const auto all = [] {
    log(LogLevel::warn, "w", 1);
    log(LogLevel::info, "i", 2.5);
    log(LogLevel::trace, "t");
  };
  CHECK_EQ(written("0", all), "");
  CHECK_EQ(written("WARN", all), "pycomm [-/-] WARN w1\n");
  const std::string version = "pycomm [-/-] INFO version " PYCOMM_VERSION "\n";
  CHECK_EQ(written("INFO", all), version + "pycomm [-/-] WARN w1\npycomm [-/-] INFO i2.5\n");
  CHECK_EQ(written("TRACE", all),
           version + "pycomm [-/-] WARN w1\npycomm [-/-] INFO i2.5\npycomm [-/-] TRACE t\n");
}

TEST(text_that_nobody_sees_is_not_built) {
  CHECK_EQ(written("WARN", [] { log(LogLevel::info, Costly{}); }), "");
}

TEST(lines_name_their_threads_rank) {
  const std::string text = written("WARN", [] {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < 4; ++rank) {
      threads.emplace_back([rank] {
        set_log_rank(rank, 4);
        for (int i = 0; i < 50; ++i) log(LogLevel::warn, "from ", rank);
      });
    }
    for (auto& thread : threads) thread.join();
    set_log_rank(9, 10);
    std::thread([] { log(LogLevel::warn, "of the last that joined"); }).join();
  });
  size_t lines = 0;
  for (size_t begin = 0; begin < text.size(); ++lines) {
    const size_t end = text.find('\n', begin);
    const std::string line = text.substr(begin, end - begin);
    begin = end + 1;
    if (lines == 200) {
      CHECK_EQ(line, "pycomm [9/10] WARN of the last that joined");
    } else {
      const std::string rank = line.substr(line.size() - 1);
      CHECK_EQ(line, "pycomm [" + rank + "/4] WARN from " + rank);
    }
  }
  CHECK_EQ(lines, 201U);
}
