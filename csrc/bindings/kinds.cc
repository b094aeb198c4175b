#include "bindings/kinds.h"

#include <string>
#include <unordered_map>

#include "common/error.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

// An attribute of the type, a new reference, or null.
PyObject* attribute(PyTypeObject* type, const char* name) {
  PyObject* found = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), name);
  if (!found) PyErr_Clear();
  return found;
}

bool has_attribute(PyTypeObject* type, const char* name) {
  PyObject* found = attribute(type, name);
  Py_XDECREF(found);
  return found;
}

const dlpack::ExchangeApi* exchange_of(PyTypeObject* type) {
  const py::object capsule = py::reinterpret_steal<py::object>(attribute(type, "__dlpack_c_exchange_api__"));
  if (!capsule || !PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  return api->version.major == 1 && api->tensor_from_object ? api : nullptr;
}

// Whether the type is this class, or derived from it. False if the module has not been imported.
bool is_a(PyTypeObject* type, const char* module, const char* name) {
  const py::dict modules = py::module_::import("sys").attr("modules");
  if (!modules.contains(module)) return false;
  const py::object base = py::getattr(modules[module], name, py::none());
  return PyType_Check(base.ptr()) && PyType_IsSubtype(type, reinterpret_cast<PyTypeObject*>(base.ptr()));
}

bool is_of_jax(PyTypeObject* type) {
  const py::object module = py::reinterpret_steal<py::object>(attribute(type, "__module__"));
  if (!module || !PyUnicode_Check(module.ptr())) return false;
  const std::string text = module.cast<std::string>(), first = text.substr(0, text.find('.'));
  return first == "jax" || first == "jaxlib";
}

bool says_yes(PyObject* method, PyObject* object) {
  if (!method) return false;
  const py::object answer = py::reinterpret_steal<py::object>(PyObject_CallOneArg(method, object));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

// Torch's types of less than a byte, with one element in each byte, look like int8 or uint8 otherwise.
void require_own_dtype(PyObject* object, DType dtype, const char* name) {
  if (dtype != DType::int8 && dtype != DType::uint8) return;
  static PyObject* known[2] = {};  // torch's objects for int8 and uint8, once seen
  const py::object own = py::getattr(object, "dtype", py::none());
  PyObject*& right = known[dtype == DType::uint8];
  if (own.ptr() == right || own.is_none()) return;
  const std::string text = py::str(own);
  if (text.substr(text.rfind('.') + 1) != pycomm::name(dtype)) {
    throw TypeError(std::string("`") + name + "` has dtype " + text +
                    ", which cannot be communicated: pass x.view(torch.uint8), say, to move the bytes");
  }
  if (!right) right = py::object(own).release().ptr();
}

}  // namespace

const Kind& kind_of(PyTypeObject* type) {
  static std::unordered_map<PyTypeObject*, Kind> known;  // types are few and live long
  if (auto found = known.find(type); found != known.end()) return found->second;
  Kind kind;
  kind.exchange = exchange_of(type);
  kind.of_torch = is_a(type, "torch", "Tensor");
  if (kind.exchange || kind.of_torch) {
    kind.is_conj = attribute(type, "is_conj");
    kind.is_neg = attribute(type, "is_neg");
    if (PyObject* property = attribute(type, "requires_grad")) {
      kind.requires_grad = has_attribute(Py_TYPE(property), "__get__") ? property : nullptr;
    }
    kind.uninitialized = has_attribute(type, "materialize") && has_attribute(type, "cls_to_become");
  }
  kind.masked = is_a(type, "numpy.ma", "MaskedArray");
  kind.immutable = is_of_jax(type);
  Py_INCREF(type);
  return known.insert_or_assign(type, kind).first->second;
}

bool is_in_graph(const Kind& kind, PyObject* object) {
  if (!kind.requires_grad) return false;
  const auto get = Py_TYPE(kind.requires_grad)->tp_descr_get;
  const auto requires_grad = py::reinterpret_steal<py::object>(
      get(kind.requires_grad, object, reinterpret_cast<PyObject*>(Py_TYPE(object))));
  if (!requires_grad) throw py::error_already_set();
  return requires_grad.ptr() == Py_True && !py::getattr(object, "grad_fn", py::none()).is_none();
}

void require_computed(const Kind& kind, PyObject* object, DType dtype, const char* name) {
  // Asked every time: x.data = y changes the answer, and y may lie where x did.
  const bool complex = dtype == DType::complex64 || dtype == DType::complex128;
  const auto deferred = [&](const char* what, const char* remedy) {
    throw ValueError(std::string("`") + name + "` is " + what + " that has not been computed yet: pass x." +
                     remedy + "()");
  };
  if (complex && says_yes(kind.is_conj, object)) deferred("a conjugate", "resolve_conj");
  if (says_yes(kind.is_neg, object)) deferred("a negation", "resolve_neg");
  require_own_dtype(object, dtype, name);
}

}  // namespace pycomm::bindings
