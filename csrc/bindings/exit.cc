#include "bindings/exit.h"

#include <pthread.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "bindings/python.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

std::mutex mutex;
std::set<runtime::Communicator*> open;
std::atomic<bool> ending{false};
std::vector<std::pair<void (*)(void*), void*>> dropped;  // by threads without the interpreter's lock
std::atomic<bool> any_dropped{false};
bool drop_due = false;  // by the main thread
std::thread::id last;   // the thread that ends the interpreter; written before `ending`

// What the interpreter ends with, if that is an exception that nobody caught.
std::string uncaught() {
  const py::object error = py::getattr(py::module_::import("sys"), "last_value", py::none());
  if (error.is_none()) return "";
  return py::str("{}: {}").format(py::type::of(error).attr("__name__"), error).cast<std::string>();
}

void end() {
  const std::string error = uncaught();
  std::vector<std::shared_ptr<runtime::Communicator>> left;
  {
    const std::lock_guard lock(mutex);
    for (runtime::Communicator* comm : open) left.push_back(comm->shared_from_this());
  }
  for (const auto& comm : left) {
    GilPatience patience(true);
    close_quietly(*comm, patience, error);
  }
  last = std::this_thread::get_id();
  ending.store(true, std::memory_order_release);
}

}  // namespace

void enlist(runtime::Communicator* comm) {
  const std::lock_guard lock(mutex);
  open.insert(comm);
}

void strike(runtime::Communicator* comm) {
  const std::lock_guard lock(mutex);
  open.erase(comm);
}

bool may_return() { return !ending.load(std::memory_order_acquire) || std::this_thread::get_id() == last; }

namespace {
int drop_at_last(void* /*unused*/) {
  {
    const std::lock_guard lock(mutex);
    drop_due = false;
  }
  drop_left();
  return 0;
}
}  // namespace

void drop_locked(void (*drop)(void*), void* what) {
  if (!Py_IsInitialized() || !may_return()) return;
  PyGILState_Check() ? drop(what) : drop_later(drop, what);
}

void drop_later(void (*drop)(void*), void* what) {
  const std::lock_guard lock(mutex);
  dropped.emplace_back(drop, what);
  any_dropped = true;
  if (!drop_due) drop_due = Py_AddPendingCall(drop_at_last, nullptr) == 0;
}

void drop_left() {
  if (!any_dropped) return;
  std::vector<std::pair<void (*)(void*), void*>> mine;
  {
    const std::lock_guard lock(mutex);
    mine.swap(dropped);
    any_dropped = false;
  }
  for (const auto& [drop, what] : mine) drop(what);
}

namespace {
// A child of fork() begins with a free mutex and nothing to drop: what is there is the parent's.
const int registered = pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); },
                                      [] {
                                        dropped.clear();
                                        any_dropped = drop_due = false;
                                        mutex.unlock();
                                      });
}  // namespace

namespace {
using Comm = std::shared_ptr<runtime::Communicator>;

void close_last(Comm comm) {
  strike(comm.get());
  GilPatience patience(true);
  close_quietly(*comm, patience);
  comm.reset();
}
}  // namespace

Handle::~Handle() {
  if (!comm) return;
  if (!comm->on_progress_thread()) {
    close_last(std::move(comm));
    return;
  }
  // Dropped by a completion callback, on the thread that close() waits for.
  drop_later(
      [](void* left) {
        const std::unique_ptr<Comm> comm(static_cast<Comm*>(left));
        close_last(std::move(*comm));
      },
      new Comm(std::move(comm)));
}

void close_at_exit() { py::module_::import("atexit").attr("register")(py::cpp_function(end)); }

}  // namespace pycomm::bindings
