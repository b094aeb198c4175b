// The end of the interpreter: communicators that are still open are closed before it begins, and threads that
// are left in a call never come back to it.
#pragma once

#include <pybind11/pybind11.h>

#include "runtime/communicator.h"

namespace pycomm::bindings {

// Communicators that are to be closed at the end.
void enlist(runtime::Communicator* comm);
void strike(runtime::Communicator* comm);

// Whether this thread may take the interpreter's lock back.
bool may_return();
// drop(what) under the interpreter's lock: at once by a thread that has it. Threads of calls do not wait for
// it, since others' calls would wait with them: for these the main thread does it soon, or whoever takes the
// lock back after a call.
void drop_locked(void (*drop)(void*), void* what);
// By the main thread, soon, also where this one has the lock.
void drop_later(void (*drop)(void*), void* what);
void drop_left();  // under the lock

void close_at_exit();

}  // namespace pycomm::bindings
