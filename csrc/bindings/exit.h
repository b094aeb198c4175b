// The end of the interpreter: communicators that are still open are closed before it begins, and threads that
// are in a call by then never return to Python.
#pragma once

#include <pybind11/pybind11.h>

#include "runtime/communicator.h"

namespace pycomm::bindings {

// Adds a communicator to those that are closed at the end, or removes it.
void enlist(runtime::Communicator* comm);
void strike(runtime::Communicator* comm);

// Whether this thread may take the interpreter's lock back.
bool may_return();
// Calls drop(what) under the interpreter's lock: at once if this thread has it, else as drop_later() does.
// A thread that runs calls must not wait for the lock, since other ranks' calls would wait with it. Once
// the interpreter ends, nothing is dropped.
void drop_locked(void (*drop)(void*), void* what);
// Leaves drop(what) to the main thread or to the next thread that takes the lock back after a call, even if
// this thread has the lock.
void drop_later(void (*drop)(void*), void* what);
void drop_left();  // calls what drop_later() has left; needs the lock

void close_at_exit();

}  // namespace pycomm::bindings
