// Arrays of NumPy's in this process's arena (transport/arena.h), by a handler of their memory that a thread's
// context names (NEP 49).
#pragma once

#include <pybind11/pybind11.h>

namespace pycomm::bindings {

void add_shared_arrays(pybind11::module_& module);

}  // namespace pycomm::bindings
