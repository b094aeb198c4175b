#include "bindings/coding.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <utility>

#include "bindings/codecs.h"
#include "common/error.h"

namespace py = pybind11;

namespace pycomm::bindings {

using runtime::Coding;
using runtime::Residuals;

namespace {

py::module_ kinds() { return py::module_::import("pycomm.codecs.kinds"); }

py::tuple shape_of(const py::handle& x) { return py::tuple(x.attr("shape")); }

Codec native_of(const py::object& codec) {
  const py::object native = codec.attr("native")();
  if (py::isinstance<Codec>(native)) return native.cast<Codec>();
  throw TypeError("native() of codec " + codec.attr("name").cast<std::string>() + " returned a " +
                  Py_TYPE(native.ptr())->tp_name + ": return a pycomm._native.Codec");
}

// A view of memory that the residuals own.
py::array_t<float> view_of(const std::shared_ptr<Residuals>& residuals, float* data) {
  const py::capsule owner(new std::shared_ptr<Residuals>(residuals),
                          [](void* p) { delete static_cast<std::shared_ptr<Residuals>*>(p); });
  return py::array_t<float>(static_cast<py::ssize_t>(residuals->count()), data, owner);
}

}  // namespace

Feeding::Feeding(py::object comm, py::object feedback, py::object places, int64_t count, bool of_torch)
    : comm_(std::move(comm)),
      feedback_(std::move(feedback)),
      places_(std::move(places)),
      count_(count),
      of_torch_(of_torch) {}

void Feeding::renew(Coding& coding) {
  py::object next = feedback_.attr("residuals")(comm_, places_, count_, of_torch_);
  const auto scale = feedback_.attr("scale").cast<float>();
  if (coding.residuals && coding.residual_scale != scale) {
    throw ValueError("the loss scale of the error feedback was " + std::to_string(coding.residual_scale) +
                     " when this call was bound, and is " + std::to_string(scale) + ": bind it anew");
  }
  auto residuals = next.attr("residuals").cast<std::shared_ptr<Residuals>>();
  if (residuals->count() != count_) {  // the kernels would go past their end
    throw ValueError("the error feedback has residuals of " + std::to_string(residuals->count()) +
                     " elements for a call on " + std::to_string(count_) + ": return as many");
  }
  residuals_ = std::move(next);
  coding.residuals = std::move(residuals);
  coding.residual_scale = scale;
}

Coder::Coder(const char* collective, const Arguments& args) : args_(args) {
  if (!args[Arg::codec]) throw TypeError("`step` numbers calls with a codec: pass codec= as well");
  if (args[Arg::step]) step_argument(args[Arg::step]);
  codec_ = kinds().attr("resolve")(py::handle(args[Arg::codec]), collective);
  feedback_ = kinds().attr("feedback_of")(codec_, py::handle(args.self));
}

void Coder::check(const runtime::Request& request) const {
  const auto kind = codec_.attr("name").cast<std::string>();
  if (kind == "lossless") return runtime::check_lossless(request.call.dtype, "the buffer");
  runtime::check_floats(request.call, kind);
}

void Coder::check_item(DType dtype, const std::string& item) const {
  const auto kind = codec_.attr("name").cast<std::string>();
  if (kind == "lossless") return runtime::check_lossless(dtype, "`" + item + "`");
  require_codec_dtype(dtype, item.c_str());
}

std::vector<std::string> Coder::names(const std::vector<size_t>& items) const {
  const bool tagged = args_[Arg::tag] != nullptr;
  if (feeds() && !tagged) kinds().attr("require_names")(codec_);
  const std::string prefix = tagged ? text(args_[Arg::tag], "tag") : "";
  std::vector<std::string> names;
  for (const size_t i : items) names.push_back(prefix + "[" + std::to_string(i) + "]");
  return names;
}

Parts Coder::parts_of(PyObject* x) const {
  const py::object segments = py::getattr(x, "segments", py::none());
  if (segments.is_none()) return {};
  Parts parts{.whole = false, .names = {}, .segments = parse_segments(segments), .shapes = {}};
  for (const py::handle view : py::getattr(x, "views")) parts.shapes.push_back(shape_of(view));
  if (py::getattr(x, "named").cast<bool>()) {
    parts.names = py::getattr(x, "names").cast<std::vector<std::string>>();
  } else {
    std::vector<size_t> all(parts.segments.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = i;
    parts.names = names(all);
  }
  return parts;
}

std::vector<size_t> Coder::exempt(const Parts& parts) const {
  if (!feeds() || parts.whole) return {};
  return feedback_.attr("exempted")(parts.names, parts.shapes).cast<std::vector<size_t>>();
}

std::string Coder::signature(const Parts& parts, const std::vector<size_t>& exempt) {
  py::list names, shapes;
  for (const size_t i : exempt) {
    names.append(parts.names[i]);
    shapes.append(parts.shapes[i]);
  }
  const py::object text = py::module_::import("pycomm.layouts").attr("signature")(names, shapes);
  return "exempt " + text.cast<std::string>();
}

std::shared_ptr<Feeding> Coder::code(runtime::Request& request, const Parts& parts,
                                     const std::vector<size_t>& exempt, PyObject* x, int64_t count) const {
  check(request);
  const auto kind = codec_.attr("name").cast<std::string>();
  if (kind == "lossless") {
    request.composite = runtime::Lossless();
    return nullptr;
  }
  auto coding = std::make_shared<Coding>();
  int64_t carried = count;
  py::list places;
  if (parts.whole) {
    if (feeds()) {
      if (!args_[Arg::tag]) kinds().attr("require_names")(codec_);
      places.append(py::make_tuple(text(args_[Arg::tag], "tag"), 0, count));
    }
  } else {
    carried = 0;
    auto left_out = exempt.begin();
    for (size_t i = 0; i < parts.segments.size(); ++i) {
      if (left_out != exempt.end() && *left_out == i) {
        ++left_out;
        continue;
      }
      const kernels::Segment& segment = parts.segments[i];
      coding->segments.push_back(segment);
      places.append(py::make_tuple(parts.names[i], segment.begin, segment.end));
      carried += segment.end - segment.begin;
    }
  }
  if (kind == "topk") {
    if (exempt.empty()) coding->segments.clear();  // the gaps between tensors are zero already
    request.composite = runtime::TopK{codec_.attr("kept")(carried).cast<int64_t>()};
  } else if (kind == "shared_int") {
    request.composite = runtime::SharedInt{codec_.attr("width").cast<int>()};
    coding->codec.seed = codec_.attr("seed").cast<uint64_t>();
  } else {
    coding->codec = native_of(codec_);
  }
  coding->counted = !args_[Arg::step];
  if (!coding->counted) coding->step = step_argument(args_[Arg::step]);
  request.coding = coding;
  if (!feeds()) return nullptr;
  if (request.call.prescale != 1.0) {
    throw TypeError("`op` is premul_sum, and " + kind +
                    " has error feedback, which counts in units of the sum: scale the gradients first, or "
                    "pass error_feedback=False");
  }
  const py::object data = py::getattr(x, "__pycomm_buffer__", py::handle(x));
  const bool of_torch = py::module_::import("pycomm.gradients").attr("is_tensor")(data).cast<bool>();
  auto feeding = std::make_shared<Feeding>(py::reinterpret_borrow<py::object>(args_.self), feedback_,
                                           py::tuple(places), count, of_torch);
  feeding->renew(*coding);
  return feeding;
}

Codec native_codec(const py::object& codec, const char* collective) {
  const py::object found = kinds().attr("resolve")(codec, collective);
  if (!py::hasattr(found, "native")) {
    throw ValueError("`codec` is " + found.attr("name").cast<std::string>() +
                     ", whose calls run several plans: explain() takes one, leave codec out");
  }
  Codec native = native_of(found);
  native.seed = 0;
  return native;
}

uint32_t step_argument(PyObject* step) {
  const int64_t value = integer(step, "step");
  if (value < 0 || value >> 32) {
    throw ValueError("`step` is " + std::to_string(value) + ": pass a number of 32 bits, 0 or more");
  }
  return static_cast<uint32_t>(value);
}

void add_coding(py::module_& module, py::class_<PyCommunicator>& communicator) {
  communicator.def_property_readonly(
      "codec_step", [](const PyCommunicator& self) { return self->codec_step(); },
      "The number of calls so far with a codec and without step=. The next such call takes it as its step.");
  py::class_<Residuals, std::shared_ptr<Residuals>>(module, "Residuals",
                                                    "The residuals of `count` elements: what encodes have "
                                                    "lost, and later calls with error feedback add again.")
      .def(py::init<int64_t>(), py::arg("count"))
      .def_property_readonly(
          "now", [](const std::shared_ptr<Residuals>& self) { return view_of(self, self->now()); },
          "The residuals as a float32 view. Use it only while no call is under way.")
      .def("take_back", &Residuals::take_back, "Undoes the last call's change, if it made one.");
}

}  // namespace pycomm::bindings
