// Element types as the buffer protocol names them: with the struct module's formats, and NumPy's for complex
// numbers.
#pragma once

#include <pybind11/pybind11.h>

#include "common/dtype.h"

namespace pycomm::bindings {

// Of elements of `item` bytes; no format (null) means bytes. Throws TypeError for a type that is not known,
// ValueError for elements that are byte-swapped. `name` is the argument's.
DType dtype_of_format(const char* format, Py_ssize_t item, const char* name);

}  // namespace pycomm::bindings
