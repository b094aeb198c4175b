#include "bindings/kinds.h"

#include <array>
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

// Whether a base of the type is this class of a module that has been imported.
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
  return py::reinterpret_borrow<py::object>(method)(py::handle(object)).cast<bool>();
}

// The tensors that were asked last, by weak reference: to ask takes as long as the rest of a small call. What
// the answer of a real tensor may change with brings other memory (x.data = y), but for torch's own private
// functions. Of complex ones it may not: x.data = x.conj() is a public way.
class Asked {
 public:
  bool has(PyObject* object, const void* data) const {
    const Entry& entry = entries_[place(object)];
    return entry.reference && entry.data == data && is_to(entry.reference, object);
  }
  void add(PyObject* object, const void* data) {
    PyObject* reference = PyWeakref_NewRef(object, nullptr);
    if (!reference) return PyErr_Clear();  // of a type without: asked every time
    Entry& entry = entries_[place(object)];
    std::swap(entry.reference, reference);
    entry.data = data;
    Py_XDECREF(reference);
  }

 private:
  struct Entry {
    PyObject* reference = nullptr;
    const void* data = nullptr;
  };
  static constexpr int kLogEntries = 8;
  static size_t place(PyObject* object) {
    return reinterpret_cast<uintptr_t>(object) * 0x9e3779b97f4a7c15ULL >> (64 - kLogEntries);
  }
#if PY_VERSION_HEX >= 0x030D0000
  static bool is_to(PyObject* reference, PyObject* object) {
    PyObject* found = nullptr;
    if (PyWeakref_GetRef(reference, &found) <= 0) return false;
    Py_DECREF(found);
    return found == object;
  }
#else
  static bool is_to(PyObject* reference, PyObject* object) {
    return PyWeakref_GET_OBJECT(reference) == object;
  }
#endif

  std::array<Entry, 1 << kLogEntries> entries_;
};

// Types of less than a byte, of which torch keeps one in each, look like these.
void require_own_dtype(PyObject* object, DType dtype, const char* name) {
  if (dtype != DType::int8 && dtype != DType::uint8) return;
  const std::string text = py::str(py::getattr(object, "dtype", py::str(pycomm::name(dtype))));
  if (text.substr(text.rfind('.') + 1) == pycomm::name(dtype)) return;
  throw TypeError(std::string("`") + name + "` has dtype " + text +
                  ", which cannot be communicated: pass x.view(torch.uint8), say, to move the bytes");
}

}  // namespace

const Kind& kind_of(PyTypeObject* type) {
  static std::unordered_map<PyTypeObject*, Kind> known;  // types are few and live long
  if (auto found = known.find(type); found != known.end()) return found->second;
  Kind kind;
  kind.exchange = exchange_of(type);
  if (kind.exchange) {
    kind.is_conj = attribute(type, "is_conj");
    kind.is_neg = attribute(type, "is_neg");
    kind.unmade = has_attribute(type, "materialize") && has_attribute(type, "cls_to_become");
  }
  kind.masked = is_a(type, "numpy.ma", "MaskedArray");
  kind.immutable = is_of_jax(type);
  Py_INCREF(type);
  return known.insert_or_assign(type, kind).first->second;
}

void require_computed(const Kind& kind, PyObject* object, const dlpack::Elements& elements,
                      const char* name) {
  static Asked asked;
  const bool complex = elements.dtype == DType::complex64 || elements.dtype == DType::complex128;
  if (!complex && asked.has(object, elements.data)) return;
  const auto deferred = [&](const char* what, const char* remedy) {
    throw ValueError(std::string("`") + name + "` is " + what + " that has not been computed yet: pass x." +
                     remedy + "()");
  };
  if (complex && says_yes(kind.is_conj, object)) deferred("a conjugate", "resolve_conj");
  if (says_yes(kind.is_neg, object)) deferred("a negation", "resolve_neg");
  require_own_dtype(object, elements.dtype, name);
  asked.add(object, elements.data);
}

}  // namespace pycomm::bindings
