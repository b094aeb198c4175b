#include "bindings/shared_arrays.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "bindings/numpy.h"
#include "transport/arena.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

using transport::Arena;

constexpr size_t kLarge = 64 << 10;  // what is smaller gains nothing by it

const PyDataMemAllocator* numpys = nullptr;  // for all that lies in no arena

// ---- NumPy's handler of memory. Arrays of it outlive the interpreter, and so does it. It takes no lock of
// Python's, and throws nothing.

void* allocate(size_t bytes, bool zeroed) {
  Arena* const arena = bytes >= kLarge ? Arena::if_any() : nullptr;
  if (!arena) return nullptr;
  try {
    return arena->allocate(static_cast<int64_t>(bytes), zeroed);
  } catch (const std::exception&) {
    return nullptr;
  }
}

void* array_malloc(void* /*ctx*/, size_t bytes) {
  void* const block = allocate(bytes, false);
  return block ? block : numpys->malloc(numpys->ctx, bytes);
}

void* array_calloc(void* /*ctx*/, size_t count, size_t size) {
  size_t bytes = 0;
  void* const block = __builtin_mul_overflow(count, size, &bytes) ? nullptr : allocate(bytes, true);
  return block ? block : numpys->calloc(numpys->ctx, count, size);
}

void array_free(void* /*ctx*/, void* data, size_t bytes) {
  Arena* const arena = Arena::at(data);
  if (!arena) return numpys->free(numpys->ctx, data, bytes);
  try {
    arena->free(data);
  } catch (const std::exception&) {  // it stays taken
  }
}

// An array stays where it began, in an arena or not, as long as it is large enough for that.
void* array_realloc(void* /*ctx*/, void* data, size_t bytes) {
  Arena* const arena = Arena::at(data);
  if (!arena) return numpys->realloc(numpys->ctx, data, bytes);
  const auto there = static_cast<size_t>(arena->bytes_of(data));
  if (bytes >= kLarge && bytes <= there && bytes >= there / 2) return data;
  void* const other = array_malloc(nullptr, bytes);
  if (!other) return nullptr;
  std::memcpy(other, data, std::min(bytes, there));
  array_free(nullptr, data, there);
  return other;
}

PyDataMem_Handler handler = {
    "pycomm_shared_arrays", 1, {nullptr, array_malloc, array_calloc, array_realloc, array_free}};
PyObject* capsule = nullptr;  // of it, never dropped

int import_array_api() {
  import_array1(-1);
  return 0;
}

py::object set_handler(PyObject* next) {
  auto before = py::reinterpret_steal<py::object>(PyDataMem_SetHandler(next));
  if (!before) throw py::error_already_set();
  return before;
}

// From when it is made until end(), or its own, for this thread's context.
class SharedArrays {
 public:
  SharedArrays() {
    Arena::of_process();
    before_ = set_handler(capsule);
  }
  SharedArrays(const SharedArrays&) = delete;
  ~SharedArrays() {
    try {
      end();
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("pycomm.shared_arrays");
    }
  }
  void end() {
    if (const py::object before = std::exchange(before_, {})) set_handler(before.ptr());
  }

 private:
  py::object before_;
};

bool makes_shared_arrays() {
  const auto current = py::reinterpret_steal<py::object>(PyDataMem_GetHandler());
  if (!current) throw py::error_already_set();
  return current.ptr() == capsule;
}

bool is_shared_array(const py::object& array) {
  if (!PyArray_Check(array.ptr())) return false;
  const Arena* const arena = Arena::at(PyArray_DATA(reinterpret_cast<PyArrayObject*>(array.ptr())));
  return arena && !arena->inherited();
}

}  // namespace

void add_shared_arrays(py::module_& module) {
  if (import_array_api() != 0) throw py::error_already_set();
  auto* const own =
      static_cast<PyDataMem_Handler*>(PyCapsule_GetPointer(PyDataMem_DefaultHandler, "mem_handler"));
  if (!own) throw py::error_already_set();
  numpys = &own->allocator;
  capsule = PyCapsule_New(&handler, "mem_handler", nullptr);
  if (!capsule) throw py::error_already_set();
  py::class_<SharedArrays>(module, "SharedArrays",
                           "Large arrays of NumPy's lie in shared memory from when this is made until end().")
      .def(py::init<>())
      .def("end", &SharedArrays::end, "NumPy allocates again as it did before.");
  module.def("makes_shared_arrays", &makes_shared_arrays,
             "Whether large arrays made now, in this thread's context, lie in shared memory.");
  module.def("is_shared_array", &is_shared_array, py::arg("array"),
             "Whether an array lies in this process's shared memory.");
}

}  // namespace pycomm::bindings
