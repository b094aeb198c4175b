// pycomm._cuda: the GPU kernels, on addresses. pycomm/cuda.py knows arrays, tensors and streams.
#include "kernels/cuda.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/error.h"

namespace py = pybind11;

namespace pycomm::bindings {
namespace {

namespace cuda = kernels::cuda;
using kernels::Format;

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// Where and how a call runs: (device, stream, blocks).
struct Where {
  int device;
  cuda::Launch launch;
};

Where where(int device, uintptr_t stream, int blocks) {
  return {device, {.stream = pointer(stream), .blocks = blocks}};
}

template <class F>
void run(const Where& where, F call) {
  const py::gil_scoped_release release;
  const cuda::DeviceGuard guard(where.device);
  call(where.launch);
}

Format parse_format(const std::string& name) {
  if (name == "raw") return Format::raw;
  if (name == "partial") return Format::partial;
  if (name == "final") return Format::final;
  throw ValueError("format '" + name + "' is unknown; use one of raw, partial, final");
}

void combine(const Where& where, const std::string& dtype, const std::string& op,
             const std::vector<uintptr_t>& srcs, const std::vector<std::string>& formats,
             const std::vector<uintptr_t>& dsts, const std::string& dst_format, size_t count, double prescale,
             double divisor) {
  std::vector<const void*> from;
  std::vector<void*> to;
  std::vector<Format> held;
  for (const uintptr_t src : srcs) from.push_back(pointer(src));
  for (const uintptr_t dst : dsts) to.push_back(pointer(dst));
  for (const std::string& format : formats) held.push_back(parse_format(format));
  if (held.size() != from.size()) throw ValueError("one format for each source is needed");
  const kernels::CombineArgs args{.dsts = to.data(),
                                  .srcs = from.data(),
                                  .src_formats = held.data(),
                                  .num_dsts = static_cast<int>(to.size()),
                                  .num_srcs = static_cast<int>(from.size()),
                                  .dst_format = parse_format(dst_format),
                                  .count = count,
                                  .prescale = prescale,
                                  .divisor = divisor};
  const DType type = parse_dtype(dtype);
  const Op parsed = parse_op(op);
  run(where, [&](const cuda::Launch& launch) { cuda::combine(type, parsed, args, launch); });
}

// A list of tensors and the bucket they go into.
class Packing {
 public:
  using Item = std::tuple<uintptr_t, std::string, int64_t, int64_t>;

  Packing(uintptr_t bucket, const std::string& dtype, const std::vector<Item>& items)
      : bucket_(pointer(bucket)), dtype_(parse_dtype(dtype)) {
    for (const auto& [address, type, count, offset] : items) {
      items_.push_back({pointer(address), parse_dtype(type), count, offset});
    }
  }
  int64_t workspace_bytes() const { return cuda::stats_workspace_bytes(items_); }
  void pack(const Where& where, double scale, uintptr_t workspace) const {
    run(where, [&](const cuda::Launch& launch) { cuda::pack(args(scale), pointer(workspace), launch); });
  }
  void unpack(const Where& where, double scale, uintptr_t workspace) const {
    run(where, [&](const cuda::Launch& launch) { cuda::unpack(args(scale), pointer(workspace), launch); });
  }

 private:
  kernels::PackArgs args(double scale) const {
    return {.items = items_, .bucket = bucket_, .dtype = dtype_, .scale = scale};
  }

  std::vector<kernels::PackItem> items_;
  void* bucket_;
  DType dtype_;
};

py::tuple read_stats(const Where& where, uintptr_t workspace) {
  kernels::Stats stats;
  run(where, [&](const cuda::Launch& launch) { stats = cuda::read_stats(pointer(workspace), launch); });
  return py::make_tuple(stats.sum_squares, stats.max_abs, stats.nans, stats.infs);
}

void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const TypeError& e) {
    PyErr_SetString(PyExc_TypeError, e.what());
  } catch (const ValueError& e) {
    PyErr_SetString(PyExc_ValueError, e.what());
  }
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The GPU kernels of pycomm, on addresses: see pycomm.cuda.";
  py::register_local_exception_translator(translate);
  py::class_<Where>(module, "Where")
      .def(py::init(&where), py::arg("device"), py::arg("stream"), py::arg("blocks") = 0);
  py::class_<Packing>(module, "Packing")
      .def(py::init<uintptr_t, const std::string&, const std::vector<Packing::Item>&>(), py::arg("bucket"),
           py::arg("dtype"), py::arg("items"))
      .def_property_readonly("workspace_bytes", &Packing::workspace_bytes)
      .def("pack", &Packing::pack, py::arg("where"), py::arg("scale"), py::arg("workspace"))
      .def("unpack", &Packing::unpack, py::arg("where"), py::arg("scale"), py::arg("workspace"));
  module.def("combine", &combine, py::arg("where"), py::arg("dtype"), py::arg("op"), py::arg("srcs"),
             py::arg("formats"), py::arg("dsts"), py::arg("dst_format"), py::arg("count"),
             py::arg("prescale"), py::arg("divisor"));
  module.def("read_stats", &read_stats, py::arg("where"), py::arg("workspace"));
  module.def("device_of", [](uintptr_t address) { return cuda::device_of(pointer(address), "x"); });
  module.def("device_count", [] {
    const char* reason = "";
    const int count = cuda::device_count(&reason);
    return py::make_tuple(count, std::string(reason));
  });
  module.def(
      "versions", [] { return py::make_tuple(cuda::runtime_version(), cuda::driver_version()); },
      "Of the CUDA runtime that this was built with, and of the driver (0: none).");
}

}  // namespace pycomm::bindings
