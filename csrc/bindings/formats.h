// Element types as the buffer protocol names them: with the struct module's formats, and NumPy's for complex
// numbers.
#pragma once

#include <pybind11/pybind11.h>

#include "common/dtype.h"

namespace pycomm::bindings {

// The type of elements of `item` bytes; null means bytes. Throws TypeError for an unknown type, ValueError
// for byte-swapped elements. `name` is the argument's name.
DType dtype_of_format(const char* format, Py_ssize_t item, const char* name);

}  // namespace pycomm::bindings
