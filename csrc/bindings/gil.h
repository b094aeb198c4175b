// The interpreter's lock. Before Python 3.14, an interpreter that is ending unwinds the stack of a thread
// that asks for the lock. In a destructor, as in pybind11's guards, that ends in std::terminate. Here such a
// thread sleeps for ever instead, as it does from 3.14 on.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

#include <optional>

namespace pycomm::bindings {

[[noreturn]] inline void park() {
  for (;;) pause();
}

// Returns call(), which calls C code that may ask for the lock: the interpreter's, or any that runs Python.
template <class Call>
auto outlive_interpreter(const Call& call) {
  try {
    return call();
  } catch (...) {  // that unwinding alone: C throws nothing
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

// Takes the lock; the thread may have it already.
class Locked {
 public:
  Locked() {
    outlive_interpreter([this] { acquired_.emplace(); });
  }

 private:
  std::optional<pybind11::gil_scoped_acquire> acquired_;
};

}  // namespace pycomm::bindings
