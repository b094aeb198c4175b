#include "bindings/buffer.h"

#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#include <numpy/arrayobject.h>

#include <cstring>
#include <optional>
#include <string_view>
#include <unordered_map>

#include "bindings/exit.h"
#include "bindings/refusal.h"
#include "common/error.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

// DLPack 1.3's structures, as far as they are read here.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
struct DLExchangeApi {
  struct {
    uint32_t major, minor;
    void* previous;
  } header;
  void* allocate;
  int (*managed_from_object)(void*, void**);
  void* to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);
};

std::optional<DType> from_dlpack(uint8_t code, uint8_t bits) {
  enum { kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6, kE4M3FN = 10, kE5M2 = 12 };
  switch (code) {
    case kInt:
      return bits == 8 ? DType::int8 : bits == 16 ? DType::int16 : bits == 32 ? DType::int32 : DType::int64;
    case kUint:
      return bits == 8    ? DType::uint8
             : bits == 16 ? DType::uint16
             : bits == 32 ? DType::uint32
                          : DType::uint64;
    case kFloat:
      return bits == 16 ? DType::float16 : bits == 32 ? DType::float32 : DType::float64;
    case kBfloat:
      return DType::bfloat16;
    case kComplex:
      return bits == 64 ? DType::complex64 : DType::complex128;
    case kBool:
      return DType::bool_;
    case kE4M3FN:
      return DType::float8_e4m3fn;
    case kE5M2:
      return DType::float8_e5m2;
    default:
      return std::nullopt;
  }
}

std::optional<DType> from_numpy(PyArray_Descr* descr) {
  switch (descr->type_num) {
    case NPY_FLOAT:
      return DType::float32;
    case NPY_DOUBLE:
      return DType::float64;
    case NPY_HALF:
      return DType::float16;
    case NPY_BOOL:
      return DType::bool_;
    case NPY_BYTE:
      return DType::int8;
    case NPY_SHORT:
      return DType::int16;
    case NPY_INT:
      return DType::int32;
    case NPY_LONG:
      return sizeof(long) == 8 ? DType::int64 : DType::int32;
    case NPY_LONGLONG:
      return DType::int64;
    case NPY_UBYTE:
      return DType::uint8;
    case NPY_USHORT:
      return DType::uint16;
    case NPY_UINT:
      return DType::uint32;
    case NPY_ULONG:
      return sizeof(long) == 8 ? DType::uint64 : DType::uint32;
    case NPY_ULONGLONG:
      return DType::uint64;
    case NPY_CFLOAT:
      return DType::complex64;
    case NPY_CDOUBLE:
      return DType::complex128;
    default:
      break;
  }
  if (descr->type_num < NPY_USERDEF) return std::nullopt;
  const char* full = descr->typeobj->tp_name;  // ml_dtypes' types
  const char* dot = std::strrchr(full, '.');
  const std::string_view name = dot ? dot + 1 : full;
  for (DType dtype : {DType::bfloat16, DType::float8_e4m3fn, DType::float8_e5m2}) {
    if (name == pycomm::name(dtype)) return dtype;
  }
  return std::nullopt;
}

[[noreturn]] void strided(const char* name, const char* remedy, const std::string& view = "") {
  throw ValueError(std::string("`") + name + "` is not contiguous in C order: pass " + view + remedy +
                   " and copy the result back");
}

// False if the array cannot be communicated.
bool read_array(PyArrayObject* array, Buffer& buffer) {
  const auto dtype = from_numpy(PyArray_DESCR(array));
  const int flags = PyArray_FLAGS(array);
  if (!dtype || !(flags & NPY_ARRAY_C_CONTIGUOUS) || !PyArray_ISNOTSWAPPED(array)) return false;
  buffer.data = PyArray_DATA(array);
  buffer.dtype = *dtype;
  buffer.count = PyArray_SIZE(array);
  buffer.shape = {PyArray_DIMS(array), static_cast<size_t>(PyArray_NDIM(array))};
  buffer.writable = flags & NPY_ARRAY_WRITEABLE;
  return true;
}

Buffer from_array(PyArrayObject* array, const char* name) {
  if (Buffer buffer; read_array(array, buffer)) return buffer;
  if (!from_numpy(PyArray_DESCR(array))) {
    throw TypeError(std::string("`") + name + "` has dtype " +
                    py::str(reinterpret_cast<PyObject*>(PyArray_DESCR(array))).cast<std::string>() +
                    ", which cannot be communicated: convert it to a float, integer, complex or bool type");
  }
  if (!(PyArray_FLAGS(array) & NPY_ARRAY_C_CONTIGUOUS)) {
    const std::span<const int64_t> shape(PyArray_DIMS(array), PyArray_NDIM(array));
    const std::string view = dense_view(shape, PyArray_STRIDES(array), "transpose", PyArray_ITEMSIZE(array));
    strided(name, "numpy.ascontiguousarray(x)", view);
  }
  throw ValueError(std::string("`") + name + "` is byte-swapped: pass x.astype(x.dtype.newbyteorder('='))");
}

Buffer from_tensor(const DLTensor& tensor, const char* name) {
  if (tensor.device_type != 1) {  // kDLCPU
    throw TypeError(std::string("`") + name + "` is not in CPU memory (DLPack device type " +
                    std::to_string(tensor.device_type) +
                    "): this group communicates CPU buffers, pass x.cpu()");
  }
  const auto dtype = from_dlpack(tensor.code, tensor.bits);
  if (!dtype || tensor.lanes != 1) {
    throw TypeError(std::string("`") + name +
                    "` has an element type that cannot be communicated (DLPack code " +
                    std::to_string(tensor.code) + ", " + std::to_string(tensor.bits) + " bits)");
  }
  Buffer buffer;
  buffer.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  buffer.dtype = *dtype;
  buffer.count = 1;
  buffer.shape = {tensor.shape, static_cast<size_t>(tensor.ndim)};
  for (int64_t extent : buffer.shape) buffer.count *= extent;
  int64_t expected = 1;
  for (int d = tensor.ndim - 1; tensor.strides && buffer.count > 0 && d >= 0; --d) {
    if (tensor.shape[d] != 1 && tensor.strides[d] != expected) {
      strided(name, "x.contiguous()", dense_view(buffer.shape, tensor.strides, "permute"));
    }
    expected *= tensor.shape[d];
  }
  return buffer;
}

// The table that a type publishes for exchange without Python calls, or null. Types are few and live long.
const DLExchangeApi* exchange_api(PyTypeObject* type) {
  static std::unordered_map<PyTypeObject*, const DLExchangeApi*> known;
  if (auto found = known.find(type); found != known.end()) return found->second;
  const DLExchangeApi* api = nullptr;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
    api = static_cast<const DLExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (api->header.major != 1 || !api->tensor_from_object) api = nullptr;
  }
  PyErr_Clear();
  Py_XDECREF(capsule);
  Py_INCREF(type);
  known[type] = api;
  return api;
}

Buffer from_exchange(const DLExchangeApi& api, PyObject* object, const char* name) {
  DLTensor tensor{};
  if (api.tensor_from_object(object, &tensor) != 0) {
    const std::string why = py::str(py::error_already_set().value()).cast<std::string>();
    throw TypeError(std::string("`") + name +
                    "` is not a dense tensor in CPU memory: " + why.substr(0, why.find('\n')));
  }
  Buffer buffer = from_tensor(tensor, name);
  const bool complex = buffer.dtype == DType::complex64 || buffer.dtype == DType::complex128;
  if (complex && PyObject_HasAttrString(object, "is_conj") &&
      py::handle(object).attr("is_conj")().cast<bool>()) {
    throw ValueError(std::string("`") + name +
                     "` is a conjugate that has not been computed yet: pass "
                     "x.resolve_conj()");
  }
  return buffer;
}

std::optional<Buffer> from_dlpack_method(PyObject* object, const char* name) {
  if (!PyObject_HasAttrString(object, "__dlpack__")) return std::nullopt;
  py::object capsule = py::reinterpret_borrow<py::object>(object).attr("__dlpack__")();
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (!managed) throw py::error_already_set();
  Buffer buffer = from_tensor(managed->tensor, name);
  // The capsule owns the tensor until somebody takes it; nobody does.
  buffer.exported = std::shared_ptr<void>(capsule.release().ptr(), [](void* p) {
    drop_locked([](void* object) { Py_DECREF(static_cast<PyObject*>(object)); }, p);
  });
  return buffer;
}

// An object that has its elements in another one: pycomm.Bucket.
std::optional<Buffer> from_attribute(PyObject* object, const char* name) {
  if (!PyObject_HasAttrString(object, "__pycomm_buffer__")) return std::nullopt;
  const py::object inner = py::handle(object).attr("__pycomm_buffer__");
  Buffer buffer = get_buffer(inner.ptr(), name);
  buffer.signature = py::handle(object).attr("__pycomm_signature__").cast<std::string>();
  return buffer;
}

std::optional<DType> from_format(const char* format, Py_ssize_t item) {
  if (!format) return DType::uint8;
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  if (std::strcmp(format, "Zf") == 0) return DType::complex64;
  if (std::strcmp(format, "Zd") == 0) return DType::complex128;
  if (std::strlen(format) != 1) return std::nullopt;
  switch (*format) {
    case 'f':
      return DType::float32;
    case 'd':
      return DType::float64;
    case 'e':
      return DType::float16;
    case '?':
      return DType::bool_;
    case 'b':
    case 'h':
    case 'i':
    case 'l':
    case 'q':
      return from_dlpack(0, static_cast<uint8_t>(8 * item));
    case 'B':
    case 'H':
    case 'I':
    case 'L':
    case 'Q':
    case 'c':
      return from_dlpack(1, static_cast<uint8_t>(8 * item));
    default:
      return std::nullopt;
  }
}

Buffer from_protocol(PyObject* object, const char* name) {
  std::shared_ptr<Py_buffer> view(new Py_buffer{}, [](Py_buffer* b) {
    drop_locked(
        [](void* held) {
          PyBuffer_Release(static_cast<Py_buffer*>(held));
          delete static_cast<Py_buffer*>(held);
        },
        b);
  });
  bool writable = true;
  if (PyObject_GetBuffer(object, view.get(), PyBUF_WRITABLE | PyBUF_FORMAT | PyBUF_STRIDES) != 0) {
    PyErr_Clear();
    writable = false;
    if (PyObject_GetBuffer(object, view.get(), PyBUF_FORMAT | PyBUF_STRIDES) != 0)
      throw py::error_already_set();
  }
  if (!PyBuffer_IsContiguous(view.get(), 'C')) strided(name, "bytearray(x)");
  const auto dtype = from_format(view->format, view->itemsize);
  if (!dtype) {
    throw TypeError(std::string("`") + name + "` has the buffer format \"" + view->format +
                    "\", which cannot be communicated");
  }
  Buffer buffer;
  buffer.data = view->buf;
  buffer.dtype = *dtype;
  buffer.count = view->len / view->itemsize;
  buffer.shape = {view->shape, static_cast<size_t>(view->ndim)};
  buffer.writable = writable;
  buffer.exported = view;
  return buffer;
}

int import_numpy_or_null() {
  import_array1(-1);
  return 0;
}

}  // namespace

void import_numpy() {
  if (import_numpy_or_null() != 0) throw py::error_already_set();
}

Buffer get_buffer(PyObject* object, const char* name) {
  if (PyArray_Check(object)) return from_array(reinterpret_cast<PyArrayObject*>(object), name);
  if (const DLExchangeApi* api = exchange_api(Py_TYPE(object))) return from_exchange(*api, object, name);
  if (auto buffer = from_dlpack_method(object, name)) return *buffer;
  if (auto buffer = from_attribute(object, name)) return *buffer;
  if (PyObject_CheckBuffer(object) && !is_number(object)) return from_protocol(object, name);
  refuse(object, name);
}

bool peek_buffer(PyObject* object, Buffer& buffer) {
  if (PyArray_Check(object)) return read_array(reinterpret_cast<PyArrayObject*>(object), buffer);
  const DLExchangeApi* api = exchange_api(Py_TYPE(object));
  if (!api) return false;
  try {
    buffer = from_exchange(*api, object, "");
    return true;
  } catch (const TypeError&) {
  } catch (const ValueError&) {
  }
  return false;
}

void require_writable(const Buffer& buffer, const char* name) {
  if (buffer.writable) return;
  throw ValueError(std::string("`") + name +
                   "` is read-only and the result would be written to it: pass out=, or a writable copy");
}

py::object numpy_dtype(DType dtype) {
  const char* name = pycomm::name(dtype);
  switch (dtype) {
    case DType::bfloat16:
    case DType::float8_e4m3fn:
    case DType::float8_e5m2: {
      PyObject* module = PyImport_ImportModule("ml_dtypes");
      if (!module) {
        PyErr_Clear();
        throw TypeError(std::string(name) + " arrays need ml_dtypes: pip install ml_dtypes");
      }
      const py::object scalar = py::reinterpret_steal<py::object>(module).attr(name);
      return py::module_::import("numpy").attr("dtype")(scalar);
    }
    default:
      return py::module_::import("numpy").attr("dtype")(name);
  }
}

DType dtype_from_python(PyObject* object) {
  if (PyUnicode_Check(object)) {
    const std::string text = py::cast<std::string>(object);
    return parse_dtype(text);
  }
  if (std::strcmp(Py_TYPE(object)->tp_name, "torch.dtype") == 0) {
    return parse_dtype(py::str(py::handle(object)).cast<std::string>().substr(std::strlen("torch.")));
  }
  const py::object descr = described_dtype(object);
  const auto dtype = from_numpy(reinterpret_cast<PyArray_Descr*>(descr.ptr()));
  if (!dtype) throw TypeError("dtype " + py::str(descr).cast<std::string>() + " cannot be communicated");
  return *dtype;
}

py::object new_array(PyObject* like, const Buffer& buffer, const std::vector<int64_t>& shape) {
  py::tuple dims(shape.size());
  for (size_t d = 0; d < shape.size(); ++d) dims[d] = shape[d];
  if (!PyArray_Check(like) && PyObject_HasAttrString(like, "new_empty")) {
    return py::handle(like).attr("new_empty")(dims);
  }
  return py::module_::import("numpy").attr("empty")(dims, numpy_dtype(buffer.dtype));
}

std::string shape_text(std::span<const int64_t> shape) {
  std::string text = "(";
  for (size_t d = 0; d < shape.size(); ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

}  // namespace pycomm::bindings
