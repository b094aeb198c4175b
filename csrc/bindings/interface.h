// Arrays on a GPU as `__cuda_array_interface__` describes them (CuPy, Numba and others).
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>

#include "bindings/elements.h"

namespace pycomm::bindings {

// The object's `__cuda_array_interface__`, or None if it has none.
pybind11::object interface_of(PyObject* object);
// The number of the device that the object itself names, as CuPy's arrays do: the interface does not tell.
std::optional<int> told_device(PyObject* object);
// The device of an address, as CUDA tells it. Null, the address of no elements, counts as device 0. Throws if
// there is no CUDA or the address is on no device.
int device_at(void* address, const char* name);

struct Interface {
  Elements elements;              // strides count bytes
  std::shared_ptr<void> extents;  // keeps their shape and strides
  bool read_only;
  std::optional<int> device;  // told_device()
};
// Throws TypeError for an object that is no such interface and for an unknown element type, ValueError for a
// mask, swapped bytes, and a description that no array has. `name` is the argument's name.
Interface read_interface(PyObject* object, const pybind11::object& interface, const char* name);

}  // namespace pycomm::bindings
