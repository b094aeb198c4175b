#include <new>

#include "bindings/python.h"
#include "common/error.h"
#include "common/log.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {
PyObject *comm_error, *peer_lost_error, *mismatch_error, *comm_timeout_error, *aborted_error;

PyObject* make(py::module_& module, const char* name, PyObject* bases, const char* doc) {
  PyObject* type = PyErr_NewExceptionWithDoc((std::string("pycomm.") + name).c_str(), doc, bases, nullptr);
  if (!type) throw py::error_already_set();
  module.attr(name) = py::handle(type);
  return type;
}
}  // namespace

void register_errors(py::module_& module) {
  comm_error =
      make(module, "CommError", PyExc_RuntimeError,
           "The group cannot go on: the buffers of the failed call are undefined, and later calls raise "
           "AbortedError.");
  peer_lost_error =
      make(module, "PeerLostError", comm_error,
           "A peer's process ended, or its communicator was closed, before it had done its part.");
  mismatch_error =
      make(module, "MismatchError", comm_error, "Ranks made different calls; the message names both.");
  const py::tuple timeout_bases = py::make_tuple(py::handle(comm_error), py::handle(PyExc_TimeoutError));
  comm_timeout_error = make(module, "CommTimeoutError", timeout_bases.ptr(),
                            "A peer was stopped or late at the deadline; the message names it.");
  aborted_error =
      make(module, "AbortedError", comm_error, "The group had failed or was closed before this call.");
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const py::builtin_exception&) {
      throw;
    } catch (const py::error_already_set&) {
      throw;
    } catch (const std::runtime_error&) {
      set_python_error();
    }
  });
}

void set_python_error() {
  try {
    throw;
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (const TypeError& e) {
    PyErr_SetString(PyExc_TypeError, e.what());
  } catch (const ValueError& e) {
    PyErr_SetString(PyExc_ValueError, e.what());
  } catch (const OutOfMemoryError& e) {
    PyErr_SetString(PyExc_MemoryError, e.what());
  } catch (const PeerLostError& e) {
    PyErr_SetString(peer_lost_error, e.what());
  } catch (const MismatchError& e) {
    PyErr_SetString(mismatch_error, e.what());
  } catch (const CommTimeoutError& e) {
    PyErr_SetString(comm_timeout_error, e.what());
  } catch (const AbortedError& e) {
    PyErr_SetString(aborted_error, e.what());
  } catch (const CommError& e) {
    PyErr_SetString(comm_error, e.what());
  } catch (const py::builtin_exception& e) {
    e.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
}

bool is_mismatch() { return PyErr_ExceptionMatches(mismatch_error); }

std::shared_ptr<void> keep_alive(py::object object) {
  return std::shared_ptr<void>(object.release().ptr(), [](void* p) {
    drop_locked([](void* object) { Py_XDECREF(static_cast<PyObject*>(object)); }, p);
  });
}

void close_quietly(runtime::Communicator& comm, runtime::Patience& patience, const std::string& error) {
  try {
    error.empty() ? comm.close(patience) : comm.leave(error, patience);
  } catch (const CommError& error) {
    log(LogLevel::warn, error.what());
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("pycomm.Communicator.close");
  }
}

}  // namespace pycomm::bindings
