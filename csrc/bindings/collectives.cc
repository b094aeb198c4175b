// The collectives as methods of the communicator. The interpreter's vectorcall enters here, with no Python
// frame and no dispatch of pybind11 between. All arguments are checked before this rank moves.
#include <pybind11/stl.h>

#include "bindings/arguments.h"
#include "bindings/coding.h"
#include "bindings/docs.h"
#include "bindings/invocation.h"
#include "bindings/lists.h"
#include "bindings/python.h"
#include "bindings/refusal.h"
#include "bindings/work.h"
#include "common/error.h"
#include "kernels/copy.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

using runtime::Bound;
using schedule::Collective;

constexpr uint32_t kCommon = bit(Arg::x) | bit(Arg::out) | bit(Arg::algorithm) | bit(Arg::timeout) |
                             bit(Arg::tag) | bit(Arg::async_op) | bit(Arg::stream);
constexpr uint32_t kReduces = kCommon | bit(Arg::op) | bit(Arg::deterministic);

constexpr Method kAllReduce{"all_reduce", Collective::all_reduce, kReduces | kCodecArguments, 1, nullptr,
                            false};
constexpr Method kAllReduceInit{"all_reduce_init",
                                Collective::all_reduce,
                                (kReduces | kCodecArguments) & ~bit(Arg::async_op),
                                1,
                                nullptr,
                                true};
constexpr Method kReduceScatter{"reduce_scatter",
                                Collective::reduce_scatter,
                                kReduces | kCodecArguments | bit(Arg::counts),
                                1,
                                nullptr,
                                false};
constexpr Method kAllGather{
    "all_gather", Collective::all_gather, kCommon | kCodecArguments | bit(Arg::counts), 1, nullptr, false};
constexpr Method kBroadcast{
    "broadcast", Collective::broadcast, kCommon | bit(Arg::root) | bit(Arg::codec), 1, nullptr, false};
constexpr Method kReduce{"reduce", Collective::reduce, kReduces | bit(Arg::root), 1, nullptr, false};
constexpr Method kGather{
    "gather", Collective::gather, kCommon | bit(Arg::root) | bit(Arg::counts), 1, nullptr, false};
constexpr Method kScatter{
    "scatter", Collective::scatter, kCommon | bit(Arg::root) | bit(Arg::counts), 1, nullptr, false};
constexpr Method kAllToAll{
    "all_to_all", Collective::all_to_all, kCommon | bit(Arg::send_counts) | bit(Arg::recv_counts), 1, nullptr,
    false};
constexpr Method kBarrier{
    "barrier",
    Collective::barrier,
    bit(Arg::timeout) | bit(Arg::tag) | bit(Arg::async_op) | bit(Arg::stream) | bit(Arg::algorithm),
    0,
    nullptr,
    false};
constexpr Method kSend{"send", Collective::send_recv, (kCommon & ~bit(Arg::out)) | bit(Arg::peer), 2, "dst",
                       false};
constexpr Method kRecv{"recv", Collective::send_recv, (kCommon & ~bit(Arg::out)) | bit(Arg::peer), 2, "src",
                       false};
constexpr Method kSendRecv{"send_recv",
                           Collective::send_recv,
                           bit(Arg::x) | bit(Arg::peer) | bit(Arg::out) | bit(Arg::src) | bit(Arg::timeout) |
                               bit(Arg::tag) | bit(Arg::stream),
                           4,
                           "dst",
                           false};

// As pybind11's cast, but quick.
PyCommunicator& self_of(PyObject* self) {
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  if (!instance->simple_holder_constructed) [[unlikely]]
    require_made(self);
  void* value = instance->simple_layout ? instance->simple_value_holder[0] : nullptr;
  return value ? *static_cast<PyCommunicator*>(value) : py::handle(self).cast<PyCommunicator&>();
}

// Binds the calls, and joins what each does before and after its plan with what its binding does there.
std::vector<Bound> bind_all(PyCommunicator& comm, std::vector<Invocation>& calls) {
  std::vector<Bound> bounds;
  bounds.reserve(calls.size());
  for (Invocation& call : calls) {
    Bound& bound = bounds.emplace_back();
    {
      GilPatience patience(call.eager(comm));  // binding may have to make a plan
      bound = comm->bind(call.request);
    }
    if (call.before) {
      bound.before = [first = std::move(call.before), second = std::move(bound.before)] {
        first();
        if (second) second();
      };
    }
    if (call.then) {
      bound.then = [first = std::move(bound.then), second = std::move(call.then)] {
        if (first) first();
        second();
      };
    }
  }
  return bounds;
}

void begin_feeding(const std::vector<Invocation>& calls) {
  for (const Invocation& call : calls) {
    if (call.feeding) call.feeding->begun();
  }
}

void run_all(PyCommunicator& comm, std::vector<Invocation>& calls, std::vector<Bound>& bounds) {
  for (size_t i = 0; i < calls.size(); ++i) {
    GilPatience patience(calls[i].eager(comm));
    comm->run(bounds[i], patience);
  }
}

py::object start_all(PyCommunicator& comm, std::vector<Invocation>& calls, std::vector<Bound>& bounds) {
  if (calls.empty()) throw ValueError("`x` is an empty list: there is nothing to wait for");
  py::object work;  // of the last call, which completes after the others
  for (size_t i = 0; i < calls.size(); ++i) work = start(comm, calls[i], std::move(bounds[i]));
  for (const Invocation& call : calls) {
    if (call.feeding) call.feeding->started(work);
  }
  return work;
}

// The arguments of one of the two calls that send_recv makes.
Arguments side_of(const Arguments& args, Arg buffer, Arg peer) {
  Arguments side;
  side.self = args.self;
  for (const auto& [to, from] : {std::pair(Arg::x, buffer),
                                 {Arg::peer, peer},
                                 {Arg::timeout, Arg::timeout},
                                 {Arg::tag, Arg::tag},
                                 {Arg::stream, Arg::stream}}) {
    if (!args[from]) continue;
    side.values[static_cast<size_t>(to)] = args[from];
    side.given |= bit(to);
  }
  return side;
}

py::object run_exchange(PyCommunicator& comm, const Arguments& args) {
  const Arguments sends = side_of(args, Arg::x, Arg::peer), receives = side_of(args, Arg::out, Arg::src);
  Memo::Query sent(kSend, sends), received(kRecv, receives);
  const bool can_be_kept = args[Arg::x] && args[Arg::out] && sent.read_buffers() && received.read_buffers();
  if (can_be_kept) {
    const Memo::Use send = comm.handle->memo.find(sent), receive = comm.handle->memo.find(received);
    if (send && receive && !overlap(sent.x, received.x)) {
      {
        GilPatience patience(send->eager || receive->eager);
        comm->run_both(send->bound, receive->bound, patience);
      }
      return py::reinterpret_borrow<py::object>(args[Arg::out]);
    }
  }
  const Memo::Use send = can_be_kept ? comm.handle->memo.claim(sent) : Memo::Use(),
                  receive = can_be_kept ? comm.handle->memo.claim(received) : Memo::Use();
  auto calls = check_exchange(kSendRecv, comm, args);
  if (calls[0].request.call.world.peer == comm->rank()) {
    kernels::copy_bytes(calls[1].out.data, calls[0].in.data, static_cast<size_t>(calls[0].in.bytes()));
    return std::move(calls[1].result);
  }
  std::array<Bound, 2> bounds;
  const std::array places = {&send, &receive};
  {
    GilPatience patience(calls[0].eager(comm) || calls[1].eager(comm));
    for (size_t i = 0; i < calls.size(); ++i) bounds[i] = comm->bind(calls[i].request);
    comm->run_both(bounds[0], bounds[1], patience);
  }
  for (size_t i = 0; i < calls.size(); ++i) {
    const Memo::Use& place = *places[i];
    if (!place) continue;
    place->result = i == 0 ? std::nullopt : std::optional(Arg::x);
    place->eager = calls[i].eager(comm);
    place->bound = std::move(bounds[i]);
    place.keep();
  }
  return std::move(calls[1].result);
}

// Not inlined, as run_anew().
[[gnu::noinline]] void set_step(Bound& bound, PyObject* step) { bound.set_step(step_argument(step)); }

py::object run_known(PyCommunicator& comm, Memo::Call& call, const Arguments& args) {
  if (args[Arg::step]) [[unlikely]]
    set_step(call.bound, args[Arg::step]);
  {
    GilPatience patience(call.eager);
    comm->run(call.bound, patience);
  }  // has the interpreter's lock again
  return py::reinterpret_borrow<py::object>(call.result ? args[*call.result] : Py_None);
}

// `query` is null for a call that cannot be kept. Not inlined: it would take registers and stack of invoke().
[[gnu::noinline]] py::object run_anew(PyCommunicator& comm, const Method& method, const Arguments& args,
                                      const Memo::Query* query) {
  PyObject* x = args[Arg::x];
  if (method.persistent && x && (PyList_Check(x) || PyTuple_Check(x))) {
    throw TypeError("all_reduce_init() takes one buffer, and `x` is a list: pack it into one");
  }
  const bool async = truth(args[Arg::async_op]);
  const Memo::Use place =
      query && !method.persistent && !async ? comm.handle->memo.claim(*query) : Memo::Use();
  std::vector<Invocation> calls = check_calls(method, comm, args);
  std::vector<Bound> bounds = bind_all(comm, calls);
  if (method.persistent) return make_persistent(comm, calls, std::move(bounds));
  begin_feeding(calls);
  if (async) return start_all(comm, calls, bounds);
  run_all(comm, calls, bounds);
  const Arg returned = args[Arg::out] ? Arg::out : Arg::x;
  if (calls.empty()) return py::reinterpret_borrow<py::object>(args[returned]);
  Invocation& call = calls[0];
  recycle(call);
  const bool none = call.result.is_none();
  // A call that returns a new array is not kept.
  if (place && calls.size() == 1 && !call.feeding && (none || call.result.ptr() == args[returned])) {
    place->result = none ? std::nullopt : std::optional(returned);
    place->eager = call.eager(comm);
    place->bound = std::move(bounds[0]);
    place.keep();
  }
  return std::move(call.result);
}

py::object invoke(const Method& method, PyObject* self, PyObject* const* argv, Py_ssize_t nargs,
                  PyObject* keywords) {
  PyCommunicator& comm = self_of(self);
  Arguments args = parse_arguments(method.name, method.allowed, method.positional, method.peer_name, argv,
                                   nargs, keywords);
  args.self = self;
  if (&method == &kSendRecv) return run_exchange(comm, args);
  Memo::Query query(method, args);
  if (!query.read_buffers()) return run_anew(comm, method, args, nullptr);
  if (const Memo::Use known = comm.handle->memo.find(query)) return run_known(comm, *known, args);
  return run_anew(comm, method, args, &query);
}

// For a MismatchError that is set: a bucket adds in which of its tensors the ranks differ.
[[gnu::noinline]] void explain_mismatch(PyObject* x) {
  py::error_already_set error;
  const py::object explain = py::getattr(x, "__pycomm_mismatch__", py::none());
  if (explain.is_none()) {
    error.restore();
  } else {
    PyErr_SetObject(error.type().ptr(), explain(py::str(error.value())).ptr());
  }
}

template <const Method& method>
PyObject* entry(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* keywords) {
  try {
    return invoke(method, self, args, nargs, keywords).release().ptr();
  } catch (...) {
    set_python_error();
  }
  try {
    if (nargs > 0 && is_mismatch()) explain_mismatch(args[0]);
  } catch (...) {
    set_python_error();
  }
  return nullptr;
}

template <const Method& method>
constexpr PyMethodDef define(const char* doc) {
  return {method.name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(entry<method>)),
          METH_FASTCALL | METH_KEYWORDS, doc};
}

}  // namespace

void add_collectives(py::module_& module, py::class_<PyCommunicator>& communicator) {
  static PyMethodDef methods[] = {
      define<kAllReduce>(docs::kAllReduce),
      define<kAllReduceInit>(docs::kAllReduceInit),
      define<kReduceScatter>(docs::kReduceScatter),
      define<kAllGather>(docs::kAllGather),
      define<kBroadcast>(docs::kBroadcast),
      define<kReduce>(docs::kReduce),
      define<kGather>(docs::kGather),
      define<kScatter>(docs::kScatter),
      define<kAllToAll>(docs::kAllToAll),
      define<kBarrier>(docs::kBarrier),
      define<kSend>(docs::kSend),
      define<kRecv>(docs::kRecv),
      define<kSendRecv>(docs::kSendRecv),
  };
  for (PyMethodDef& def : methods) {
    PyObject* method = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(communicator.ptr()), &def);
    if (!method) throw py::error_already_set();
    communicator.attr(def.ml_name) = py::reinterpret_steal<py::object>(method);
  }
  add_work(module);
}

}  // namespace pycomm::bindings
