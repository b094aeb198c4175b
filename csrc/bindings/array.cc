#include "bindings/array.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <unordered_map>
#include <utility>

#include "bindings/dlpack.h"
#include "bindings/exit.h"
#include "bindings/formats.h"
#include "bindings/interface.h"
#include "bindings/kinds.h"
#include "bindings/numpy.h"
#include "bindings/python.h"
#include "bindings/refusal.h"
#include "common/error.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

// Types of ml_dtypes. NumPy numbers the types of other packages as these register them, and never reuses a
// number, so that answers can be kept.
std::optional<DType> from_user_type(PyArray_Descr* descr) {
  static std::unordered_map<int, std::optional<DType>> known;
  if (auto found = known.find(descr->type_num); found != known.end()) return found->second;
  const py::handle type(reinterpret_cast<PyObject*>(descr->typeobj));
  const auto text = [&](const char* attribute) {
    return py::str(py::getattr(type, attribute, py::str(""))).cast<std::string>();
  };
  std::optional<DType> result;
  if (text("__module__") == "ml_dtypes") {
    const std::string name = text("__name__");
    for (DType dtype : {DType::bfloat16, DType::float8_e4m3fn, DType::float8_e5m2}) {
      if (name == pycomm::name(dtype) && PyDataType_ELSIZE(descr) == static_cast<npy_intp>(size_of(dtype)))
        result = dtype;
    }
  }
  known[descr->type_num] = result;
  return result;
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
  return PyTypeNum_ISUSERDEF(descr->type_num) ? from_user_type(descr) : std::nullopt;
}

// Memory holds values for masked elements too, and does not tell them from the others.
bool has_mask(PyArrayObject* array) {
  const py::handle object(reinterpret_cast<PyObject*>(array));
  if (PyArray_CheckExact(object.ptr()) || !kind_of(Py_TYPE(object.ptr())).masked) return false;
  const py::module_ ma = py::module_::import("numpy.ma");
  return !ma.attr("getmask")(object).is(ma.attr("nomask"));
}

// False if the array cannot be communicated.
bool read_array(PyArrayObject* array, Array& buffer) {
  if (has_mask(array)) return false;
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

[[noreturn]] void refuse_array(PyArrayObject* array, const char* name) {
  if (has_mask(array)) refuse_masked(name, "x.filled(0), or x.data for all elements");
  if (!from_numpy(PyArray_DESCR(array))) {
    refuse_dtype(name, reinterpret_cast<PyObject*>(PyArray_DESCR(array)));
  }
  if (!(PyArray_FLAGS(array) & NPY_ARRAY_C_CONTIGUOUS)) {
    const std::span<const int64_t> shape(PyArray_DIMS(array), PyArray_NDIM(array));
    const std::string view = dense_view(shape, PyArray_STRIDES(array), "transpose", PyArray_ITEMSIZE(array));
    refuse_strided(name, "numpy.ascontiguousarray(x)", view);
  }
  refuse_swapped(name, "x.astype(x.dtype.newbyteorder('='))");
}

Array from_array(PyArrayObject* array, const char* name) {
  Array buffer;
  if (!read_array(array, buffer)) refuse_array(array, name);
  return buffer;
}

// Where a call needs its buffers.
enum class Side { host, gpu };

// Array's `device`. Throws TypeError for memory on the other side.
int device_number(const dlpack::Device& device, Side needed, const char* name) {
  const auto refuse = [&](const std::string& where) {
    needed == Side::host ? refuse_device(name, where) : refuse_outside_gpu(name, where);
  };
  if (device.type == dlpack::kCpu) {
    if (needed == Side::gpu) refuse("in CPU memory");
    return kHost;
  }
  if (device.type != dlpack::kCuda && device.type != dlpack::kCudaManaged) {
    refuse("neither in plain CPU memory nor on a CUDA device (DLPack device type " +
           std::to_string(device.type) + ")");
  }
  if (needed == Side::host) {
    refuse((device.type == dlpack::kCuda ? "on CUDA device " : "in managed memory of CUDA device ") +
           std::to_string(device.id));
  }
  if (device.id < 0) malformed(name, std::to_string(device.id) + " for a CUDA device's number");
  return device.id;
}

// `copy` and `transpose`: how the object's library makes a contiguous copy and permutes axes.
Array from_elements(const Elements& elements, const char* copy, const char* transpose, const char* name) {
  if (!elements.contiguous) {
    refuse_strided(name, copy, dense_view(elements.shape, elements.strides, transpose, elements.stride_unit));
  }
  Array buffer;
  buffer.data = elements.data;
  buffer.dtype = elements.dtype;
  buffer.count = elements.count;
  buffer.shape = elements.shape;
  return buffer;
}

Array from_tensor(const dlpack::Tensor& tensor, Side side, const char* name) {
  const int device = device_number(tensor.device, side, name);
  Array buffer = from_elements(dlpack::read(tensor, name), "x.contiguous()", "permute", name);
  buffer.device = device;
  return buffer;
}

[[noreturn]] void not_dense(PyObject* object, Side side, const char* name) {
  const std::string why = py::str(py::error_already_set().value()).cast<std::string>();
  const std::string layout = py::str(py::getattr(object, "layout", py::str("torch.strided")));
  if (layout != "torch.strided") {
    throw TypeError(std::string("`") + name + "` is not a dense tensor (" + layout + "): pass x.to_dense()");
  }
  throw TypeError(std::string("`") + name + "` is not a dense tensor in " +
                  (side == Side::host ? "CPU" : "GPU") + " memory: " + why.substr(0, why.find('\n')));
}

Array from_exchange(const Kind& kind, PyObject* object, Side side, const char* name) {
  if (kind.uninitialized) {
    throw ValueError(std::string("`") + name +
                     "` has no elements yet: it is a parameter of a lazy module; run the module once before");
  }
  dlpack::Tensor tensor{};
  if (kind.exchange->tensor_from_object(object, &tensor) != 0) not_dense(object, side, name);
  Array buffer = from_tensor(tensor, side, name);
  buffer.in_graph = is_in_graph(kind, object);
  buffer.writable = !kind.immutable && !buffer.in_graph;
  require_computed(kind, object, buffer.dtype, name);
  return buffer;
}

Array from_dlpack_method(const Kind& kind, PyObject* object, Side side, const char* name) {
  // Only exporters on a device take `stream`, so ask for the device before the export. On the host the
  // exported tensor tells its device.
  if (side == Side::gpu) device_number(dlpack::device_of(object, name), side, name);
  dlpack::Export given = dlpack::export_of(object, side == Side::gpu, name);
  Array buffer = from_tensor(*given.tensor, side, name);
  buffer.in_graph = is_in_graph(kind, object);
  buffer.writable = !given.read_only && !given.copied && !kind.immutable && !buffer.in_graph;
  buffer.copied = given.copied;
  buffer.exported = keep_alive(std::move(given.capsule));
  if (kind.of_torch) require_computed(kind, object, buffer.dtype, name);
  return buffer;
}

Array from_interface(const Kind& kind, PyObject* object, const py::object& given, const char* name) {
  const Interface found = read_interface(object, given, name);
  Array buffer = from_elements(found.elements, "a contiguous copy", "transpose", name);
  const int number = found.device ? *found.device : device_at(buffer.data, name);
  buffer.device = device_number({dlpack::kCuda, number}, Side::gpu, name);
  buffer.writable = !found.read_only && !kind.immutable;
  buffer.exported = found.extents;
  return buffer;
}

// An object whose elements lie in another one: pycomm.Bucket.
Array from_attribute(PyObject* object, const char* name) {
  py::object inner = py::handle(object).attr("__pycomm_buffer__");
  if (PyObject_HasAttrString(inner.ptr(), "__pycomm_buffer__")) {
    throw TypeError(std::string("`") + name +
                    "`: its __pycomm_buffer__ has one as well; return an array or a tensor");
  }
  Array buffer = get_array(inner.ptr(), name);
  buffer.signature = py::handle(object).attr("__pycomm_signature__").cast<std::string>();
  if (!buffer.exported) buffer.exported = keep_alive(std::move(inner));
  return buffer;
}

Array from_protocol(PyObject* object, const char* name) {
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
  if (!PyBuffer_IsContiguous(view.get(), 'C')) refuse_strided(name, "bytearray(x)");
  Array buffer;
  buffer.data = view->buf;
  buffer.dtype = dtype_of_format(view->format, view->itemsize, name);
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

Array get_array(PyObject* object, const char* name) {
  if (PyArray_Check(object)) return from_array(reinterpret_cast<PyArrayObject*>(object), name);
  const Kind& kind = kind_of(Py_TYPE(object));
  if (kind.exchange) return from_exchange(kind, object, Side::host, name);
  if (PyObject_HasAttrString(object, "__dlpack__")) return from_dlpack_method(kind, object, Side::host, name);
  if (PyObject_HasAttrString(object, "__pycomm_buffer__")) return from_attribute(object, name);
  if (PyObject_CheckBuffer(object) && !is_number(object)) return from_protocol(object, name);
  if (!interface_of(object).is_none()) {
    const std::optional<int> device = told_device(object);
    refuse_device(name, device ? "on CUDA device " + std::to_string(*device) : "on a CUDA device");
  }
  refuse(object, name);
}

Array get_gpu_array(PyObject* object, const char* name) {
  const Kind& kind = kind_of(Py_TYPE(object));
  if (kind.exchange) return from_exchange(kind, object, Side::gpu, name);
  // Without the table, torch's tensors have an interface that lacks float8 and refuses parameters.
  const py::object interface = kind.of_torch ? py::none() : interface_of(object);
  if (!interface.is_none()) return from_interface(kind, object, interface, name);
  if (PyObject_HasAttrString(object, "__dlpack__")) return from_dlpack_method(kind, object, Side::gpu, name);
  throw TypeError(std::string("`") + name + "` is a " + Py_TYPE(object)->tp_name +
                  ": pass a CuPy array, a torch tensor on a CUDA device, or anything with "
                  "__cuda_array_interface__ or DLPack");
}

bool peek_array(PyObject* object, Array& buffer) {
  if (PyArray_Check(object)) return read_array(reinterpret_cast<PyArrayObject*>(object), buffer);
  const Kind& kind = kind_of(Py_TYPE(object));
  if (!kind.exchange) return false;
  try {
    buffer = from_exchange(kind, object, Side::host, "");
    return true;
  } catch (const TypeError&) {
  } catch (const ValueError&) {
  }
  return false;
}

std::shared_ptr<void> hold_memory(PyObject* object) {
  if (PyArray_Check(object)) {  // NumPy resizes no array that has weak references
    py::list references;
    for (PyObject* array = object; array && PyArray_Check(array);
         array = PyArray_BASE(reinterpret_cast<PyArrayObject*>(array))) {
      py::object reference = py::reinterpret_steal<py::object>(PyWeakref_NewRef(array, nullptr));
      if (!reference) throw py::error_already_set();
      references.append(std::move(reference));
    }
    return keep_alive(std::move(references));
  }
  if (PyObject_HasAttrString(object, "__pycomm_buffer__"))
    return hold_memory(py::object(py::handle(object).attr("__pycomm_buffer__")).ptr());
  if (kind_of(Py_TYPE(object)).exchange && PyObject_HasAttrString(object, "untyped_storage"))
    return keep_alive(py::handle(object).attr("untyped_storage")());
  return nullptr;
}

void require_unmoved(const Array& was, const Array& now, const char* name) {
  if (was.data == now.data && was.dtype == now.dtype && was.count == now.count) return;
  const auto text = [](const Array& b) {
    return std::to_string(b.count) + " elements of " + pycomm::name(b.dtype);
  };
  throw ValueError(std::string("`") + name + "` had " + text(was) + " when the call was bound, and has " +
                   text(now) + (was.data == now.data ? "" : " in other memory") +
                   " now: bind the call again after resize, set_ or x.data = y");
}

void require_writable(const Array& buffer, const char* name) {
  if (buffer.writable) return;
  if (buffer.copied) {
    throw ValueError(std::string("`") + name +
                     "` exports a copy of its elements, and the result would be lost in it: pass out=, or an "
                     "array of NumPy or CuPy");
  }
  if (buffer.in_graph) {
    throw ValueError(std::string("`") + name +
                     "` has a grad_fn, and autograd would not notice that it is written: pass out=, or "
                     "x.detach().clone()");
  }
  throw ValueError(std::string("`") + name +
                   "` is read-only and the result would be written to it: pass out=, or a writable copy");
}

bool overlap(const Array& a, const Array& b) {
  if (!a.data || !b.data || a.bytes() == 0 || b.bytes() == 0) return false;
  const char *at_a = static_cast<const char*>(a.data), *at_b = static_cast<const char*>(b.data);
  return at_a < at_b + b.bytes() && at_b < at_a + a.bytes();
}

Extent extent_of(const Array& buffer, size_t index) {
  const auto* begin = static_cast<const char*>(buffer.data);
  return {begin, begin + buffer.bytes(), index};
}

std::optional<std::pair<size_t, size_t>> find_overlap(std::vector<Extent> extents) {
  std::erase_if(extents, [](const Extent& extent) { return extent.begin == extent.end; });
  std::ranges::sort(extents, {}, &Extent::begin);
  // Sorted by address, an extent that overlaps a later one overlaps the next one as well.
  const auto found =
      std::ranges::adjacent_find(extents, [](const Extent& a, const Extent& b) { return b.begin < a.end; });
  if (found == extents.end()) return std::nullopt;
  return std::minmax({found[0].index, found[1].index});
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

std::optional<DType> dtype_of_numpy(PyObject* dtype) {
  return from_numpy(reinterpret_cast<PyArray_Descr*>(dtype));
}

DType dtype_from_python(PyObject* object) {
  if (PyUnicode_Check(object)) {
    return parse_dtype(text(object, "dtype"));
  }
  if (std::strcmp(Py_TYPE(object)->tp_name, "torch.dtype") == 0) {
    return parse_dtype(py::str(py::handle(object)).cast<std::string>().substr(std::strlen("torch.")));
  }
  const py::object descr = described_dtype(object);
  const auto dtype = from_numpy(reinterpret_cast<PyArray_Descr*>(descr.ptr()));
  if (!PyArray_ISNBO(reinterpret_cast<PyArray_Descr*>(descr.ptr())->byteorder)) {
    throw TypeError("dtype " + py::repr(descr).cast<std::string>() +
                    " is byte-swapped: pass its newbyteorder('=')");
  }
  if (!dtype) throw TypeError("dtype " + py::str(descr).cast<std::string>() + " cannot be communicated");
  return *dtype;
}

py::object new_array(PyObject* like, const Array& buffer, const std::vector<int64_t>& shape) {
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
