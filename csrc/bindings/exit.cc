#include "bindings/exit.h"

#include <unistd.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "bindings/python.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

std::mutex mutex;
std::set<runtime::Communicator*> open;
std::atomic<bool> ending{false};
std::thread::id last;  // the thread that ends the interpreter; written before `ending`

void end() {
  std::vector<std::shared_ptr<runtime::Communicator>> left;
  {
    const std::lock_guard lock(mutex);
    for (runtime::Communicator* comm : open) left.push_back(comm->shared_from_this());
  }
  for (const auto& comm : left) {
    GilPatience patience(true);
    close_quietly(*comm, patience);
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

bool may_drop() { return Py_IsInitialized() && may_return(); }

void park() {
  for (;;) pause();
}

void close_at_exit() { py::module_::import("atexit").attr("register")(py::cpp_function(end)); }

}  // namespace pycomm::bindings
