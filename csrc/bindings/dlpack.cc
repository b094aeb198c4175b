#include "bindings/dlpack.h"

#include <string>
#include <string_view>
#include <utility>

#include "bindings/gil.h"
#include "common/error.h"

namespace py = pybind11;

namespace pycomm::bindings::dlpack {

namespace {

constexpr uint64_t kReadOnly = 1, kIsCopied = 2;

std::string quoted(const char* name) { return std::string("`") + name + "`"; }

[[noreturn]] void unknown_type(const Tensor& tensor, const char* name) {
  throw TypeError(quoted(name) + " has an element type that cannot be communicated (DLPack code " +
                  std::to_string(tensor.code) + ", " + std::to_string(tensor.bits) + " bits, lanes " +
                  std::to_string(tensor.lanes) + "): convert it to a float, integer, complex or bool type");
}

[[noreturn]] void refuse_export(const char* name, const std::string& why) {
  throw TypeError(quoted(name) + " cannot be read: its " + why +
                  "; pass the same values as an array of NumPy or CuPy, or as a tensor");
}

// Calls a method of an exporter, which is often written in Python.
py::object call_method(const py::object& method, const py::dict& keywords) {
  const py::tuple nothing;
  PyObject* result =
      outlive_interpreter([&] { return PyObject_Call(method.ptr(), nothing.ptr(), keywords.ptr()); });
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// Returns call(), which calls `method`. An exception from the method becomes a TypeError that quotes it.
template <class F>
py::object call_or_refuse(const char* method, const char* name, const F& call) {
  try {
    return call();
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception) || error.matches(PyExc_MemoryError)) throw;
    const std::string text = py::str(error.value()).cast<std::string>();
    refuse_export(name, std::string(method) + "() raised " +
                            py::str(error.type().attr("__name__")).cast<std::string>() + ": " +
                            text.substr(0, text.find('\n')));
  }
}

// Calls __dlpack__(max_version=...), or without max_version if the exporter refuses that, as those from
// before DLPack 1.0 do.
py::object call_export(PyObject* object, bool on_gpu, const char* name) {
  py::dict keywords;
  if (on_gpu) keywords["stream"] = -1;
  return call_or_refuse("__dlpack__", name, [&] {
    const py::object method = py::handle(object).attr("__dlpack__");
    try {
      keywords["max_version"] = py::make_tuple(1, 3);
      return call_method(method, keywords);
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;
    }
    keywords.attr("pop")("max_version");
    return call_method(method, keywords);
  });
}

}  // namespace

std::optional<DType> dtype_of(uint8_t code, uint32_t bits, uint16_t lanes) {
  if (lanes != 1) return std::nullopt;
  switch (code << 16 | bits) {
    case kInt << 16 | 8:
      return DType::int8;
    case kInt << 16 | 16:
      return DType::int16;
    case kInt << 16 | 32:
      return DType::int32;
    case kInt << 16 | 64:
      return DType::int64;
    case kUint << 16 | 8:
      return DType::uint8;
    case kUint << 16 | 16:
      return DType::uint16;
    case kUint << 16 | 32:
      return DType::uint32;
    case kUint << 16 | 64:
      return DType::uint64;
    case kFloat << 16 | 16:
      return DType::float16;
    case kFloat << 16 | 32:
      return DType::float32;
    case kFloat << 16 | 64:
      return DType::float64;
    case kBfloat << 16 | 16:
      return DType::bfloat16;
    case kComplex << 16 | 64:
      return DType::complex64;
    case kComplex << 16 | 128:
      return DType::complex128;
    case kBool << 16 | 8:
      return DType::bool_;
    case kE4M3FN << 16 | 8:
      return DType::float8_e4m3fn;
    case kE5M2 << 16 | 8:
      return DType::float8_e5m2;
    default:
      return std::nullopt;
  }
}

Elements read(const Tensor& tensor, const char* name) {
  const auto dtype = dtype_of(tensor.code, tensor.bits, tensor.lanes);
  if (!dtype) unknown_type(tensor, name);
  if (tensor.ndim < 0) malformed(name, std::to_string(tensor.ndim) + " dimensions");
  if (tensor.ndim > 0 && !tensor.shape) malformed(name, "dimensions and no shape");
  const Elements described{.data = tensor.data,
                           .dtype = *dtype,
                           .shape = {tensor.shape, static_cast<size_t>(tensor.ndim)},
                           .strides = tensor.strides};
  return checked(described, tensor.byte_offset, name);
}

Device device_of(PyObject* object, const char* name) {
  const py::object found = call_or_refuse("__dlpack_device__", name, [&] {
    return call_method(py::handle(object).attr("__dlpack_device__"), py::dict());
  });
  try {
    const auto [type, id] = found.cast<std::pair<int32_t, int32_t>>();
    return {type, id};
  } catch (const py::cast_error&) {
    refuse_export(name, "__dlpack_device__() returned " + py::repr(found).cast<std::string>() +
                            ", not a type and a number of a device");
  }
}

Export export_of(PyObject* object, bool on_gpu, const char* name) {
  py::object capsule = call_export(object, on_gpu, name);
  const char* kind = PyCapsule_CheckExact(capsule.ptr()) ? PyCapsule_GetName(capsule.ptr()) : nullptr;
  if (!kind) {
    PyErr_Clear();
    refuse_export(name, std::string("__dlpack__() returned a ") + Py_TYPE(capsule.ptr())->tp_name +
                            ", not a capsule that holds a tensor");
  }
  const std::string_view holds(kind);
  if (holds == "dltensor") {
    const auto* managed = static_cast<const Managed*>(PyCapsule_GetPointer(capsule.ptr(), kind));
    return {std::move(capsule), &managed->tensor, false, false};
  }
  if (holds != "dltensor_versioned") {
    refuse_export(name, "__dlpack__() returned a capsule \"" + std::string(holds) +
                            "\", not a \"dltensor\" (somebody may have taken the tensor before)");
  }
  const auto* managed = static_cast<const ManagedVersioned*>(PyCapsule_GetPointer(capsule.ptr(), kind));
  if (managed->version.major != 1) {
    refuse_export(name, "__dlpack__() returned a tensor of DLPack " + std::to_string(managed->version.major) +
                            ", where 1 was asked for");
  }
  return {std::move(capsule), &managed->tensor, (managed->flags & kReadOnly) != 0,
          (managed->flags & kIsCopied) != 0};
}

}  // namespace pycomm::bindings::dlpack
