// The instruction sets: which are available, and which one is chosen.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <string>

#include "check.h"
#include "common/error.h"
#include "isas.h"
#include "kernels/isa.h"

using namespace pycomm;

namespace {

// In a process of its own, which reads PYCOMM_ISA for the first time.
bool holds(const char* isa, const std::function<bool()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    setenv("PYCOMM_ISA", isa, 1);
    _exit(body() ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status == 0;
}

}  // namespace

TEST(the_baseline_is_everywhere_and_the_worst) {
  const std::vector<std::string> names = isa_names();
  CHECK(!names.empty());
  CHECK_EQ(names.back(), "baseline");
  for (const std::string& name : names) CHECK(kernels::find_isa(name) != nullptr);
  CHECK(kernels::find_isa("avx3") == nullptr);
  CHECK(kernels::find_isa("") == nullptr);
}

TEST(the_best_is_chosen_unless_one_is_named) {
  const std::vector<std::string> names = isa_names();
  CHECK(holds("", [&] { return kernels::isa() == names.front(); }));
  for (const std::string& name : names) {
    CHECK(holds(name.c_str(),
                [&] { return kernels::isa() == name && &kernels::chosen_isa() == kernels::find_isa(name); }));
  }
  CHECK(holds("avx3", [] {
    try {
      kernels::chosen_isa();
      return false;
    } catch (const ValueError& error) {
      return std::string(error.what()).find("avx3") != std::string::npos;
    }
  }));
}
