// What a method returns for a call that need not have run yet: Work (an asynchronous call) or PersistentOp
// (bound once, run by calling it).
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/invocation.h"
#include "bindings/python.h"

namespace pycomm::bindings {

// Both keep the calls' buffers and their group alive.
pybind11::object start(PyCommunicator& comm, Invocation& call, runtime::Bound bound);  // a Work
pybind11::object make_persistent(PyCommunicator& comm, std::vector<Invocation>& calls,
                                 std::vector<runtime::Bound> bounds);

void add_work(pybind11::module_& module);

}  // namespace pycomm::bindings
