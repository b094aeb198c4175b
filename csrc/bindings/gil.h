// The interpreter's lock. Until Python 3.14 the interpreter ends a thread that asks for the lock while it
// ends itself, by unwinding the thread's stack: pybind11's guards have destructors, which that turns into
// std::terminate. Here such a thread sleeps for ever instead, as it does from 3.14 on.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

#include <optional>

namespace pycomm::bindings {

[[noreturn]] inline void park() {
  for (;;) pause();
}

// What call() returns, where it is C that asks for the lock: the interpreter's own, or whatever runs Python.
template <class Call>
auto outlive_interpreter(const Call& call) {
  try {
    return call();
  } catch (...) {  // nothing but that unwinding: C throws nothing
    park();
  }
}

// Takes the lock back.
inline void retake(PyThreadState* state) {
  outlive_interpreter([&] { PyEval_RestoreThread(state); });
}

class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;
  ~Unlocked() { retake(state_); }

 private:
  PyThreadState* state_;
};

// For a thread that may have the lock already.
class Locked {
 public:
  Locked() {
    outlive_interpreter([this] { acquired_.emplace(); });
  }

 private:
  std::optional<pybind11::gil_scoped_acquire> acquired_;
};

}  // namespace pycomm::bindings
