// The end of the interpreter: communicators that are still open are closed before it begins, and threads that
// are left in a call never come back to it. (A thread that asks for the interpreter's lock then is ended by
// it, which C++ frames with destructors do not survive.)
#pragma once

#include <pybind11/pybind11.h>

#include "runtime/communicator.h"

namespace pycomm::bindings {

// Communicators that are to be closed at the end.
void enlist(runtime::Communicator* comm);
void strike(runtime::Communicator* comm);

// Whether this thread may take the interpreter's lock: to have it back; to drop an object.
bool may_return();
bool may_drop();
[[noreturn]] void park();

void close_at_exit();

}  // namespace pycomm::bindings
