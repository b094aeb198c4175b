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

// Takes the lock back.
inline void retake(PyThreadState* state) {
  try {
    PyEval_RestoreThread(state);
  } catch (...) {  // nothing but that unwinding
    park();
  }
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
    try {
      acquired_.emplace();
    } catch (...) {
      park();
    }
  }

 private:
  std::optional<pybind11::gil_scoped_acquire> acquired_;
};

}  // namespace pycomm::bindings
