// What Python objects hold: a contiguous run of elements, on the host or on a GPU. This is the one reader, of
// all modules and both kinds of memory, so that what is refused, and in which words, is the same everywhere.
//
// On the host the elements come, in this order, from NumPy's C API (with ml_dtypes' types by name), the
// DLPack exchange table of the object's type (torch), `__dlpack__`, the attribute `__pycomm_buffer__` of one
// that has its elements in another (pycomm.Bucket), or the buffer protocol. On a GPU they come from the
// exchange table, `__cuda_array_interface__` or `__dlpack__`. No stream is synchronised with another there:
// which one a call runs on is its caller's business (pycomm/cuda/arrays.py).
//
// The reader is in pycomm._native alone. pycomm._cuda gets addresses from Python, so it needs neither NumPy
// nor a second copy of all this. What only CUDA knows, the device that an address belongs to, is asked of it
// by way of Python, and only where the object does not say it.
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

inline constexpr int kHost = -1;  // a device

struct Array {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t count = 0;               // elements
  std::span<const int64_t> shape;  // the object's own: valid while it lives and keeps its shape
  bool writable = true;
  bool copied = false;    // by whoever exported it: what is written to it is lost
  bool in_graph = false;  // of autograd's
  int device = kHost;     // or a CUDA device's number
  std::shared_ptr<void>
      exported;           // keeps what a protocol handed out; the object itself is kept by the caller
  std::string signature;  // what ranks compare besides, of an object that has its elements in another

  int64_t rows() const { return shape.empty() ? 1 : shape[0]; }
  int64_t row_elements() const {  // of a buffer without rows as well
    int64_t product = 1;
    for (size_t axis = 1; axis < shape.size(); ++axis) product *= shape[axis];
    return product;
  }
  int64_t bytes() const { return count * static_cast<int64_t>(size_of(dtype)); }
};

// `name` is the argument's, for messages. Throws TypeError (no buffer, an unknown type, on a GPU) or
// ValueError (strided, byte-swapped) that says what to do.
Array get_array(PyObject* object, const char* name);
// The same for what is on a GPU, and for that alone. Managed memory is on the device that it belongs to.
Array get_gpu_array(PyObject* object, const char* name);
// get_array for arrays and tensors, which hand out nothing that must be kept; nothing for other objects, and
// where get_array would throw.
bool peek_array(PyObject* object, Array& buffer);
void require_writable(const Array& buffer, const char* name);

// What keeps an object's memory in its place while a call is under way, besides the object and Array's
// `exported`: torch's storage, which x.data = y and x.set_() drop, and of a NumPy array a weak reference,
// with which NumPy refuses to resize it. Null where there is nothing to hold. Nothing holds off torch's
// resize_.
std::shared_ptr<void> hold_memory(PyObject* object);
// Throws ValueError if the object of a bound call has other memory than it `was` bound to.
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

// An array like `like` (a NumPy array, or a tensor where `like` is one) of this shape, not initialised.
pybind11::object new_array(PyObject* like, const Array& buffer, const std::vector<int64_t>& shape);
// NumPy's dtype of this name, ml_dtypes' included. Throws TypeError if ml_dtypes is needed and missing.
pybind11::object numpy_dtype(DType dtype);
std::optional<DType> dtype_of_numpy(PyObject* dtype);  // of NumPy's own object, in either byte order
DType dtype_from_python(PyObject* object);             // a name, a NumPy dtype or a scalar type
std::string shape_text(std::span<const int64_t> shape);

void import_numpy();

}  // namespace pycomm::bindings
