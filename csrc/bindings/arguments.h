// The arguments of a collective, taken from a vectorcall without building a tuple or a dictionary.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>

namespace pycomm::bindings {

enum class Arg : uint8_t {  // those that may come without a keyword first, in their order
  x,
  peer,
  out,
  src,  // of send_recv, whose peer is dst
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
  uint32_t given = 0;        // a bit set of Arg: those that are given, and not None
  // Only these are set: to clear them all would take as long as to parse a call.
  std::array<PyObject*, kNumArgs> values;

  PyObject* operator[](Arg arg) const {  // null: not given
    return given & bit(arg) ? values[static_cast<size_t>(arg)] : nullptr;
  }
};

const char* name_of(Arg arg);  // as a keyword

// `allowed` is a bit set of Arg; `peer_name` is what this method calls the peer ("dst", "src"), positional
// after x. Throws TypeError as Python does for a wrong call.
Arguments parse_arguments(const char* method, uint32_t allowed, int positional, const char* peer_name,
                          PyObject* const* args, Py_ssize_t nargs, PyObject* keywords);

// An argument's value; `name` is for the message of the TypeError where it is something else.
double seconds(PyObject* object, const char* name, bool or_none = false);  // above 0, or none at all
int64_t integer(PyObject* object, const char* name);
std::string text(PyObject* object, const char* name);
bool truth(PyObject* object);  // of null: false

}  // namespace pycomm::bindings
