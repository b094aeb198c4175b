// pycomm._native.Array: a buffer as Python code (pycomm.Bucket, pycomm.cuda) has to know it.
#include <pybind11/typing.h>

#include <cstdint>
#include <string>
#include <utility>

#include "bindings/array.h"
#include "bindings/python.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

using Shape = py::typing::Tuple<int, py::ellipsis>;

struct Described {
  Array array;
  py::tuple shape;  // a copy: the object's own may change

  explicit Described(Array read) : array(std::move(read)), shape(array.shape.size()) {
    for (size_t d = 0; d < array.shape.size(); ++d) shape[d] = array.shape[d];
    array.shape = {};
  }
};

}  // namespace

void add_arrays(py::module_& module) {
  py::class_<Described>(
      module, "Array",
      "Where the elements of an array or tensor are, and of which type: valid while that object lives.")
      .def_property_readonly(
          "address", [](const Described& self) { return reinterpret_cast<uintptr_t>(self.array.data); })
      .def_property_readonly("dtype",
                             [](const Described& self) { return std::string(name(self.array.dtype)); })
      .def_property_readonly("count", [](const Described& self) { return self.array.count; })
      .def_property_readonly("shape", [](const Described& self) { return Shape(self.shape); })
      .def_property_readonly(
          "device", [](const Described& self) { return self.array.device; },
          "The number of a CUDA device, or -1 for the host.")
      .def_property_readonly("writable", [](const Described& self) { return self.array.writable; })
      .def(
          "require_writable",
          [](const Described& self, const std::string& what) { require_writable(self.array, what.c_str()); },
          py::arg("what"),
          "Raises ValueError if the elements are read-only, or a copy in which a result would be lost.");
  module.def(
      "describe_buffer",
      [](const py::object& x, const std::string& what, bool on_gpu) {
        return Described((on_gpu ? get_gpu_array : get_array)(x.ptr(), what.c_str()));
      },
      py::arg("x"), py::arg("what"), py::arg("on_gpu") = false,
      "Reads the buffer `x`, on the CPU or, if `on_gpu`, on a GPU. `what` is its name in messages. Raises "
      "TypeError or ValueError if it cannot be communicated.");
}

}  // namespace pycomm::bindings
