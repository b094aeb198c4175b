// How C++ meets the interpreter: the lock, Ctrl-C, exceptions, and the handle behind pycomm.Communicator.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>  // here, so that every file has the same casters

#include <memory>

#include "bindings/exit.h"
#include "bindings/gil.h"
#include "bindings/memo.h"
#include "runtime/communicator.h"

namespace pycomm::bindings {

// Keeps the interpreter's lock during a short call. Gives it up before the first sleep, and from then on
// takes it only to look for Ctrl-C, until the call has ended.
class GilPatience : public runtime::Patience {
 public:
  // eager: gives it up at once. Rank threads share the lock, and long calls should not keep it.
  explicit GilPatience(bool eager) {
    if (eager) on_block();
  }
  ~GilPatience() override { hold(); }
  void on_block() override {
    if (!released_) released_ = PyEval_SaveThread();
  }
  void on_tick() override {
    hold();
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
    on_block();
  }
  void hold() {
    if (!released_) return;
    if (!may_return()) park();
    retake(released_);
    released_ = nullptr;
    drop_left();
  }

 private:
  PyThreadState* released_ = nullptr;
};

// close() or, with an error, leave(error), for callers that cannot throw: a CommError is logged, and an
// exception of Python's goes to sys.unraisablehook.
void close_quietly(runtime::Communicator& comm, runtime::Patience& patience, const std::string& error = "");

// Closes the communicator when the last Python object that refers to it is dropped.
struct Handle {
  std::shared_ptr<runtime::Communicator> comm;
  Memo memo;
  explicit Handle(std::shared_ptr<runtime::Communicator> c) : comm(std::move(c)) { enlist(comm.get()); }
  ~Handle();
};

struct PyCommunicator {
  std::shared_ptr<Handle> handle;
  runtime::Communicator& operator*() const { return *handle->comm; }
  runtime::Communicator* operator->() const { return handle->comm.get(); }
};

// Sets the Python exception for the C++ one in flight; call it in a catch block.
void set_python_error();
bool is_mismatch();  // whether the Python exception that is set is a MismatchError
void register_errors(pybind11::module_& module);
// Keeps the object alive as long as the returned pointer, and drops it under the lock.
std::shared_ptr<void> keep_alive(pybind11::object object);

void add_collectives(pybind11::module_& module, pybind11::class_<PyCommunicator>& communicator);
void add_schedules(pybind11::module_& module);
void add_arrays(pybind11::module_& module);
void add_bucket(pybind11::module_& module);

}  // namespace pycomm::bindings
