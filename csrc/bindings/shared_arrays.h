// Puts NumPy's arrays into this process's arena (transport/arena.h): a thread's context names the handler
// that allocates their memory (NEP 49).
#pragma once

#include <pybind11/pybind11.h>

namespace pycomm::bindings {

void add_shared_arrays(pybind11::module_& module);

}  // namespace pycomm::bindings
