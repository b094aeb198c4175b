#include "bindings/refusal.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/error.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

// pybind11's dispatcher, which all of its functions call first. If arguments do not fit, its error lists
// signatures in C++'s terms. It has one of these two calling conventions.
PyCFunctionWithKeywords dispatch_tuple = nullptr;
_PyCFunctionFastWithKeywords dispatch_fast = nullptr;

// Replaces the Python error that is set by one in our words, if it is about arguments.
void translate(const py::list& args, const py::dict& keywords) {
  if (!PyErr_ExceptionMatches(PyExc_TypeError)) return;
  py::error_already_set error;
  const std::string text = py::str(error.value());
  if (text.find("(): incompatible ") == std::string::npos) {
    error.restore();
    return;
  }
  try {
    PyErr_SetObject(
        PyExc_TypeError,
        py::module_::import("pycomm.signatures").attr("wrong_arguments")(text, args, keywords).ptr());
  } catch (py::error_already_set& other) {
    other.restore();
  }
}

// Whether the object's __init__ has not been called. pybind11 would use its memory all the same.
bool is_unmade(PyObject* object) {
  if (!PyObject_TypeCheck(reinterpret_cast<PyObject*>(Py_TYPE(object)),
                          py::detail::get_internals().default_metaclass)) {
    return false;
  }
  const auto* instance = reinterpret_cast<const py::detail::instance*>(object);
  return instance->simple_layout && !instance->simple_holder_constructed;
}

bool refuse_unmade(PyObject* object) {
  if (!object || !is_unmade(object)) return false;
  PyErr_Format(PyExc_TypeError, "%s.__init__() has not been called: call it before anything else",
               Py_TYPE(object)->tp_name);
  return true;
}

template <bool kIsInit>
PyObject* call_tuple(PyObject* self, PyObject* args, PyObject* keywords) {
  if (!kIsInit && PyTuple_GET_SIZE(args) > 0 && refuse_unmade(PyTuple_GET_ITEM(args, 0))) return nullptr;
  PyObject* result = dispatch_tuple(self, args, keywords);
  if (!result) {
    translate(py::list(py::reinterpret_borrow<py::tuple>(args)),
              keywords ? py::reinterpret_borrow<py::dict>(keywords) : py::dict());
  }
  return result;
}

template <bool kIsInit>
PyObject* call_fast(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* names) {
  if (!kIsInit && nargs > 0 && refuse_unmade(args[0])) return nullptr;
  PyObject* result = dispatch_fast(self, args, nargs, names);
  if (!result) {
    py::list positional;
    py::dict keywords;
    for (Py_ssize_t i = 0; i < nargs; ++i) positional.append(py::handle(args[i]));
    for (Py_ssize_t k = 0; names && k < PyTuple_GET_SIZE(names); ++k) {
      keywords[py::handle(PyTuple_GET_ITEM(names, k))] = py::handle(args[nargs + k]);
    }
    translate(positional, keywords);
  }
  return result;
}

// The calling convention of the dispatcher depends on pybind11's version.
template <bool kIsInit>
void translate_errors_of(py::handle value) {
  PyObject* function = value.is_none() ? nullptr : py::detail::get_function(value).ptr();
  if (!function || !PyCFunction_Check(function)) return;
  PyMethodDef* def = reinterpret_cast<PyCFunctionObject*>(function)->m_ml;
  void* const dispatcher = reinterpret_cast<void*>(def->ml_meth);
  const auto is = [&](auto* ours) { return dispatcher == reinterpret_cast<void*>(ours); };
  if (def->ml_flags == (METH_FASTCALL | METH_KEYWORDS)) {
    if (is(call_fast<true>) || is(call_fast<false>)) return;
    dispatch_fast = reinterpret_cast<_PyCFunctionFastWithKeywords>(dispatcher);
    def->ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_fast<kIsInit>));
  } else if (def->ml_flags == (METH_VARARGS | METH_KEYWORDS)) {
    if (is(call_tuple<true>) || is(call_tuple<false>)) return;
    dispatch_tuple = reinterpret_cast<PyCFunctionWithKeywords>(dispatcher);
    def->ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_tuple<kIsInit>));
  }
}

int refuse_to_make(PyObject* self, PyObject*, PyObject*) {
  const std::string name = py::type::of(self).attr("__name__").cast<std::string>();
  PyErr_SetString(PyExc_TypeError,
                  (name + " objects come from pycomm's calls: they cannot be made by hand").c_str());
  return -1;
}

}  // namespace

void refuse(PyObject* object, const char* name) {
  py::module_::import("pycomm.checks").attr("refuse")(py::handle(object), name);
  throw TypeError(std::string("`") + name + "` is no buffer");
}

void refuse_masked(const char* name, const char* remedy) {
  throw ValueError(std::string("`") + name + "` has a mask, which would be ignored: pass " + remedy);
}

void refuse_dtype(const char* name, py::handle dtype) {
  throw TypeError(std::string("`") + name + "` has dtype " + py::str(dtype).cast<std::string>() +
                  ", which cannot be communicated: convert it to a float, integer, complex or bool type");
}

void refuse_swapped(const char* name, const char* remedy) {
  throw ValueError(std::string("`") + name + "` is byte-swapped: pass " + remedy);
}

void refuse_strided(const char* name, const char* remedy, const std::string& view) {
  throw ValueError(std::string("`") + name + "` is not contiguous in C order: pass " + view + remedy +
                   " and copy the result back");
}

void refuse_device(const char* name, const std::string& where) {
  throw TypeError(std::string("`") + name + "` is " + where +
                  ": this group communicates CPU buffers, pass a copy in CPU memory, as x.cpu()");
}

void refuse_outside_gpu(const char* name, const std::string& where) {
  throw TypeError(std::string("`") + name + "` is " + where +
                  ": pycomm.cuda takes arrays and tensors on an NVIDIA GPU, move it there, as x.cuda()");
}

void require_made(PyObject* self) {
  if (refuse_unmade(self)) throw py::error_already_set();
}

bool is_number(PyObject* object) { return PyObject_HasAttrString(object, "dtype"); }

std::string dense_view(std::span<const int64_t> shape, const int64_t* strides, const char* method,
                       int64_t item) {
  std::vector<size_t> axes(shape.size());
  std::iota(axes.begin(), axes.end(), size_t{0});
  std::ranges::stable_sort(axes, [&](size_t a, size_t b) { return strides[a] > strides[b]; });
  int64_t expected = item;
  for (size_t i = axes.size(); i-- > 0;) {
    if (shape[axes[i]] != 1 && strides[axes[i]] != expected) return "";
    expected *= shape[axes[i]];
  }
  std::string order;
  for (const size_t axis : axes) order += (order.empty() ? "" : ", ") + std::to_string(axis);
  return std::string("x.") + method + "(" + order + "), a view of the same memory, or ";
}

py::object described_dtype(PyObject* object) {
  if (object != Py_None) {
    try {
      return py::module_::import("numpy").attr("dtype")(py::handle(object));
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError) && !error.matches(PyExc_ValueError)) throw;
    }
  }
  throw TypeError(
      "dtype " + py::repr(object).cast<std::string>() +
      " is no element type: pass a name such as \"float32\", or a dtype of NumPy's, ml_dtypes' or torch's");
}

std::string own_name(PyObject* object) {
  for (const char* attribute : {"name", "__name__"}) {
    const py::object found = py::getattr(py::handle(object), attribute, py::none());
    if (py::isinstance<py::str>(found)) return found.cast<std::string>();
  }
  return "";
}

void translate_type_errors(py::module_& module) {
  for (const auto& [name, value] : py::reinterpret_borrow<py::dict>(module.attr("__dict__"))) {
    translate_errors_of<false>(value);
    if (!PyType_Check(value.ptr())) continue;
    auto* type = reinterpret_cast<PyTypeObject*>(value.ptr());
    for (const auto& [attribute, method] : py::reinterpret_borrow<py::dict>(type->tp_dict)) {
      const bool is_init = attribute.cast<std::string>() == "__init__";
      is_init ? translate_errors_of<true>(method) : translate_errors_of<false>(method);
      if (PyObject_TypeCheck(method.ptr(), &PyProperty_Type)) {
        for (const char* side : {"fget", "fset"}) translate_errors_of<false>(method.attr(side));
      }
    }
    const bool of_pybind = PyObject_TypeCheck(value.ptr(), py::detail::get_internals().default_metaclass);
    PyObject* made_by = PyDict_GetItemString(type->tp_dict, "__init__");
    if (of_pybind && !(made_by && PyInstanceMethod_Check(made_by))) type->tp_init = refuse_to_make;
  }
}

}  // namespace pycomm::bindings
