// The native half of pycomm.Bucket: copies a list of tensors to one buffer and back.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "bindings/array.h"
#include "bindings/codecs.h"
#include "bindings/packing.h"
#include "bindings/python.h"
#include "common/error.h"
#include "kernels/codec.h"
#include "kernels/copy.h"
#include "kernels/pack.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

bool is_packable(DType dtype) {
  switch (dtype) {
    case DType::float32:
    case DType::float16:
    case DType::bfloat16:
    case DType::float8_e4m3fn:
    case DType::float8_e5m2:
      return true;
    default:
      return false;
  }
}

void require_packable(DType dtype, const std::string& what) {
  if (is_packable(dtype)) return;
  throw TypeError(what + " is " + name(dtype) +
                  ": buckets hold float32, float16, bfloat16, float8_e4m3fn and float8_e5m2");
}

std::string name_of_tensor(size_t i) { return "tensors[" + std::to_string(i) + "]"; }

float scale_argument(double scale) {
  const auto narrow = static_cast<float>(scale);
  if (std::isfinite(narrow)) return narrow;
  throw ValueError("`scale` is " + py::repr(py::float_(scale)).cast<std::string>() +
                   ": pass a finite number of float32's range");
}

// Throws ValueError unless the tensor lies outside the bucket or exactly where its view is.
void require_place(const Array& tensor, const Array& bucket, int64_t offset, const std::string& name) {
  const auto* begin = static_cast<const char*>(tensor.data);
  const auto* storage = static_cast<const char*>(bucket.data);
  if (tensor.bytes() == 0 || begin >= storage + bucket.bytes() || storage >= begin + tensor.bytes()) return;
  const auto size = static_cast<int64_t>(size_of(bucket.dtype));
  if (begin == storage + offset * size && size_of(tensor.dtype) == size_of(bucket.dtype)) return;
  throw ValueError("`" + name +
                   "` lies in the bucket, but not where its view is: pass the view, or other memory");
}

// Reads the tensors for this call: they may have other memory than in the last one.
std::vector<Array> read_tensors(const Packing& packing, const std::vector<py::object>& tensors, bool packs) {
  const auto places = packing.places();
  if (tensors.size() != places.size()) {
    throw ValueError("`tensors` has " + std::to_string(tensors.size()) + " tensors for " +
                     std::to_string(places.size()) + " places: pass one for each");
  }
  std::vector<Array> arrays;
  arrays.reserve(places.size());
  std::vector<Extent> extents;
  for (size_t i = 0; i < places.size(); ++i) {
    const std::string name = name_of_tensor(i);
    const Array& tensor = arrays.emplace_back(get_array(tensors[i].ptr(), name.c_str()));
    require_packable(tensor.dtype, "`" + name + "`");
    if (!packs) require_writable(tensor, name.c_str());
    if (tensor.count != places[i].count) {
      throw ValueError("`" + name + "` has " + std::to_string(tensor.count) +
                       " elements where the bucket has " + std::to_string(places[i].count));
    }
    require_place(tensor, packing.whole(), places[i].offset, name);
    if (!packs) extents.push_back(extent_of(tensor, i));
  }
  if (const auto found = find_overlap(std::move(extents))) {
    throw ValueError("`" + name_of_tensor(found->first) + "` and `" + name_of_tensor(found->second) +
                     "` overlap: unpack writes each of them, pass tensors with memory of their own");
  }
  return arrays;
}

Packing make_packing(const py::object& bucket, const std::vector<int64_t>& offsets,
                     const std::vector<int64_t>& counts) {
  if (offsets.size() != counts.size()) {
    throw ValueError("`offsets` has " + std::to_string(offsets.size()) + " entries and `counts` " +
                     std::to_string(counts.size()) + ": pass one of each for a tensor");
  }
  Array whole = get_array(bucket.ptr(), "bucket");
  require_packable(whole.dtype, "`bucket`");
  require_writable(whole, "bucket");
  std::vector<Packing::Place> places;
  for (size_t i = 0; i < offsets.size(); ++i) places.push_back({offsets[i], counts[i]});
  return {std::move(whole), std::move(places), keep_alive(bucket)};
}

py::object run(const Packing& packing, bool packs, const std::vector<py::object>& tensors, double scale,
               bool stats, const std::optional<std::string>& isa) {
  const std::vector<Array> arrays = read_tensors(packing, tensors, packs);
  const double factor = scale_argument(scale);
  const kernels::Isa& chosen = isa_argument(isa);
  kernels::Stats found;
  kernels::Stats* const wanted = stats ? &found : nullptr;
  {
    const Unlocked unlocked;
    packs ? packing.pack(arrays, factor, wanted, chosen) : packing.unpack(arrays, factor, wanted, chosen);
  }
  if (!stats) return py::none();
  return py::make_tuple(found.sum_squares, found.max_abs, found.nans, found.infs);
}

void copy(const py::object& out, const py::object& x, bool stream) {
  const Array to = get_array(out.ptr(), "out"), from = get_array(x.ptr(), "x");
  require_writable(to, "out");
  if (to.bytes() != from.bytes()) {
    throw ValueError("`out` has " + std::to_string(to.bytes()) + " bytes and `x` " +
                     std::to_string(from.bytes()));
  }
  const Unlocked unlocked;
  kernels::copy_bytes(to.data, from.data, static_cast<size_t>(to.bytes()), stream);
  if (stream) kernels::stream_fence();
}

}  // namespace

void add_bucket(py::module_& module) {
  module.attr("SEGMENT_ALIGN") = kSegmentAlign;
  module.def(
      "packable_dtype",
      [](const py::object& dtype, const std::string& what) {
        const DType found = dtype_from_python(dtype.ptr());
        require_packable(found, "`" + what + "`");
        return std::pair(std::string(name(found)), size_of(found));
      },
      py::arg("dtype"), py::arg("what") = "dtype",
      "Returns the name and the bytes of an element type. Raises TypeError if buckets cannot hold it.");
  module.def(
      "numpy_dtype", [](const std::string& name) { return numpy_dtype(parse_dtype(name)); }, py::arg("name"),
      "The dtype of this name, from NumPy or ml_dtypes.");
  module.def(
      "dtype_name", [](const py::object& dtype) { return std::string(name(dtype_from_python(dtype.ptr()))); },
      py::arg("dtype"),
      "The library's name for an element type, given by any of its names or as a dtype of NumPy or torch.");
  module.def("copy_bytes", &copy, py::arg("out"), py::arg("x"), py::arg("stream") = false,
             "Copies `x` to `out`, which must not overlap it: the kernels are measured against this copy.");
  const auto method = [](bool packs) {
    return [packs](const Packing& self, const std::vector<py::object>& tensors, double scale, bool stats,
                   const std::optional<std::string>& isa) {
      return run(self, packs, tensors, scale, stats, isa);
    };
  };
  py::class_<Packing>(module, "Packing",
                      "The places of tensors in a bucket: their offsets and counts, in its elements.")
      .def(py::init(&make_packing), py::arg("bucket"), py::arg("offsets"), py::arg("counts"))
      .def("pack", method(true), py::arg("tensors"), py::arg("scale") = 1.0, py::kw_only(),
           py::arg("stats") = true, py::arg("isa") = py::none(),
           "Copies tensors to their places, cast and scaled. Returns (sum of squares, largest magnitude, "
           "NaNs, infinities) of what was written, or None without `stats`.")
      .def("unpack", method(false), py::arg("tensors"), py::arg("scale") = 1.0, py::kw_only(),
           py::arg("stats") = true, py::arg("isa") = py::none(),
           "Copies the places to the tensors, cast and scaled. Returns what pack returns.")
      .def(
          "check_unpack",
          [](const Packing& self, const std::vector<py::object>& tensors) {
            read_tensors(self, tensors, false);
          },
          py::arg("tensors"), "Raises the error that unpack would raise for these tensors.");
}

}  // namespace pycomm::bindings
