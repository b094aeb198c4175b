// Arrays on a GPU as `__cuda_array_interface__` describes them (CuPy, Numba and others).
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>

#include "bindings/elements.h"

namespace pycomm::bindings {

// The object's `__cuda_array_interface__`, or None where it has none.
pybind11::object interface_of(PyObject* object);
// What the object says itself of its device, as CuPy's arrays do: the interface does not.
std::optional<int> told_device(PyObject* object);
// What CUDA says of an address; null, that of no elements, is on device 0. Throws where there is no CUDA, and
// for an address that is on no device.
int device_at(void* address, const char* name);

struct Interface {
  Elements elements;              // strides count bytes
  std::shared_ptr<void> extents;  // keeps their shape and strides
  bool read_only;
  std::optional<int> device;  // as told
};
// Throws TypeError for what is not such an interface and for an element type that is not known, ValueError for
// a mask, swapped bytes, and what no array looks like. `name` is the argument's.
Interface read_interface(PyObject* object, const pybind11::object& interface, const char* name);

}  // namespace pycomm::bindings
