// Reads buffers: the contiguous elements of a Python object, on the host or on a GPU. Everything that takes
// buffers reads them here, so that the same objects are refused everywhere, in the same words.
//
// On the host the elements come, in this order, from NumPy's C API (with ml_dtypes' types by name), the
// DLPack exchange table of the object's type (torch), `__dlpack__`, the attribute `__pycomm_buffer__` of an
// object whose elements lie in another one (pycomm.Bucket), or the buffer protocol. On a GPU they come from
// the exchange table, `__cuda_array_interface__` or `__dlpack__`. The reader synchronises no streams: its
// callers choose the stream of a call (pycomm/cuda/arrays.py).
//
// Only pycomm._native has the reader. Python passes addresses to pycomm._cuda, which needs neither NumPy
// nor a second copy of this code. If an object does not say which device it is on, the reader asks CUDA for
// the device of the address, through Python.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "common/dtype.h"

namespace pycomm::bindings {

inline constexpr int kHost = -1;  // Array's `device` on the host

struct Array {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t count = 0;               // elements
  std::span<const int64_t> shape;  // the object's own: valid while it lives and keeps its shape
  bool writable = true;
  bool copied = false;    // the exporter has made a copy: what is written to it is lost
  bool in_graph = false;  // computed by autograd from other tensors
  int device = kHost;     // or the number of a CUDA device
  // Keeps what a protocol exported. The caller keeps the object itself.
  std::shared_ptr<void> exported;
  std::string signature;  // of an object with `__pycomm_buffer__`: ranks compare it as a part of the tag

  // A buffer without axes is one row of one element.
  int64_t rows() const { return shape.empty() ? 1 : shape[0]; }
  int64_t row_elements() const {
    int64_t product = 1;
    for (size_t axis = 1; axis < shape.size(); ++axis) product *= shape[axis];
    return product;
  }
  int64_t bytes() const { return count * static_cast<int64_t>(size_of(dtype)); }
};

// `name` is the argument's name, for messages. Throws TypeError (no buffer, an unknown element type, on a
// GPU) or ValueError (strided, byte-swapped), which say what to do.
Array get_array(PyObject* object, const char* name);
// The same for a buffer on a GPU; throws TypeError for others. Managed memory counts as memory of its device.
Array get_gpu_array(PyObject* object, const char* name);
// A quick get_array for NumPy's arrays and for tensors with an exchange table, which export nothing that must
// be kept. False for other objects, and where get_array would throw TypeError or ValueError.
bool peek_array(PyObject* object, Array& buffer);
void require_writable(const Array& buffer, const char* name);

// Keeps an object's memory in its place while a call is under way; the caller keeps the object and Array's
// `exported`. For a tensor this is torch's storage, which x.data = y and x.set_() would drop. For a NumPy
// array it is a weak reference, with which NumPy refuses to resize the array. Null for other objects.
// Nothing prevents torch's resize_.
std::shared_ptr<void> hold_memory(PyObject* object);
// Throws ValueError if an object has other memory `now` than it had (`was`) when its call was bound.
void require_unmoved(const Array& was, const Array& now, const char* name);

// Whether two buffers share memory.
bool overlap(const Array& a, const Array& b);
// The memory of one buffer among several.
struct Extent {
  const char *begin, *end;
  size_t index;
};
Extent extent_of(const Array& buffer, size_t index);
// The indices of two of these that share memory, in ascending order.
std::optional<std::pair<size_t, size_t>> find_overlap(std::vector<Extent> extents);

// A new array of this shape, with elements of any value: a tensor if `like` is one, else a NumPy array.
pybind11::object new_array(PyObject* like, const Array& buffer, const std::vector<int64_t>& shape);
// NumPy's dtype, or that of ml_dtypes. Throws TypeError if ml_dtypes is needed and not installed.
pybind11::object numpy_dtype(DType dtype);
std::optional<DType> dtype_of_numpy(PyObject* dtype);  // a numpy.dtype, in either byte order
DType dtype_from_python(PyObject* object);  // a name, a torch dtype, or what NumPy takes for a dtype
std::string shape_text(std::span<const int64_t> shape);

void import_numpy();

}  // namespace pycomm::bindings
