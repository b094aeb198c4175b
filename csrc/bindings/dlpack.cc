#include "bindings/dlpack.h"

#include <limits>
#include <string>
#include <utility>

#include "bindings/gil.h"
#include "common/error.h"

namespace py = pybind11;

namespace pycomm::bindings::dlpack {

namespace {

constexpr int32_t kMaxDims = 64;  // as many as NumPy and torch have
constexpr uint64_t kReadOnly = 1, kIsCopied = 2;

std::string quoted(const char* name) { return std::string("`") + name + "`"; }

[[noreturn]] void unknown_type(const Tensor& tensor, const char* name) {
  throw TypeError(quoted(name) + " has an element type that cannot be communicated (DLPack code " +
                  std::to_string(tensor.code) + ", " + std::to_string(tensor.bits) + " bits, lanes " +
                  std::to_string(tensor.lanes) + "): convert it to a float, integer, complex or bool type");
}

[[noreturn]] void malformed(const char* name, const std::string& what) {
  throw ValueError(quoted(name) + " comes through DLPack with " + what +
                   ": no tensor has that, so pass a copy, as a NumPy array say");
}

int64_t count_of(const Tensor& tensor, int64_t item, const char* name) {
  if (tensor.ndim < 0 || tensor.ndim > kMaxDims) malformed(name, std::to_string(tensor.ndim) + " dimensions");
  if (tensor.ndim > 0 && !tensor.shape) malformed(name, "dimensions and no shape");
  int64_t count = 1, bytes = 0;  // of the extents that are not 0: others multiply some of them
  bool empty = false, too_many = false;
  for (int32_t d = 0; d < tensor.ndim; ++d) {
    const int64_t extent = tensor.shape[d];
    if (extent < 0) malformed(name, "an extent of " + std::to_string(extent));
    empty |= extent == 0;
    too_many |= __builtin_mul_overflow(count, extent == 0 ? 1 : extent, &count);
  }
  too_many |= __builtin_mul_overflow(count, item, &bytes);
  if (too_many) malformed(name, "more bytes than 63 bits count");
  return empty ? 0 : count;
}

bool is_contiguous(const Tensor& tensor) {
  int64_t expected = 1;
  for (int32_t d = tensor.ndim - 1; d >= 0; --d) {
    if (tensor.shape[d] != 1 && tensor.strides[d] != expected) return false;
    expected *= tensor.shape[d];
  }
  return true;
}

[[noreturn]] void refuse_export(const char* name, const std::string& why) {
  throw TypeError(quoted(name) + " cannot be read: its __dlpack__() " + why +
                  "; pass a NumPy array or a CPU tensor of the same values");
}

// __dlpack__(max_version=...), which exporters from before DLPack 1.0 do not know.
py::object call_export(PyObject* object, bool on_gpu, const char* name) {
  const py::object method = py::handle(object).attr("__dlpack__");
  const py::tuple nothing;
  py::dict keywords;
  if (on_gpu) keywords["stream"] = -1;
  const auto call = [&] {  // often Python's own code
    PyObject* capsule =
        outlive_interpreter([&] { return PyObject_Call(method.ptr(), nothing.ptr(), keywords.ptr()); });
    if (!capsule) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(capsule);
  };
  try {
    try {
      keywords["max_version"] = py::make_tuple(1, 3);
      return call();
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;
    }
    keywords.attr("pop")("max_version");
    return call();
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception) || error.matches(PyExc_MemoryError)) throw;
    const std::string text = py::str(error.value()).cast<std::string>();
    refuse_export(name, "raised " + py::str(error.type().attr("__name__")).cast<std::string>() + ": " +
                            text.substr(0, text.find('\n')));
  }
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
  const auto item = static_cast<int64_t>(size_of(*dtype));
  const int64_t count = count_of(tensor, item, name);
  const std::span<const int64_t> shape(tensor.shape, static_cast<size_t>(tensor.ndim));
  if (count == 0) return {tensor.data, *dtype, 0, shape, nullptr, true};
  if (!tensor.data) {
    throw TypeError(quoted(name) +
                    " has no memory behind its elements (as meta, fake and wrapper tensors, and ones whose "
                    "storage was freed): pass a plain tensor");
  }
  uintptr_t address = reinterpret_cast<uintptr_t>(tensor.data), end = 0;
  if (__builtin_add_overflow(address, tensor.byte_offset, &address) ||
      __builtin_add_overflow(address, static_cast<uint64_t>(count * item), &end))
    malformed(name, "an end beyond all addresses");
  const bool contiguous = !tensor.strides || is_contiguous(tensor);
  return {reinterpret_cast<void*>(address), *dtype, count, shape, tensor.strides, contiguous};
}

Export export_of(PyObject* object, bool on_gpu, const char* name) {
  py::object capsule = call_export(object, on_gpu, name);
  const char* kind = PyCapsule_CheckExact(capsule.ptr()) ? PyCapsule_GetName(capsule.ptr()) : nullptr;
  if (!kind) {
    PyErr_Clear();
    refuse_export(name, std::string("returned a ") + Py_TYPE(capsule.ptr())->tp_name +
                            ", not a capsule that holds a tensor");
  }
  const std::string_view holds(kind);
  if (holds == "dltensor") {
    const auto* managed = static_cast<const Managed*>(PyCapsule_GetPointer(capsule.ptr(), kind));
    return {std::move(capsule), &managed->tensor, false, false};
  }
  if (holds != "dltensor_versioned") {
    refuse_export(name,
                  "returned a capsule \"" + std::string(holds) +
                      "\": one that holds a tensor is a \"dltensor\", and one that somebody took is not");
  }
  const auto* managed = static_cast<const ManagedVersioned*>(PyCapsule_GetPointer(capsule.ptr(), kind));
  if (managed->version.major != 1) {
    refuse_export(name, "returned a tensor of DLPack " + std::to_string(managed->version.major) +
                            ", where 1 was asked for");
  }
  return {std::move(capsule), &managed->tensor, (managed->flags & kReadOnly) != 0,
          (managed->flags & kIsCopied) != 0};
}

}  // namespace pycomm::bindings::dlpack
