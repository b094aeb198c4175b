#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bindings/arguments.h"
#include "bindings/array.h"
#include "bindings/codecs.h"
#include "bindings/coding.h"
#include "bindings/python.h"
#include "bindings/refusal.h"
#include "bindings/shared_arrays.h"
#include "common/env.h"
#include "common/error.h"
#include "common/log.h"
#include "kernels/combine.h"
#include "runtime/bootstrap.h"
#include "schedule/algorithms.h"
#include "schedule/lower/layout.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

using runtime::Communicator;

PyCommunicator wrap(std::shared_ptr<Communicator> comm) {
  return {std::make_shared<Handle>(std::move(comm))};
}

double timeout_or_default(std::optional<double> timeout) {
  if (!timeout) return env().timeout_s;
  if (!(*timeout > 0))
    throw ValueError("`timeout` is " + std::to_string(*timeout) + ": pass a positive number of seconds");
  return *timeout;
}

PyCommunicator join(int rank, int size, const std::string& address, std::optional<double> timeout) {
  transport::Node::Options options;
  options.rank = rank;
  options.size = size;
  options.address = address;
  options.timeout_s = timeout_or_default(timeout);
  options.on_wait = [] {
    const Locked locked;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };
  std::shared_ptr<Communicator> comm;
  {
    const Unlocked unlocked;
    set_log_rank(rank, size);
    comm = runtime::join(options);
  }
  return wrap(std::move(comm));
}

std::vector<PyCommunicator> join_threads(int size, std::optional<double> timeout, std::vector<int> nodes,
                                         std::optional<uint64_t> delays) {
  std::vector<PyCommunicator> comms;
  for (auto& comm : runtime::join_threads(size, timeout_or_default(timeout), {std::move(nodes), delays}))
    comms.push_back(wrap(std::move(comm)));
  return comms;
}

// Owned by an array in symmetric memory. Calls are bound to the memory at an address: they are forgotten when
// symmetric memory comes and when it goes.
class SymmetricMemory {
 public:
  SymmetricMemory(const std::shared_ptr<Handle>& handle, std::shared_ptr<runtime::Allocation> allocation)
      : handle_(handle), allocation_(std::move(allocation)) {
    forget_calls();
  }
  ~SymmetricMemory() {
    allocation_.reset();
    forget_calls();
  }

 private:
  void forget_calls() {
    if (const auto handle = handle_.lock()) handle->memo.clear();
  }
  std::weak_ptr<Handle> handle_;  // weak: memory does not keep a group open
  std::shared_ptr<runtime::Allocation> allocation_;
};

// An array in symmetric memory, which lives as long as the array and its views.
py::object empty(PyCommunicator& self, const py::object& shape, const py::object& dtype,
                 const std::string& device) {
  if (device != "cpu") {
    throw ValueError("`device` is \"" + device + "\": this build has symmetric memory on the CPU only");
  }
  const DType type = dtype_from_python(dtype.ptr());
  const py::object descr = numpy_dtype(type);
  std::vector<int64_t> dims;
  if (PyIndex_Check(shape.ptr())) {
    dims = {integer(shape.ptr(), "shape")};
  } else if (!PySequence_Check(shape.ptr()) || PyUnicode_Check(shape.ptr())) {
    throw TypeError("`shape` is " + py::repr(shape).cast<std::string>() +
                    ": pass an integer or a sequence of integers");
  } else {
    for (const py::handle extent : shape) dims.push_back(integer(extent.ptr(), "shape"));
  }
  int64_t bytes = static_cast<int64_t>(size_of(type));
  for (const int64_t extent : dims) {
    if (extent < 0) throw ValueError("`shape` is " + shape_text(dims) + ": extents cannot be negative");
    if (__builtin_mul_overflow(bytes, extent, &bytes))
      throw ValueError("`shape` is " + shape_text(dims) + ": too large");
  }
  std::shared_ptr<runtime::Allocation> allocation;
  {
    GilPatience patience(true);
    allocation = self->allocate(bytes, patience);
  }
  const py::capsule owner(new SymmetricMemory(self.handle, allocation),
                          [](void* p) { delete static_cast<SymmetricMemory*>(p); });
  const py::object raw =
      py::array(py::dtype("uint8"), {static_cast<py::ssize_t>(bytes)}, allocation->data(), owner);
  return raw.attr("view")(descr).attr("reshape")(py::cast(dims));
}

using LoggedCall = std::tuple<uint64_t, std::string, std::string, std::string, std::string, int64_t, int64_t,
                              int64_t, int64_t, int64_t, int>;
std::pair<std::vector<LoggedCall>, uint64_t> take_log(PyCommunicator& self) {
  const py::gil_scoped_release release;
  const auto [taken, dropped] = self->take_log();
  std::vector<LoggedCall> calls;
  for (const runtime::CallTimes& call : taken) {
    calls.emplace_back(call.number, call.collective, call.algorithm, call.codec, call.tag, call.bytes,
                       call.started, call.finished, call.first_arrival, call.last_arrival, call.last_rank);
  }
  return {std::move(calls), dropped};
}

std::string explain(PyCommunicator& self, const std::string& collective, int64_t count,
                    const py::object& dtype, const std::string& op, std::optional<std::string> algorithm,
                    int root, bool deterministic, const py::object& codec) {
  runtime::Request request;
  request.call.world.collective = schedule::parse_collective(collective);
  if (request.call.world.traits().between_two()) {
    throw ValueError("send and recv have one algorithm: there is nothing to choose");
  }
  request.call.world.root = root;
  request.call.dtype = dtype_from_python(dtype.ptr());
  request.call.op = parse_op(op);
  request.call.deterministic = deterministic;
  if (!codec.is_none()) request.call.codec = native_codec(codec, collective.c_str());
  if (count < 0) throw ValueError("`count` is " + std::to_string(count) + ": pass 0 or more");
  if (algorithm) request.algorithm = *algorithm;
  request.call.world.size = self->size();
  request.call.counts = schedule::uniform_counts(request.call.world, count);
  return self->explain(request);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The native part of pycomm: communicators, plans, kernels.";
  import_numpy();
  register_errors(module);
  close_at_exit();
  module.attr("version") = PYCOMM_VERSION;
  py::list ops, dtypes, collectives, rooted;
  for (int op = 0; op < kNumOps; ++op) ops.append(name(static_cast<Op>(op)));
  for (int dtype = 0; dtype < kNumDTypes; ++dtype) dtypes.append(name(static_cast<DType>(dtype)));
  for (const schedule::Traits& each : schedule::kTraits) {
    collectives.append(each.name);
    if (each.rooted) rooted.append(each.name);
  }
  module.attr("OPS") = py::tuple(ops);
  module.attr("DTYPES") = py::tuple(dtypes);
  module.attr("COLLECTIVES") = py::tuple(collectives);
  module.attr("ROOTED") = py::tuple(rooted);  // the collectives that have a root

  py::class_<PyCommunicator> communicator(module, "Communicator",
                                          "A group of ranks, as one of them sees it.");
  communicator.def(py::init([](const PyCommunicator& other) { return other; }), py::arg("other"))
      .def_property_readonly("rank", [](const PyCommunicator& self) { return self->rank(); })
      .def_property_readonly("size", [](const PyCommunicator& self) { return self->size(); })
      .def_property_readonly(
          "local_rank", [](const PyCommunicator& self) { return self->place().local_rank; },
          "This rank's number among the ranks of its node.")
      .def_property_readonly(
          "local_size", [](const PyCommunicator& self) { return self->place().local_size; },
          "The number of ranks on this node.")
      .def_property_readonly(
          "num_nodes", [](const PyCommunicator& self) { return self->place().num_nodes; },
          "The number of nodes that the group's ranks are on.")
      .def(
          "empty", &empty, py::arg("shape"), py::arg("dtype") = "float32", py::kw_only(),
          py::arg("device") = "cpu",
          "Collective. Returns a NumPy array in symmetric memory, of the same size on every rank: peers read "
          "and write it in place, so collectives on it copy nothing. Its elements are 0. The memory is freed "
          "when every rank has dropped its array. Raises MemoryError if there is not enough memory, "
          "ValueError if ranks ask for different sizes.")
      .def(
          "split",
          [](PyCommunicator& self, int64_t color, int64_t key) {
            std::shared_ptr<Communicator> comm;
            {
              GilPatience patience(true);
              comm = self->split(color, key, patience);
            }
            return comm ? std::optional(wrap(std::move(comm))) : std::nullopt;
          },
          py::arg("color"), py::arg("key") = 0,
          "Collective. Returns the group of the ranks that pass the same color, ordered by key and then by "
          "rank, or None for a negative color.")
      .def(
          "shrink",
          [](PyCommunicator& self) {
            std::shared_ptr<Communicator> comm;
            {
              GilPatience patience(true);
              comm = self->shrink(patience);
            }
            return wrap(std::move(comm));
          },
          "Collective among the ranks that are left, also after a failure. Returns their group, in the same "
          "order; the old communicator cannot be used any more. Raises CommTimeoutError if a rank that lives "
          "does not call it.")
      .def(
          "close",
          [](PyCommunicator& self) {
            GilPatience patience(true);
            self->close(patience);
          },
          "Completes what is queued and leaves the group. Peers that still wait for this rank get "
          "PeerLostError. Raises MismatchError if another rank's last call was a different one; the group is "
          "closed all the same.")
      .def(
          "leave",
          [](PyCommunicator& self, const std::string& error) {
            GilPatience patience(true);
            self->leave(error, patience);
          },
          py::arg("error"),
          "Leaves the group because of an error: as close(), but does not wait for what is queued. Peers in "
          "these calls get PeerLostError, which quotes `error`.")
      .def(
          "abandon", [](PyCommunicator& self) { self->abandon(); },
          "For rank threads: this rank has failed and will make no more calls.")
      .def(
          "find_sender",
          [](PyCommunicator& self, const std::vector<int>& skip) -> std::optional<int> {
            const GilPatience patience(true);
            const int src = self->find_sender(skip);
            return src < 0 ? std::nullopt : std::optional(src);
          },
          py::arg("skip") = std::vector<int>(),
          "A rank that has called send to this one, where no recv of this rank takes that message yet; None "
          "if there is none now. It may still be sending: recv waits for the rest. If several ranks have, "
          "calls find them in turn. Ranks in `skip` are not looked at. Local; waits only for a blocking call "
          "that another thread makes. Raises PeerLostError where a rank has ended, as recv does, or where "
          "all other ranks have closed their communicators and all they sent is received; ValueError in a "
          "group on several nodes.")
      .def(
          "log_calls",
          [](PyCommunicator& self, size_t capacity) {
            GilPatience patience(true);
            self->log_calls(capacity, patience);
          },
          py::arg("capacity"),
          "Collective. From now on the times of this rank's collectives are kept, those of the latest "
          "`capacity`; 0: no more. See pycomm.trace.")
      .def(
          "take_log", &take_log,
          "The calls that ended since the last take, oldest first, and how many before these were lost. A "
          "call "
          "is (number, collective, algorithm, codec, tag, bytes, started, finished, first arrival, last "
          "arrival, "
          "the rank that arrived last); times are those of time.perf_counter_ns(); -1 for that rank: none is "
          "known.")
      .def_property_readonly(
          "progress_seconds", [](PyCommunicator& self) { return self->progress_seconds(); },
          "The processor time that this group's progress thread has taken, in seconds.")
      .def("explain", &explain, py::arg("collective"), py::arg("count"), py::arg("dtype") = "float32",
           py::kw_only(), py::arg("op") = "sum", py::arg("algorithm") = py::none(), py::arg("root") = 0,
           py::arg("deterministic") = false, py::arg("codec") = py::none(),
           "Local. Says in words which plan a call would run, and why. `count`: elements of `x` or, if it "
           "holds a block for each rank, of one block.");
  add_collectives(module, communicator);
  add_schedules(module);
  add_arrays(module);
  add_bucket(module);
  add_codecs(module);
  add_coding(module, communicator);
  add_shared_arrays(module);

  module.def("join", &join, py::arg("rank"), py::arg("size"), py::arg("address"),
             py::arg("timeout") = py::none(), "Meets the other ranks of this machine at `address`.");
  module.def("join_threads", &join_threads, py::arg("size"), py::arg("timeout") = py::none(),
             py::arg("nodes") = std::vector<int>(), py::arg("delays") = py::none(),
             "Returns the communicators of `size` rank threads of this process. `nodes`: a made-up node for "
             "each rank; empty, all are on one. `delays`: a seed for delays of messages between nodes.");
  module.def("isa", [] { return std::string(kernels::isa()); }, "The instruction set of the kernels in use.");
  module.def("available_isas", [] {
    size_t count = 0;
    const char* const* names = kernels::available_isas(&count);
    return std::vector<std::string>(names, names + count);
  });
  translate_type_errors(module);
}

}  // namespace pycomm::bindings
