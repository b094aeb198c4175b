// pycomm._cuda: the GPU kernels, which take addresses. pycomm/cuda/ keeps the streams, and reads arrays and
// tensors through pycomm._native (bindings/array.h).
#include "kernels/cuda.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/gil.h"
#include "common/error.h"

namespace py = pybind11;

namespace pycomm::bindings {
namespace {

namespace cuda = kernels::cuda;

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
  const Unlocked unlocked;
  const cuda::DeviceGuard guard(where.device);
  call(where.launch);
}

Format parse_format(const std::string& name) {
  if (name == "raw") return Format::raw;
  if (name == "partial") return Format::partial;
  if (name == "final") return Format::final;
  if (name == "wire") return Format::wire;
  throw ValueError("format '" + name + "' is unknown; use one of raw, partial, final, wire");
}

struct Operands {
  std::vector<const void*> srcs;
  std::vector<Format> formats;
  std::vector<void*> dsts;

  Operands(const std::vector<uintptr_t>& from, const std::vector<std::string>& held,
           const std::vector<uintptr_t>& to) {
    if (held.size() != from.size()) {
      throw ValueError("`formats` has " + std::to_string(held.size()) + " entries for " +
                       std::to_string(from.size()) + " sources: pass one for each");
    }
    for (const uintptr_t src : from) srcs.push_back(pointer(src));
    for (const std::string& format : held) formats.push_back(parse_format(format));
    for (const uintptr_t dst : to) dsts.push_back(pointer(dst));
  }
};

void combine(const Where& where, const std::string& dtype, const std::string& op,
             const std::vector<uintptr_t>& srcs, const std::vector<std::string>& formats,
             const std::vector<uintptr_t>& dsts, const std::string& dst_format, size_t count, double prescale,
             double divisor) {
  const Operands operands(srcs, formats, dsts);
  const kernels::CombineArgs args{.dsts = operands.dsts.data(),
                                  .srcs = operands.srcs.data(),
                                  .src_formats = operands.formats.data(),
                                  .num_dsts = static_cast<int>(operands.dsts.size()),
                                  .num_srcs = static_cast<int>(operands.srcs.size()),
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

// ---- codecs ----

using Segments = std::vector<std::tuple<int64_t, int64_t, uint64_t>>;

// What an encode depends on besides the values. Keeps the segments that kernels::Encoding borrows.
class PyEncoding {
 public:
  PyEncoding(uint32_t step, uint32_t turn, uint32_t rank, int64_t index, const Segments& segments,
             uintptr_t residual, uintptr_t next_residual, float residual_scale) {
    for (const auto& [begin, end, id] : segments) segments_.push_back({begin, end, id});
    encoding_ = {.step = step,
                 .turn = turn,
                 .rank = rank,
                 .index = index,
                 .segments = {},
                 .residual = static_cast<const float*>(pointer(residual)),
                 .next_residual = static_cast<float*>(pointer(next_residual)),
                 .residual_scale = residual_scale};
  }
  kernels::Encoding get() const {
    kernels::Encoding encoding = encoding_;
    encoding.segments = segments_;
    return encoding;
  }

 private:
  kernels::Encoding encoding_;
  std::vector<kernels::Segment> segments_;
};

Codec make_codec(const std::string& kind, const std::string& rounding, uint64_t seed, bool ceil_scale,
                 bool hadamard) {
  return {.kind = parse_codec(kind),
          .rounding = rounding == "stochastic" ? Rounding::stochastic : Rounding::nearest,
          .ceil_scale = ceil_scale,
          .hadamard = hadamard,
          .seed = seed};
}

void transcode(const Where& where, const Codec& codec, const std::string& dtype,
               const std::vector<uintptr_t>& srcs, const std::vector<std::string>& formats,
               const std::vector<uintptr_t>& dsts, const std::string& dst_format, size_t count,
               double prescale, double divisor, const PyEncoding& encoding) {
  const Operands operands(srcs, formats, dsts);
  const kernels::TranscodeArgs args{.codec = &codec,
                                    .dtype = parse_dtype(dtype),
                                    .dsts = operands.dsts.data(),
                                    .srcs = operands.srcs.data(),
                                    .src_formats = operands.formats.data(),
                                    .num_dsts = static_cast<int>(operands.dsts.size()),
                                    .num_srcs = static_cast<int>(operands.srcs.size()),
                                    .dst_format = parse_format(dst_format),
                                    .count = count,
                                    .prescale = prescale,
                                    .divisor = divisor,
                                    .encoding = encoding.get()};
  run(where, [&](const cuda::Launch& launch) { cuda::transcode(args, launch); });
}

void shared_amax(const Where& where, const std::string& dtype, uintptr_t x, size_t count, uintptr_t amax,
                 const PyEncoding& encoding) {
  const DType type = parse_dtype(dtype);
  run(where, [&](const cuda::Launch& launch) {
    cuda::shared_amax(type, pointer(x), count, static_cast<float*>(pointer(amax)), encoding.get(), launch);
  });
}

void shared_encode(const Where& where, const std::string& dtype, uintptr_t x, size_t count, uintptr_t amax,
                   int width, int world, uint64_t seed, const PyEncoding& encoding, uintptr_t q) {
  const DType type = parse_dtype(dtype);
  const int64_t limit = kernels::shared_limit(width, world);
  run(where, [&](const cuda::Launch& launch) {
    cuda::shared_encode(type, pointer(x), count, static_cast<const float*>(pointer(amax)), width, limit, seed,
                        encoding.get(), pointer(q), launch);
  });
}

void shared_decode(const Where& where, uintptr_t q, size_t count, uintptr_t amax, int width, int world,
                   double divisor, const std::string& dtype, uintptr_t x) {
  const DType type = parse_dtype(dtype);
  const int64_t limit = kernels::shared_limit(width, world);
  run(where, [&](const cuda::Launch& launch) {
    cuda::shared_decode(pointer(q), count, static_cast<const float*>(pointer(amax)), width, limit, divisor,
                        type, pointer(x), launch);
  });
}

void topk_encode(const Where& where, const std::string& dtype, uintptr_t x, size_t count, size_t capacity,
                 uintptr_t record, uintptr_t residual, uintptr_t next_residual, float residual_scale,
                 uintptr_t workspace) {
  const kernels::TopkArgs args{.dtype = parse_dtype(dtype),
                               .x = pointer(x),
                               .count = count,
                               .capacity = capacity,
                               .record = pointer(record),
                               .residual = static_cast<const float*>(pointer(residual)),
                               .next_residual = static_cast<float*>(pointer(next_residual)),
                               .residual_scale = residual_scale};
  run(where, [&](const cuda::Launch& launch) { cuda::topk_encode(args, pointer(workspace), launch); });
}

void topk_decode_add(const Where& where, uintptr_t record, size_t capacity, uintptr_t sum, size_t count) {
  run(where, [&](const cuda::Launch& launch) {
    cuda::topk_decode_add(pointer(record), capacity, static_cast<float*>(pointer(sum)), count, launch);
  });
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
  module.doc() = "The GPU kernels of pycomm, which take addresses: see pycomm.cuda.";
  // module_local: pycomm._native has a Codec of the same C++ type.
  py::register_local_exception_translator(translate);
  py::class_<Where>(module, "Where", py::module_local())
      .def(py::init(&where), py::arg("device"), py::arg("stream"), py::arg("blocks") = 0);
  py::class_<Packing>(module, "Packing", py::module_local())
      .def(py::init<uintptr_t, const std::string&, const std::vector<Packing::Item>&>(), py::arg("bucket"),
           py::arg("dtype"), py::arg("items"))
      .def_property_readonly("workspace_bytes", &Packing::workspace_bytes)
      .def("pack", &Packing::pack, py::arg("where"), py::arg("scale"), py::arg("workspace"))
      .def("unpack", &Packing::unpack, py::arg("where"), py::arg("scale"), py::arg("workspace"));
  module.def("combine", &combine, py::arg("where"), py::arg("dtype"), py::arg("op"), py::arg("srcs"),
             py::arg("formats"), py::arg("dsts"), py::arg("dst_format"), py::arg("count"),
             py::arg("prescale"), py::arg("divisor"));
  py::class_<Codec>(module, "Codec", py::module_local())
      .def(py::init(&make_codec), py::arg("kind"), py::arg("rounding"), py::arg("seed"),
           py::arg("ceil_scale"), py::arg("hadamard"));
  py::class_<PyEncoding>(module, "Encoding", py::module_local())
      .def(py::init<uint32_t, uint32_t, uint32_t, int64_t, const Segments&, uintptr_t, uintptr_t, float>(),
           py::arg("step") = 0, py::arg("turn") = 0, py::arg("rank") = 0, py::arg("index") = 0,
           py::arg("segments") = Segments{}, py::arg("residual") = 0, py::arg("next_residual") = 0,
           py::arg("residual_scale") = 1.0f);
  module.def("transcode", &transcode, py::arg("where"), py::arg("codec"), py::arg("dtype"), py::arg("srcs"),
             py::arg("formats"), py::arg("dsts"), py::arg("dst_format"), py::arg("count"),
             py::arg("prescale"), py::arg("divisor"), py::arg("encoding"));
  module.def("shared_amax", &shared_amax, py::arg("where"), py::arg("dtype"), py::arg("x"), py::arg("count"),
             py::arg("amax"), py::arg("encoding"));
  module.def("shared_encode", &shared_encode, py::arg("where"), py::arg("dtype"), py::arg("x"),
             py::arg("count"), py::arg("amax"), py::arg("width"), py::arg("world"), py::arg("seed"),
             py::arg("encoding"), py::arg("q"));
  module.def("shared_decode", &shared_decode, py::arg("where"), py::arg("q"), py::arg("count"),
             py::arg("amax"), py::arg("width"), py::arg("world"), py::arg("divisor"), py::arg("dtype"),
             py::arg("x"));
  module.def("topk_workspace_bytes", &cuda::topk_workspace_bytes, py::arg("count"));
  module.def("topk_encode", &topk_encode, py::arg("where"), py::arg("dtype"), py::arg("x"), py::arg("count"),
             py::arg("capacity"), py::arg("record"), py::arg("residual"), py::arg("next_residual"),
             py::arg("residual_scale"), py::arg("workspace"));
  module.def("topk_decode_add", &topk_decode_add, py::arg("where"), py::arg("record"), py::arg("capacity"),
             py::arg("sum"), py::arg("count"));
  module.def("read_stats", &read_stats, py::arg("where"), py::arg("workspace"));
  module.def(
      "device_of",
      [](uintptr_t address, const std::string& what) {
        return cuda::device_of(pointer(address), what.c_str());
      },
      py::arg("address"), py::arg("what"));
  module.def("device_count", [] {
    const char* reason = "";
    const int count = cuda::device_count(&reason);
    return py::make_tuple(count, std::string(reason));
  });
  module.def(
      "versions", [] { return py::make_tuple(cuda::runtime_version(), cuda::driver_version()); },
      "The versions of the CUDA runtime of this build and of the driver, which is 0 if there is none.");
}

}  // namespace pycomm::bindings
