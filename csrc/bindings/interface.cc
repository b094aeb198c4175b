#include "bindings/interface.h"

#include <climits>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bindings/array.h"
#include "bindings/gil.h"
#include "bindings/python.h"
#include "bindings/refusal.h"
#include "common/error.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

// The interface's type strings have no name for bfloat16 and float8: the object's own dtype does.
DType dtype_of_interface(PyObject* object, const py::object& typestr, const char* name) {
  const py::object letters = described_dtype(typestr.ptr());
  const py::object own = py::getattr(object, "dtype", py::none());
  py::object described = letters;
  if (!own.is_none()) {
    try {
      described = described_dtype(own.ptr());
    } catch (const TypeError&) {  // a dtype of another library, unknown to NumPy
    }
  }
  if (!described.attr("itemsize").equal(letters.attr("itemsize"))) {
    throw TypeError(std::string("`") + name + "` has dtype " + py::str(described).cast<std::string>() +
                    ", and its interface says " + py::str(letters).cast<std::string>() + ": pass a copy");
  }
  for (const py::object& dtype : {letters, described}) {
    if (!dtype.attr("isnative").cast<bool>()) refuse_swapped(name, "a copy in this machine's order");
  }
  const auto dtype = dtype_of_numpy(described.ptr());
  if (!dtype) refuse_dtype(name, described);
  return *dtype;
}

[[noreturn]] void refuse_interface(const char* name, const py::object& interface) {
  throw TypeError(
      std::string("`") + name + "` cannot be read: its __cuda_array_interface__ is " +
      py::repr(interface).cast<std::string>() +
      ", which does not follow that protocol; pass the same values as an array of CuPy or a tensor");
}

}  // namespace

py::object interface_of(PyObject* object) {
  PyObject* found = outlive_interpreter([&] {  // often written in Python
    return PyObject_GetAttrString(object, "__cuda_array_interface__");
  });
  if (found) return py::reinterpret_steal<py::object>(found);
  if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
  PyErr_Clear();
  return py::none();
}

std::optional<int> told_device(PyObject* object) {
  const py::object id = py::getattr(py::getattr(object, "device", py::none()), "id", py::none());
  if (!PyLong_Check(id.ptr())) return std::nullopt;
  int overflows = 0;
  const long number = PyLong_AsLongAndOverflow(id.ptr(), &overflows);
  if (overflows != 0 || number < INT_MIN || number > INT_MAX) {
    throw ValueError("`device.id` of the array is " + py::str(id).cast<std::string>() +
                     ": no device has this number");
  }
  return static_cast<int>(number);
}

int device_at(void* address, const char* name) {
  if (!address) return 0;
  const py::object cuda = py::module_::import("pycomm.cuda.arrays").attr("native")();
  return cuda.attr("device_of")(reinterpret_cast<uintptr_t>(address), name).cast<int>();
}

Interface read_interface(PyObject* object, const py::object& interface, const char* name) {
  if (!PyDict_Check(interface.ptr())) refuse_interface(name, interface);
  const auto entry = [&](const char* key) { return interface.attr("get")(key); };
  struct Extents {
    std::vector<int64_t> shape, strides;
  };
  const auto extents = std::make_shared<Extents>();
  try {
    if (!entry("mask").is_none()) refuse_masked(name, "an array without one");
    const DType dtype = dtype_of_interface(object, entry("typestr"), name);
    const auto [address, read_only] = entry("data").cast<std::pair<std::optional<uintptr_t>, bool>>();
    extents->shape = entry("shape").cast<std::vector<int64_t>>();
    const bool in_c_order = entry("strides").is_none();
    if (!in_c_order) extents->strides = entry("strides").cast<std::vector<int64_t>>();
    if (!in_c_order && extents->strides.size() != extents->shape.size()) {
      malformed(name, std::to_string(extents->shape.size()) + " extents and " +
                          std::to_string(extents->strides.size()) + " strides");
    }
    const Elements described{.data = reinterpret_cast<void*>(address.value_or(0)),
                             .dtype = dtype,
                             .shape = extents->shape,
                             .strides = in_c_order ? nullptr : extents->strides.data(),
                             .stride_unit = static_cast<int64_t>(size_of(dtype))};
    return {checked(described, 0, name), extents, read_only, told_device(object)};
  } catch (const py::cast_error&) {  // an entry of another type
    refuse_interface(name, interface);
  }
}

}  // namespace pycomm::bindings
