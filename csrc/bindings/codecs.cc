#include "bindings/codecs.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <memory>
#include <optional>
#include <string>

#include "bindings/array.h"
#include "bindings/gil.h"
#include "common/caches.h"
#include "common/error.h"
#include "kernels/lossless.h"
#include "kernels/topk.h"
#include "schedule/plan.h"

namespace py = pybind11;

namespace pycomm::bindings {
using kernels::Segment;

namespace {

Codec make_codec(const std::string& kind, const std::string& rounding, uint64_t seed, bool ceil_scale,
                 bool hadamard, const std::string& links) {
  Codec codec;
  codec.kind = parse_codec(kind);
  if (rounding != "nearest" && rounding != "stochastic") {
    throw ValueError("`rounding` is \"" + rounding + "\": pass nearest or stochastic");
  }
  codec.rounding = rounding == "nearest" ? Rounding::nearest : Rounding::stochastic;
  codec.seed = seed;
  codec.ceil_scale = ceil_scale;
  codec.hadamard = hadamard;
  if (links != "all" && links != "wire") throw ValueError("`links` is \"" + links + "\": pass all or wire");
  codec.links = links == "all" ? Links::all : Links::wire;
  if (codec.kind == CodecKind::sign && codec.rounding == Rounding::stochastic) {
    throw ValueError("sign has nothing to round: leave `rounding` at nearest");
  }
  if (ceil_scale && codec.kind != CodecKind::mxfp8) {
    throw ValueError("`ceil_scale` is an option of mxfp8: leave it out for " + kind);
  }
  if (hadamard && codec.kind != CodecKind::int4) {
    throw ValueError("`hadamard` is an option of int4: leave it out for " + kind);
  }
  return codec;
}

// The array to write bytes to: `out`, or a new one.
py::object bytes_for(const py::object& out, int64_t bytes) {
  if (out.is_none()) return py::array_t<uint8_t>(bytes);
  const Array buffer = get_array(out.ptr(), "out");
  require_writable(buffer, "out");
  if (buffer.bytes() != bytes) {
    throw ValueError("`out` has " + std::to_string(buffer.bytes()) + " bytes: " + std::to_string(bytes) +
                     " are needed");
  }
  return out;
}

// The two residuals of `count` elements, float32, both or neither (None).
struct ResidualArrays {
  const float* now = nullptr;
  float* next = nullptr;
  float scale = 1;
};
ResidualArrays parse_residuals(const py::object& residual, const py::object& next_residual,
                               double residual_scale, int64_t count) {
  if (residual.is_none() != next_residual.is_none()) {
    throw ValueError("`residual` and `next_residual` go together: pass both, or neither");
  }
  if (residual.is_none()) return {};
  const auto read = [&](const py::object& object, const char* name) {
    const Array buffer = get_array(object.ptr(), name);
    if (buffer.dtype != DType::float32) {
      throw TypeError(std::string("`") + name + "` is " + pycomm::name(buffer.dtype) +
                      ": residuals are float32");
    }
    if (buffer.count != count) {
      throw ValueError(std::string("`") + name + "` has " + std::to_string(buffer.count) +
                       " elements, `x` has " + std::to_string(count));
    }
    return buffer;
  };
  const Array now = read(residual, "residual"), next = read(next_residual, "next_residual");
  require_writable(next, "next_residual");
  const auto scale = static_cast<float>(residual_scale);
  if (!(scale > 0) || std::isinf(scale)) {
    throw ValueError("`residual_scale` is " + std::to_string(residual_scale) + ": pass a positive number");
  }
  return {static_cast<const float*>(now.data), static_cast<float*>(next.data), scale};
}

py::object encode(const Codec& codec, const py::object& x, const py::object& out, uint32_t step,
                  uint32_t turn, uint32_t rank, const py::object& segments, const py::object& residual,
                  const py::object& next_residual, double residual_scale,
                  const std::optional<std::string>& isa) {
  const Array from = get_array(x.ptr(), "x");
  require_codec_dtype(from.dtype, "x");
  const std::vector<Segment> parsed = parse_segments(segments);
  const ResidualArrays residuals = parse_residuals(residual, next_residual, residual_scale, from.count);
  py::object wire = bytes_for(out, wire_bytes(codec.kind, from.count));
  const Array to = get_array(wire.ptr(), "out");
  void* const dst = to.data;
  const void* const src = from.data;
  const Format format = Format::raw;
  const kernels::Isa& chosen = isa_argument(isa);
  const Unlocked unlocked;
  kernels::transcode({.codec = &codec,
                      .dtype = from.dtype,
                      .dsts = &dst,
                      .srcs = &src,
                      .src_formats = &format,
                      .num_dsts = 1,
                      .num_srcs = 1,
                      .dst_format = Format::wire,
                      .count = static_cast<size_t>(from.count),
                      .encoding = {.step = step,
                                   .turn = turn,
                                   .rank = rank,
                                   .segments = parsed,
                                   .residual = residuals.now,
                                   .next_residual = residuals.next,
                                   .residual_scale = residuals.scale}},
                     chosen);
  return wire;
}

void decode(const Codec& codec, const py::object& wire, const py::object& out, bool add,
            const std::optional<std::string>& isa) {
  const Array from = get_array(wire.ptr(), "wire");
  const Array to = get_array(out.ptr(), "out");
  require_codec_dtype(to.dtype, "out");
  require_writable(to, "out");
  if (add && to.dtype != DType::float32) {
    throw TypeError(std::string("`out` is ") + name(to.dtype) + ": sums are float32");
  }
  const int64_t bytes = wire_bytes(codec.kind, to.count);
  if (from.bytes() != bytes) {
    throw ValueError("`wire` has " + std::to_string(from.bytes()) + " bytes: " + std::to_string(to.count) +
                     " elements of " + pycomm::name(codec.kind) + " take " + std::to_string(bytes));
  }
  void* const dst = to.data;
  const void* const srcs[2] = {add ? to.data : from.data, from.data};
  const Format formats[2] = {add ? Format::raw : Format::wire, Format::wire};
  const kernels::Isa& chosen = isa_argument(isa);
  const Unlocked unlocked;
  kernels::transcode({.codec = &codec,
                      .dtype = to.dtype,
                      .dsts = &dst,
                      .srcs = srcs,
                      .src_formats = formats,
                      .num_dsts = 1,
                      .num_srcs = add ? 2 : 1,
                      .dst_format = Format::final,
                      .stream = !add && to.bytes() >= past_cache_bytes(1),
                      .count = static_cast<size_t>(to.count)},
                     chosen);
}

py::object topk_encode(const py::object& x, int64_t k, const py::object& out, const py::object& residual,
                       const py::object& next_residual, double residual_scale,
                       const std::optional<std::string>& isa) {
  const Array from = get_array(x.ptr(), "x");
  require_codec_dtype(from.dtype, "x");
  require_topk(k, from.count);
  const ResidualArrays residuals = parse_residuals(residual, next_residual, residual_scale, from.count);
  py::object record = bytes_for(out, kernels::topk_record_bytes(k));
  const Array to = get_array(record.ptr(), "out");
  const kernels::Isa& chosen = isa_argument(isa);
  const Unlocked unlocked;
  kernels::topk_encode({.dtype = from.dtype,
                        .x = from.data,
                        .count = static_cast<size_t>(from.count),
                        .capacity = static_cast<size_t>(k),
                        .record = to.data,
                        .residual = residuals.now,
                        .next_residual = residuals.next,
                        .residual_scale = residuals.scale},
                       chosen);
  return record;
}

void topk_decode_add(const py::object& record, int64_t k, const py::object& sum) {
  const Array from = get_array(record.ptr(), "record");
  const Array to = get_array(sum.ptr(), "sum");
  if (to.dtype != DType::float32) {
    throw TypeError(std::string("`sum` is ") + name(to.dtype) + ": sums are float32");
  }
  require_writable(to, "sum");
  require_topk(k, to.count);
  if (from.bytes() != kernels::topk_record_bytes(k)) {
    throw ValueError("`record` has " + std::to_string(from.bytes()) + " bytes; k=" + std::to_string(k) +
                     " needs " + std::to_string(kernels::topk_record_bytes(k)));
  }
  const Unlocked unlocked;
  kernels::topk_decode_add(from.data, static_cast<size_t>(k), static_cast<float*>(to.data),
                           static_cast<size_t>(to.count));
}

// The buffer of elements that codec lossless encodes or decodes.
Array lossless_buffer(const py::object& object, const char* name) {
  const Array buffer = get_array(object.ptr(), name);
  if (buffer.dtype == DType::bfloat16) return buffer;
  throw TypeError(std::string("`") + name + "` is " + pycomm::name(buffer.dtype) +
                  ": codec lossless is for bfloat16");
}

int64_t lossless_encode(const py::object& x, const py::object& wire) {
  const Array from = lossless_buffer(x, "x"), to = get_array(wire.ptr(), "wire");
  require_writable(to, "wire");
  const int64_t bound = kernels::lossless_bound(from.count);
  if (to.bytes() < bound) {
    throw ValueError("`wire` has " + std::to_string(to.bytes()) + " bytes: " + std::to_string(from.count) +
                     " elements may take " + std::to_string(bound));
  }
  const Unlocked unlocked;
  return static_cast<int64_t>(kernels::lossless_encode(from.data, static_cast<size_t>(from.count), to.data));
}

int64_t lossless_decode(const py::object& wire, const py::object& out) {
  const Array from = get_array(wire.ptr(), "wire"), to = lossless_buffer(out, "out");
  require_writable(to, "out");
  const Unlocked unlocked;
  return static_cast<int64_t>(kernels::lossless_decode(from.data, static_cast<size_t>(from.bytes()), to.data,
                                                       static_cast<size_t>(to.count)));
}

}  // namespace

const kernels::Isa& isa_argument(const std::optional<std::string>& name) {
  if (!name) return kernels::chosen_isa();
  if (const kernels::Isa* isa = kernels::find_isa(*name)) return *isa;
  throw ValueError("`isa` is \"" + *name + "\", which this machine does not have: see available_isas()");
}

void require_topk(int64_t k, int64_t count) {
  if (k < 0 || k >> 32) throw ValueError("`k` is " + std::to_string(k) + ": pass a count below 2^32");
  if (count >> 32) {
    throw ValueError("top-k of " + std::to_string(count) +
                     " elements: 2^32 - 1 at most, since indices have 32 bits");
  }
}

std::vector<Segment> parse_segments(const py::object& segments) {
  std::vector<Segment> parsed;
  if (segments.is_none()) return parsed;
  int64_t end = 0;
  for (const py::handle item : segments) {
    const auto [begin, stop, id] = py::cast<std::tuple<int64_t, int64_t, uint64_t>>(item);
    const std::string what = "`segments` has (" + std::to_string(begin) + ", " + std::to_string(stop) + ", " +
                             std::to_string(id) + "): ";
    if (begin % kSegmentAlign != 0) {
      throw ValueError(what + "a tensor begins at a multiple of " + std::to_string(kSegmentAlign));
    }
    if (begin < end || stop < begin) throw ValueError(what + "tensors are in order and do not overlap");
    if (id >> 24) throw ValueError(what + "a tensor's id is below 2^24");
    parsed.push_back({begin, stop, id});
    end = stop;
  }
  return parsed;
}

void require_codec_dtype(DType dtype, const char* name) {
  if (schedule::takes_codec(dtype)) return;
  throw TypeError(std::string("`") + name + "` is " + pycomm::name(dtype) +
                  ": codecs carry float32, float16 and bfloat16; convert it");
}

void add_codecs(py::module_& module) {
  py::class_<Codec>(module, "Codec", "A gradient compressor as plans and kernels know it: see pycomm.codecs.")
      .def(py::init(&make_codec), py::arg("kind"), py::kw_only(), py::arg("rounding") = "nearest",
           py::arg("seed") = 0, py::arg("ceil_scale") = false, py::arg("hadamard") = false,
           py::arg("links") = "all")
      .def_property_readonly("kind", [](const Codec& self) { return pycomm::name(self.kind); })
      .def_property_readonly(
          "rounding",
          [](const Codec& self) { return self.rounding == Rounding::nearest ? "nearest" : "stochastic"; })
      .def_readonly("seed", &Codec::seed)
      .def_readonly("ceil_scale", &Codec::ceil_scale)
      .def_readonly("hadamard", &Codec::hadamard)
      .def_property_readonly("links",
                             [](const Codec& self) { return self.links == Links::all ? "all" : "wire"; })
      .def(
          "wire_bytes",
          [](const Codec& self, int64_t count) {
            if (count < 0) throw ValueError("`count` is " + std::to_string(count) + ": pass 0 or more");
            return wire_bytes(self.kind, count);
          },
          py::arg("count"), "The bytes that `count` elements take on the wire.");
  module.def("encode", &encode, py::arg("codec"), py::arg("x"), py::kw_only(), py::arg("out") = py::none(),
             py::arg("step") = 0, py::arg("turn") = 0, py::arg("rank") = 0, py::arg("segments") = py::none(),
             py::arg("residual") = py::none(), py::arg("next_residual") = py::none(),
             py::arg("residual_scale") = 1.0, py::arg("isa") = py::none(),
             "Returns `x` as wire bytes. With residuals it encodes x + residual_scale * residual, and writes "
             "the error to `next_residual`.");
  module.def("decode", &decode, py::arg("codec"), py::arg("wire"), py::arg("out"), py::kw_only(),
             py::arg("add") = false, py::arg("isa") = py::none(),
             "Decodes wire bytes into `out`; with `add`, adds them to it.");
  module.def("topk_encode", &topk_encode, py::arg("x"), py::arg("k"), py::kw_only(),
             py::arg("out") = py::none(), py::arg("residual") = py::none(),
             py::arg("next_residual") = py::none(), py::arg("residual_scale") = 1.0,
             py::arg("isa") = py::none(),
             "Returns the record of the k largest magnitudes of `x`. With residuals it takes those of x + "
             "residual_scale * residual, and writes what it leaves out to `next_residual`.");
  module.def("topk_decode_add", &topk_decode_add, py::arg("record"), py::arg("k"), py::arg("sum"),
             "Adds a record's entries to `sum`.");
  module.def("lossless_bound", &kernels::lossless_bound, py::arg("count"),
             "The most bytes that `count` elements of bfloat16 take under codec lossless.");
  module.def(
      "lossless_encode", &lossless_encode, py::arg("x"), py::arg("wire"),
      "Encodes bfloat16 into `wire`, which has room for lossless_bound(x.size) bytes; returns how many of "
      "them it took. Bytes after these are undefined.");
  module.def("lossless_decode", &lossless_decode, py::arg("wire"), py::arg("out"),
             "Decodes as many elements as `out` has; returns how many bytes of `wire` they took. Raises "
             "ValueError for bytes that lossless_encode has not made: `out` is undefined then.");
}

}  // namespace pycomm::bindings
