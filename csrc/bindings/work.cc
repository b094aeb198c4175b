#include "bindings/work.h"

#include <array>
#include <cmath>
#include <memory>
#include <utility>

#include "bindings/coding.h"
#include "bindings/exit.h"
#include "bindings/gil.h"
#include "common/error.h"

namespace py = pybind11;

namespace pycomm::bindings {

using runtime::Bound;
using runtime::Work;

namespace {

// A call in words, for repr().
struct Summary {
  schedule::Collective collective;
  DType dtype;
  int64_t count;

  explicit Summary(const runtime::CallRecord& record)
      : collective(record.collective), dtype(record.dtype), count(record.count) {}
  std::string text(const char* type, const std::string& state) const {
    std::string words = std::string("<pycomm.") + type + ": " + name(collective);
    if (schedule::traits(collective).moves()) words += " of " + std::to_string(count) + " " + name(dtype);
    return words + state + ">";
  }
};

class PyWork {
 public:
  PyWork(std::shared_ptr<Work> work, const Summary& summary, std::shared_ptr<Handle> handle,
         py::object result)
      : work_(std::move(work)), summary_(summary), handle_(std::move(handle)), result_(std::move(result)) {}
  py::object wait(const py::object& timeout) {
    const double timeout_s = timeout.is_none() ? INFINITY : seconds(timeout.ptr(), "timeout", true);
    {
      GilPatience patience(true);
      work_->wait(timeout_s, patience);
    }
    return result_;
  }
  bool is_completed() const { return work_->is_completed(); }
  std::string repr() const {
    const py::object error = exception();
    if (!error.is_none()) {
      return summary_.text("Work", ", failed: " + py::type::of(error).attr("__name__").cast<std::string>());
    }
    return summary_.text("Work", is_completed() ? ", done" : ", pending");
  }
  static void add_done_callback(const py::object& self, const py::object& fn) {
    if (!PyCallable_Check(fn.ptr())) {
      throw TypeError("`fn` is a " + std::string(Py_TYPE(fn.ptr())->tp_name) +
                      ": pass a function of the work");
    }
    self.cast<PyWork&>().work_->on_completion(
        [called = fn.ptr(), work = self.ptr(), held = keep_alive(py::make_tuple(self, fn))] {
          if (!Py_IsInitialized() || !may_return()) return;
          const Locked locked;
          PyObject* returned = PyObject_CallOneArg(called, work);
          if (!returned) PyErr_WriteUnraisable(called);
          Py_XDECREF(returned);
        });
  }
  py::object exception() const {
    const std::exception_ptr error = work_->exception();
    if (!error) return py::none();
    try {
      std::rethrow_exception(error);
    } catch (...) {
      set_python_error();
      py::error_already_set raised;
      return raised.value();
    }
  }

 private:
  std::shared_ptr<Work> work_;
  Summary summary_;
  std::shared_ptr<Handle> handle_;
  py::object result_;
};

// A call bound once; calling it runs it.
struct PersistentOp {
  PyObject_HEAD std::vector<Bound>* bounds;
  std::shared_ptr<Handle>* handle;
  PyObject *x, *result;
  Array *in, *out;    // as they were bound
  Feeding* feeding;   // null without error feedback
  bool eager, coded;  // coded: a run changes what is bound
  bool under_way;     // a coded run is
};

// Throws if the object has lost the memory that the call was bound to.
void require_bound(PyObject* object, const Array& bound, const char* name) {
  Array now;
  if (!peek_array(object, now)) now = get_array(object, name);
  require_unmoved(bound, now, name);
  if (bound.writable && !now.writable) require_writable(now, name);
}

[[gnu::noinline]] void run_coded(PersistentOp& op) {
  if (op.under_way) {
    throw CommError(
        "this call is under way on another thread: with a codec, one thread at a time may make it");
  }
  op.under_way = true;
  struct Reset {
    bool& flag;
    ~Reset() { flag = false; }
  } reset{op.under_way};
  if (op.feeding) op.feeding->renew(*op.bounds->front().coding);
  if (op.feeding) op.feeding->begun();
  for (Bound& bound : *op.bounds) {
    GilPatience patience(op.eager);
    (*op.handle)->comm->run(bound, patience);
  }
}

PyObject* call_persistent(PyObject* self, PyObject* args, PyObject* keywords) {
  auto* op = reinterpret_cast<PersistentOp*>(self);
  if (PyTuple_GET_SIZE(args) != 0 || (keywords && PyDict_GET_SIZE(keywords) != 0)) {
    PyErr_SetString(PyExc_TypeError,
                    "a persistent call takes no arguments: they were bound when it was made");
    return nullptr;
  }
  try {
    require_bound(op->x, *op->in, "x");
    if (op->result != op->x) require_bound(op->result, *op->out, "out");
    if (op->coded) [[unlikely]] {
      run_coded(*op);
    } else {
      GilPatience patience(op->eager);
      (*op->handle)->comm->run(op->bounds->front(), patience);
    }
  } catch (...) {
    set_python_error();
    return nullptr;
  }
  Py_INCREF(op->result);
  return op->result;
}

PyObject* repr_persistent(PyObject* self) {
  const Summary summary(reinterpret_cast<PersistentOp*>(self)->bounds->front().record);
  return PyUnicode_FromString(summary.text("PersistentOp", "").c_str());
}

void free_persistent(PyObject* self) {
  auto* op = reinterpret_cast<PersistentOp*>(self);
  delete op->bounds;
  delete op->feeding;
  delete op->handle;
  delete op->in;
  delete op->out;
  Py_XDECREF(op->x);
  Py_XDECREF(op->result);
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyTypeObject* persistent_type() {
  static PyType_Slot slots[] = {
      {Py_tp_call, reinterpret_cast<void*>(call_persistent)},
      {Py_tp_repr, reinterpret_cast<void*>(repr_persistent)},
      {Py_tp_dealloc, reinterpret_cast<void*>(free_persistent)},
      {Py_tp_doc,
       const_cast<char*>(
           "A call that was bound once: call it to run it again on the same buffers. Raises ValueError if "
           "they have other memory by then.")},
      {0, nullptr}};
  static PyType_Spec spec = {"pycomm._native.PersistentOp", sizeof(PersistentOp), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  static PyTypeObject* type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
  return type;
}

// All that must live as long as the call may run.
std::shared_ptr<void> exports_of(const Invocation& call, std::shared_ptr<void> objects) {
  const bool same = call.result.is(call.x);
  return std::make_shared<std::array<std::shared_ptr<void>, 6>>(
      std::array{call.in.exported, call.out.exported, hold_memory(call.x.ptr()),
                 same ? nullptr : hold_memory(call.result.ptr()), call.storage, std::move(objects)});
}

}  // namespace

py::object make_persistent(PyCommunicator& comm, std::vector<Invocation>& calls, std::vector<Bound> bounds) {
  Invocation& call = calls.front();
  bounds.front().keeps_alive = exports_of(call, nullptr);
  auto* op = reinterpret_cast<PersistentOp*>(persistent_type()->tp_alloc(persistent_type(), 0));
  if (!op) throw py::error_already_set();
  op->coded = bounds.front().coding != nullptr;
  op->feeding = call.feeding ? new Feeding(*call.feeding) : nullptr;
  op->bounds = new std::vector<Bound>(std::move(bounds));
  op->handle = new std::shared_ptr<Handle>(comm.handle);
  op->eager = call.eager(comm);
  op->in = new Array(call.in);
  op->out = new Array(call.out);
  op->x = call.x.release().ptr();
  op->result = call.result.release().ptr();
  return py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(op));
}

py::object start(PyCommunicator& comm, Invocation& call, Bound bound) {
  bound.keeps_alive = exports_of(call, keep_alive(py::make_tuple(call.x, call.result)));
  const Summary summary(bound.record);
  return py::cast(PyWork(comm->submit(std::move(bound)), summary, comm.handle, call.result));
}

void add_work(py::module_& module) {
  py::class_<PyWork>(
      module, "Work",
      "An asynchronous call. It keeps its buffers and their memory until it has completed. Wait for "
      "it before memory is resized in place, as torch's resize_ does.")
      .def("wait", &PyWork::wait, py::arg("timeout") = py::none(),
           "Blocks until the call has completed. Returns what the blocking call returns, or raises its "
           "error. After `timeout` seconds it raises CommTimeoutError, and the call goes on.")
      .def("__repr__", &PyWork::repr)
      .def("is_completed", &PyWork::is_completed, "Whether the call has completed, with or without an error.")
      .def(
          "add_done_callback", &PyWork::add_done_callback, py::arg("fn"),
          "Calls fn(work) once the call has completed, with or without an error: at once if it has "
          "completed, else soon afterwards, on the thread that drove the call. fn may make other calls. Keep "
          "it short: that thread drives this group's other calls as well. Callbacks of a work run in the "
          "order in which they were added. An exception that fn raises goes to sys.unraisablehook.")
      .def("exception", &PyWork::exception, "The call's error, or None while it has none.")
      .def(
          "result", [](PyWork& work) { return work.wait(py::none()); },
          "Waits, and returns what the blocking call returns.");
  module.attr("PersistentOp") = py::handle(reinterpret_cast<PyObject*>(persistent_type()));
}

}  // namespace pycomm::bindings
