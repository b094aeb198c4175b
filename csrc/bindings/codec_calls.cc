// Calls with codecs, once pycomm/codecs/calls.py has read what the caller asked for: checked as the ordinary
// ones are, bound to their plans, run at once or as Work.
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "bindings/codecs.h"
#include "bindings/invocation.h"
#include "bindings/python.h"
#include "bindings/work.h"
#include "common/error.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

using runtime::Bound;
using runtime::Coding;
using schedule::Collective;

// What the three kinds of calls have in common, as it came from Python.
struct Given {
  const py::object &x, &out, &op, &algorithm, &timeout, &tag;
  bool deterministic = false;
  const py::object& counts;

  Invocation check(const PyCommunicator& comm, Collective collective) const {
    const Method method{schedule::name(collective), collective, 0, 1, nullptr, false};
    Arguments args;
    const auto set = [&](Arg arg, const py::object& value) {
      if (value.is_none()) return;
      args.values[static_cast<size_t>(arg)] = value.ptr();
      args.given |= bit(arg);
    };
    set(Arg::x, x);
    set(Arg::out, out);
    set(Arg::op, op);
    set(Arg::algorithm, algorithm);
    set(Arg::timeout, timeout);
    set(Arg::tag, tag);
    set(Arg::counts, counts);
    Invocation call = check_call(method, comm, args);
    call.request.call.deterministic = deterministic;
    return call;
  }
};

void take_residuals(Invocation& call, Coding& coding, const py::object& residual,
                    const py::object& next_residual, double scale) {
  const Residuals residuals = parse_residuals(residual, next_residual, scale, call.in.count);
  coding.residual = residuals.now;
  coding.next_residual = residuals.next;
  coding.residual_scale = residuals.scale;
  call.storage = std::make_shared<std::pair<std::shared_ptr<void>, std::shared_ptr<void>>>(
      residuals.held, keep_alive(py::make_tuple(residual, next_residual)));
}

// Binds the call, with the communicator's own step if it has none, and runs it or starts it.
template <class Bind>
py::object run(PyCommunicator& comm, Invocation& call, const std::shared_ptr<Coding>& coding,
               std::optional<uint32_t> step, bool async, Bind bind) {
  coding->step = step ? *step : comm->codec_step();
  call.request.coding = coding;
  std::optional<GilPatience> patience;
  if (!async) patience.emplace(call.eager(comm));
  Bound bound = bind(call.request);
  if (!step) comm->take_codec_step();
  if (async) return start(comm, call, std::move(bound));
  comm->run(bound, *patience);
  patience.reset();
  return std::move(call.result);
}

py::object run_codec(PyCommunicator& comm, const std::string& collective, const py::object& x,
                     const kernels::Codec& codec, const py::object& out, const py::object& op,
                     const py::object& algorithm, const py::object& timeout, const py::object& tag,
                     bool async_op, bool deterministic, const py::object& counts,
                     std::optional<uint32_t> step, const py::object& segments, const py::object& residual,
                     const py::object& next_residual, double residual_scale) {
  const Collective kind = schedule::parse_collective(collective);
  if (kind != Collective::all_reduce && kind != Collective::reduce_scatter &&
      kind != Collective::all_gather) {
    throw ValueError(collective + " takes no codec: all_reduce, reduce_scatter and all_gather do");
  }
  Invocation call = Given{x, out, op, algorithm, timeout, tag, deterministic, counts}.check(comm, kind);
  auto coding = std::make_shared<Coding>();
  coding->codec = codec;
  coding->segments = parse_segments(segments);
  take_residuals(call, *coding, residual, next_residual, residual_scale);
  return run(comm, call, coding, step, async_op,
             [&](runtime::Request& request) { return comm->bind(request); });
}

py::object run_topk(PyCommunicator& comm, const py::object& x, int64_t k, const py::object& out,
                    const py::object& op, const py::object& algorithm, const py::object& timeout,
                    const py::object& tag, bool async_op, const py::object& residual,
                    const py::object& next_residual, double residual_scale) {
  Invocation call =
      Given{x, out, op, algorithm, timeout, tag, false, py::none()}.check(comm, Collective::all_reduce);
  auto coding = std::make_shared<Coding>();
  take_residuals(call, *coding, residual, next_residual, residual_scale);
  return run(comm, call, coding, std::nullopt, async_op,
             [&](const runtime::Request& request) { return comm->bind_topk(request, k); });
}

py::object run_shared_int(PyCommunicator& comm, const py::object& x, int width, uint64_t seed,
                          const py::object& out, const py::object& op, const py::object& algorithm,
                          const py::object& timeout, const py::object& tag, bool async_op,
                          std::optional<uint32_t> step, const py::object& segments) {
  Invocation call =
      Given{x, out, op, algorithm, timeout, tag, false, py::none()}.check(comm, Collective::all_reduce);
  auto coding = std::make_shared<Coding>();
  coding->codec.seed = seed;
  coding->segments = parse_segments(segments);
  return run(comm, call, coding, step, async_op,
             [&](const runtime::Request& request) { return comm->bind_shared_int(request, width); });
}

}  // namespace

void add_codec_calls(py::module_& module, py::class_<PyCommunicator>& communicator) {
  communicator.def_property_readonly(
      "codec_step", [](const PyCommunicator& self) { return self->codec_step(); },
      "How many calls with a codec were made without step=: the step of the next one.");
  module.def("run_codec", &run_codec, py::arg("comm"), py::arg("collective"), py::arg("x"), py::arg("codec"),
             py::kw_only(), py::arg("out") = py::none(), py::arg("op") = "sum",
             py::arg("algorithm") = py::none(), py::arg("timeout") = py::none(), py::arg("tag") = py::none(),
             py::arg("async_op") = false, py::arg("deterministic") = false, py::arg("counts") = py::none(),
             py::arg("step") = py::none(), py::arg("segments") = py::none(), py::arg("residual") = py::none(),
             py::arg("next_residual") = py::none(), py::arg("residual_scale") = 1.0,
             "A collective whose windows hold what `codec` makes of the elements. `step`: None counts it.");
  module.def("run_topk", &run_topk, py::arg("comm"), py::arg("x"), py::arg("k"), py::kw_only(),
             py::arg("out") = py::none(), py::arg("op") = "sum", py::arg("algorithm") = py::none(),
             py::arg("timeout") = py::none(), py::arg("tag") = py::none(), py::arg("async_op") = false,
             py::arg("residual") = py::none(), py::arg("next_residual") = py::none(),
             py::arg("residual_scale") = 1.0, "An all_reduce of each rank's `k` largest elements.");
  module.def("run_shared_int", &run_shared_int, py::arg("comm"), py::arg("x"), py::arg("width"),
             py::kw_only(), py::arg("seed") = 0, py::arg("out") = py::none(), py::arg("op") = "sum",
             py::arg("algorithm") = py::none(), py::arg("timeout") = py::none(), py::arg("tag") = py::none(),
             py::arg("async_op") = false, py::arg("step") = py::none(), py::arg("segments") = py::none(),
             "An all_reduce of integers of `width` bits under scales that the ranks share.");
}

}  // namespace pycomm::bindings
