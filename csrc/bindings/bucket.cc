// pycomm.Bucket's native half: a list of tensors to one buffer and back.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "bindings/array.h"
#include "bindings/codecs.h"
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

std::string ordinal(size_t i) { return "tensors[" + std::to_string(i) + "]"; }

float scale_argument(double scale) {
  const auto narrow = static_cast<float>(scale);
  if (std::isfinite(narrow)) return narrow;
  throw ValueError("`scale` is " + py::repr(py::float_(scale)).cast<std::string>() +
                   ": pass a finite number of float32's range");
}

struct Extent {
  const char *begin, *end;
  size_t index;
};

// What is written must be written once: in address order, none begins before the one before it has ended.
void require_apart(std::vector<Extent> extents) {
  std::ranges::sort(extents, {}, &Extent::begin);
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].begin < extents[i - 1].end) {
      throw ValueError("`" + ordinal(extents[i - 1].index) + "` and `" + ordinal(extents[i].index) +
                       "` overlap: unpack writes each of them, pass tensors with memory of their own");
    }
  }
}

// The tensors as they lie now: a tensor may have got other memory since the last call.
struct List {
  std::vector<Array> buffers;
  std::vector<kernels::PackItem> items;

  List(const std::vector<py::object>& tensors, const std::vector<int64_t>& offsets,
       const std::vector<int64_t>& counts, const Array& bucket, bool packs) {
    const size_t n = tensors.size();
    if (offsets.size() != n || counts.size() != n) {
      throw ValueError("there are " + std::to_string(n) + " tensors, " + std::to_string(offsets.size()) +
                       " offsets and " + std::to_string(counts.size()) + " counts");
    }
    std::vector<Extent> extents;
    for (size_t i = 0; i < n; ++i) {
      const std::string name = ordinal(i);
      const Array& tensor = buffers.emplace_back(get_array(tensors[i].ptr(), name.c_str()));
      require_packable(tensor.dtype, "`" + name + "`");
      if (!packs) require_writable(tensor, name.c_str());
      if (tensor.count != counts[i]) {
        throw ValueError("`" + name + "` has " + std::to_string(tensor.count) +
                         " elements where the bucket has " + std::to_string(counts[i]));
      }
      if (offsets[i] < 0 || counts[i] > bucket.count - offsets[i]) {
        throw ValueError("`" + name + "` does not fit a bucket of " + std::to_string(bucket.count) +
                         " elements at " + std::to_string(offsets[i]));
      }
      items.push_back({tensor.data, tensor.dtype, tensor.count, offsets[i]});
      require_place(items.back(), tensor, bucket, name);
      if (!packs && tensor.count > 0) {
        const auto* begin = static_cast<const char*>(tensor.data);
        extents.push_back({begin, begin + tensor.bytes(), i});
      }
    }
    require_apart(std::move(extents));
  }

 private:
  // A tensor lies apart from the bucket or is its own part of it.
  static void require_place(const kernels::PackItem& item, const Array& tensor, const Array& bucket,
                            const std::string& name) {
    const auto* begin = static_cast<const char*>(tensor.data);
    const auto* storage = static_cast<const char*>(bucket.data);
    if (tensor.bytes() == 0 || begin >= storage + bucket.bytes() || storage >= begin + tensor.bytes()) return;
    const auto size = static_cast<int64_t>(size_of(bucket.dtype));
    if (begin == storage + item.offset * size && size_of(tensor.dtype) == size_of(bucket.dtype)) return;
    throw ValueError("`" + name +
                     "` lies in the bucket, but not where its view is: pass the view, or other memory");
  }
};

py::object run(bool packs, const py::object& bucket, const std::vector<py::object>& tensors,
               const std::vector<int64_t>& offsets, const std::vector<int64_t>& counts, double scale,
               bool stats, const std::optional<std::string>& isa) {
  const Array storage = get_array(bucket.ptr(), "bucket");
  require_packable(storage.dtype, "`bucket`");
  if (packs) require_writable(storage, "bucket");
  const List list(tensors, offsets, counts, storage, packs);
  const kernels::PackArgs args{list.items, storage.data, storage.dtype, scale_argument(scale)};
  const kernels::Isa& kernels_of = isa_argument(isa);
  kernels::Stats found;
  {
    const Unlocked unlocked;
    (packs ? kernels::pack : kernels::unpack)(args, stats ? &found : nullptr, kernels_of);
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
      "describe_buffer",
      [](const py::object& x, const std::string& what, bool writable) {
        const Array buffer = get_array(x.ptr(), what.c_str());
        if (writable) require_writable(buffer, what.c_str());
        const std::vector<int64_t> shape(buffer.shape.begin(), buffer.shape.end());
        return std::pair(std::string(name(buffer.dtype)), shape);
      },
      py::arg("x"), py::arg("what"), py::arg("writable") = false,
      "The element type and the shape of a tensor. Raises TypeError or ValueError if it cannot be "
      "communicated.");
  module.def(
      "packable_dtype",
      [](const py::object& dtype, const std::string& what) {
        const DType found = dtype_from_python(dtype.ptr());
        require_packable(found, "`" + what + "`");
        return std::pair(std::string(name(found)), size_of(found));
      },
      py::arg("dtype"), py::arg("what") = "dtype",
      "The name and the bytes of an element type. Raises TypeError if buckets cannot hold it.");
  module.def(
      "numpy_dtype", [](const std::string& name) { return numpy_dtype(parse_dtype(name)); }, py::arg("name"),
      "NumPy's or ml_dtypes' dtype of this name.");
  module.def(
      "dtype_name", [](const py::object& dtype) { return std::string(name(dtype_from_python(dtype.ptr()))); },
      py::arg("dtype"), "What the library calls an element type, which may be given as people type it.");
  module.def("copy_bytes", &copy, py::arg("out"), py::arg("x"), py::arg("stream") = false,
             "A plain copy between buffers that do not overlap: what the kernels are measured against.");
  const auto define = [&](const char* name, bool packs, const char* doc) {
    module.def(
        name,
        [packs](const py::object& bucket, const std::vector<py::object>& tensors,
                const std::vector<int64_t>& offsets, const std::vector<int64_t>& counts, double scale,
                bool stats, const std::optional<std::string>& isa) {
          return run(packs, bucket, tensors, offsets, counts, scale, stats, isa);
        },
        py::arg("bucket"), py::arg("tensors"), py::arg("offsets"), py::arg("counts"), py::arg("scale") = 1.0,
        py::kw_only(), py::arg("stats") = true, py::arg("isa") = py::none(), doc);
  };
  define("pack", true,
         "Copies tensors to their offsets in a bucket, cast and scaled. Returns (sum of squares, largest "
         "magnitude, "
         "NaNs, infinities) of what was written, or None.");
  define("unpack", false, "The way back: see pack.");
  module.def(
      "check_unpack",
      [](const py::object& bucket, const std::vector<py::object>& tensors,
         const std::vector<int64_t>& offsets, const std::vector<int64_t>& counts) {
        const List list(tensors, offsets, counts, get_array(bucket.ptr(), "bucket"), false);
      },
      py::arg("bucket"), py::arg("tensors"), py::arg("offsets"), py::arg("counts"),
      "Raises what unpack would.");
}

}  // namespace pycomm::bindings
