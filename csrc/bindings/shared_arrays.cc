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

constexpr size_t kLarge = 64 << 10;  // smaller arrays gain nothing

const PyDataMemAllocator* plain = nullptr;  // NumPy's own, for memory outside of the arena

// ---- the handler that NumPy calls. It outlives the interpreter, as its arrays may. It takes no lock of
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
  return block ? block : plain->malloc(plain->ctx, bytes);
}

void* array_calloc(void* /*ctx*/, size_t count, size_t size) {
  size_t bytes = 0;
  void* const block = __builtin_mul_overflow(count, size, &bytes) ? nullptr : allocate(bytes, true);
  return block ? block : plain->calloc(plain->ctx, count, size);
}

void array_free(void* /*ctx*/, void* data, size_t bytes) {
  Arena* const arena = Arena::at(data);
  if (!arena) return plain->free(plain->ctx, data, bytes);
  try {
    arena->free(data);
  } catch (const std::exception&) {  // the block stays allocated
  }
}

// An array in plain memory stays there. One in an arena keeps its block if it is still large and fills at
// least half of the block; else it moves.
void* array_realloc(void* /*ctx*/, void* data, size_t bytes) {
  Arena* const arena = Arena::at(data);
  if (!arena) return plain->realloc(plain->ctx, data, bytes);
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
PyObject* capsule = nullptr;  // of the handler, never dropped

int import_array_api() {
  import_array1(-1);
  return 0;
}

py::object set_handler(PyObject* next) {
  auto before = py::reinterpret_steal<py::object>(PyDataMem_SetHandler(next));
  if (!before) throw py::error_already_set();
  return before;
}

// Sets the handler in this thread's context until end(), or until it is destroyed.
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
  plain = &own->allocator;
  capsule = PyCapsule_New(&handler, "mem_handler", nullptr);
  if (!capsule) throw py::error_already_set();
  py::class_<SharedArrays>(
      module, "SharedArrays",
      "NumPy's large arrays lie in shared memory if they are made while this lives, up to end().")
      .def(py::init<>())
      .def("end", &SharedArrays::end, "Lets NumPy allocate as it did before.");
  module.def("makes_shared_arrays", &makes_shared_arrays,
             "Whether large arrays made now, in this thread's context, lie in shared memory.");
  module.def("is_shared_array", &is_shared_array, py::arg("array"),
             "Whether an array lies in this process's shared memory.");
}

}  // namespace pycomm::bindings
