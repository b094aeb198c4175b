// The arguments of a collective, taken from a vectorcall without building a tuple or a dictionary.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>

namespace pycomm::bindings {

enum class Arg : uint8_t {  // positional ones first, in order
  x,
  peer,
  out,
  src,  // send_recv's source; its `peer` is dst
  op,
  algorithm,
  deterministic,
  timeout,
  tag,
  async_op,
  stream,
  root,
  counts,
  send_counts,
  recv_counts,
  codec,
  step,
};
inline constexpr int kNumArgs = 17;

constexpr uint32_t bit(Arg arg) { return 1u << static_cast<int>(arg); }

// Borrowed references.
struct Arguments {
  PyObject* self = nullptr;  // the communicator
  uint32_t given = 0;        // a bit set of Arg: the arguments that were passed and are not None
  // Only the values of `given` are set: clearing all of them would take as long as parsing a call.
  std::array<PyObject*, kNumArgs> values;

  PyObject* operator[](Arg arg) const {  // null if not given
    return given & bit(arg) ? values[static_cast<size_t>(arg)] : nullptr;
  }
};

const char* name_of(Arg arg);  // its keyword

// `allowed` is a bit set of Arg. `peer_name` is the keyword of `peer`, "dst" or "src"; null for a method
// without one. Throws TypeError, as Python does for a wrong call.
Arguments parse_arguments(const char* method, uint32_t allowed, int positional, const char* peer_name,
                          PyObject* const* args, Py_ssize_t nargs, PyObject* keywords);

// The value of the argument `name`. Throw TypeError if it has another type, ValueError if it is out of range.
double seconds(PyObject* object, const char* name, bool or_zero = false);  // above 0, or 0 if that is allowed
int64_t integer(PyObject* object, const char* name);
std::string text(PyObject* object, const char* name);
bool truth(PyObject* object);  // false for null

}  // namespace pycomm::bindings
