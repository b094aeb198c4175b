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
std::vector<std::pair<void (*)(void*), void*>> left_to_drop;  // by drop_later()
std::atomic<bool> any_left{false};
bool main_thread_asked = false;  // to call drop_left()
std::thread::id ending_thread;   // written before `ending`

// The uncaught exception that ends the interpreter, in words; empty if there is none.
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
  ending_thread = std::this_thread::get_id();
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

bool may_return() {
  return !ending.load(std::memory_order_acquire) || std::this_thread::get_id() == ending_thread;
}

namespace {
int drop_on_main_thread(void* /*unused*/) {
  {
    const std::lock_guard lock(mutex);
    main_thread_asked = false;
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
  left_to_drop.emplace_back(drop, what);
  any_left = true;
  if (!main_thread_asked) main_thread_asked = Py_AddPendingCall(drop_on_main_thread, nullptr) == 0;
}

void drop_left() {
  if (!any_left) return;
  std::vector<std::pair<void (*)(void*), void*>> mine;
  {
    const std::lock_guard lock(mutex);
    mine.swap(left_to_drop);
    any_left = false;
  }
  for (const auto& [drop, what] : mine) drop(what);
}

namespace {
// A child of fork() begins with a free mutex and nothing to drop: the parent drops what is there.
const int registered = pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); },
                                      [] {
                                        left_to_drop.clear();
                                        any_left = main_thread_asked = false;
                                        mutex.unlock();
                                      });

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
  // A completion callback has dropped the last object, on the thread that close() waits for.
  drop_later(
      [](void* left) {
        const std::unique_ptr<Comm> comm(static_cast<Comm*>(left));
        close_last(std::move(*comm));
      },
      new Comm(std::move(comm)));
}

void close_at_exit() { py::module_::import("atexit").attr("register")(py::cpp_function(end)); }

}  // namespace pycomm::bindings
