#include "bindings/invocation.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <span>
#include <utility>

#include "bindings/refusal.h"
#include "common/error.h"

namespace py = pybind11;

namespace pycomm::bindings {

using runtime::Request;
using schedule::Content;

namespace {

constexpr int64_t kShortBytes = 32 << 10;

// ---- arguments that are no buffers ----

int rank_argument(const PyCommunicator& comm, PyObject* object, const char* name) {
  const int64_t rank = object ? integer(object, name) : 0;
  if (rank < 0 || rank >= comm->size()) {
    throw ValueError(std::string("`") + name + "` is " + std::to_string(rank) +
                     ": ranks of this group are 0 to " + std::to_string(comm->size() - 1));
  }
  return static_cast<int>(rank);
}

std::vector<int64_t> counts_argument(const PyCommunicator& comm, PyObject* object, const char* name) {
  std::vector<int64_t> counts;
  if (!PySequence_Check(object)) {
    throw TypeError(std::string("`") + name + "` is a " + Py_TYPE(object)->tp_name +
                    ": pass as many integers as there are ranks");
  }
  for (const py::handle item : py::reinterpret_borrow<py::iterable>(object)) {
    counts.push_back(integer(item.ptr(), name));
    if (counts.back() < 0)
      throw ValueError(std::string("`") + name + "` holds " + std::to_string(counts.back()) +
                       ": pass 0 rows or more for each rank");
  }
  if (static_cast<int>(counts.size()) != comm->size()) {
    throw ValueError(std::string("`") + name + "` has " + std::to_string(counts.size()) + " entries for " +
                     std::to_string(comm->size()) + " ranks: pass one for each");
  }
  return counts;
}

// For an object such as torch's ReduceOp.SUM or numpy.add, whose name may be much like one of ours.
[[noreturn]] void refuse_op(PyObject* op) {
  const std::string word = own_name(op);
  const std::string given =
      "`op` is a " + std::string(Py_TYPE(op)->tp_name) + ": pass a name, as in op=\"avg\"";
  try {
    if (!word.empty()) parse_op(word);
  } catch (const ValueError& error) {
    throw TypeError(given + ", or pycomm.premul_sum(factor). " + error.what());
  }
  throw TypeError(given + ", or pycomm.premul_sum(factor)");
}

void take_op(Request& request, PyObject* op) {
  if (!op) return;
  if (PyUnicode_Check(op)) {
    const std::string name = text(op, "op");
    if (name.starts_with("premul_sum"))
      throw ValueError("`op` is '" + name + "': pass an object, as in op=pycomm.premul_sum(0.5)");
    request.call.op = parse_op(name);
    return;
  }
  PyObject* factor = PyObject_GetAttrString(op, "factor");
  if (!factor) {
    PyErr_Clear();
    refuse_op(op);
  }
  request.call.op = Op::sum;
  request.call.prescale = PyFloat_AsDouble(factor) + 0.0;  // -0.0 becomes 0.0: equal calls share a plan
  Py_DECREF(factor);
  if (PyErr_Occurred()) throw py::error_already_set();
}

void take_common(Request& request, const Arguments& args) {
  take_op(request, args[Arg::op]);
  if (args[Arg::algorithm]) request.algorithm = text(args[Arg::algorithm], "algorithm");
  request.call.deterministic = truth(args[Arg::deterministic]);
  if (args[Arg::timeout]) request.timeout_s = seconds(args[Arg::timeout], "timeout");
  if (args[Arg::tag]) request.tag = text(args[Arg::tag], "tag");
  if (args[Arg::stream]) throw ValueError("`stream` is for GPU buffers: CPU buffers have none, leave it out");
}

void check_premul(const Request& request) {
  if (request.call.prescale == 1.0) return;
  if (supports(request.call.dtype, Op::avg)) return;  // avg takes the types that can be scaled
  throw TypeError(std::string("premul_sum scales floats, and the buffer is ") + name(request.call.dtype) +
                  ": convert it to a float type");
}

// ---- buffers: checks, and what each kind of collective takes ----

void require_same_dtype(const Array& x, const Array& out, const std::string& item = "") {
  if (x.dtype == out.dtype) return;
  throw TypeError("`out" + item + "` is " + name(out.dtype) + " where `x" + item + "` is " + name(x.dtype));
}

// Throws unless `out` has the `expected` shape or, if `ranks` is not 0, that of one x for each rank, stacked.
void require_shape(const Array& out, std::span<const int64_t> expected, const Array& x, int ranks,
                   const char* name) {
  if (std::ranges::equal(out.shape, expected)) return;
  std::vector<int64_t> stacked = {ranks};
  stacked.insert(stacked.end(), x.shape.begin(), x.shape.end());
  if (ranks > 0 && std::ranges::equal(out.shape, stacked)) return;
  throw ValueError(std::string("`") + name + "` has shape " + shape_text(out.shape) + " where " +
                   shape_text(expected) + " is needed for x of shape " + shape_text(x.shape));
}

std::vector<int64_t> with_rows(const Array& x, int64_t rows) {
  std::vector<int64_t> shape(x.shape.begin(), x.shape.end());
  if (shape.empty()) shape = {rows};
  shape[0] = rows;
  return shape;
}

// A call is in place if `in` begins at `own_in` and `out` at `own_out`: one is the other, or this rank's
// own part of it. Any other overlap is an error.
void check_overlap(Invocation& call, const char* own_in, const char* own_out) {
  const Array &in = call.in, &out = call.out;
  if (!overlap(in, out)) return;
  const char *a = static_cast<const char*>(in.data), *b = static_cast<const char*>(out.data);
  if (a == own_in && b == own_out) {
    call.request.call.in_place = true;
    return;
  }
  throw ValueError("`x` and `out` overlap in part: pass separate buffers, or the very same one");
}

int64_t sum(std::span<const int64_t> counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

std::vector<int64_t> scaled(std::vector<int64_t> counts, int64_t by) {
  for (int64_t& c : counts) c *= by;
  return counts;
}

// Takes `out`, or makes it in this shape.
void take_out(Invocation& call, PyObject* x, const Arguments& args, const std::vector<int64_t>& shape,
              int ranks) {
  if (args[Arg::out]) {
    call.result = py::reinterpret_borrow<py::object>(args[Arg::out]);
    call.out = get_array(args[Arg::out], "out");
    require_same_dtype(call.in, call.out);
    require_shape(call.out, shape, call.in, ranks, "out");
    require_writable(call.out, "out");
  } else {
    call.result = new_array(x, call.in, shape);
    call.out = get_array(call.result.ptr(), "out");
  }
}

const char* at(const Array& buffer, int64_t element) {
  return static_cast<const char*>(buffer.data) + element * static_cast<int64_t>(size_of(buffer.dtype));
}

// The same elements in and out: all_reduce, broadcast, reduce.
void take_whole(Invocation& call, const PyCommunicator& comm, PyObject* x, const Arguments& args) {
  const schedule::World& world = call.request.call.world;
  const bool receives = world.has(world.traits().out, comm->rank());
  call.in = get_array(x, "x");
  call.request.call.counts.assign(1, call.in.count);
  if (!args[Arg::out]) {
    call.result = call.x;
    call.out = call.in;
    const bool only_sends = world.traits().in.on == Content::On::root && comm->rank() == world.root;
    if (receives && !only_sends) require_writable(call.out, "x");
    call.request.call.in_place = true;
    return;
  }
  call.result = py::reinterpret_borrow<py::object>(args[Arg::out]);
  call.out = get_array(args[Arg::out], "out");
  require_same_dtype(call.in, call.out);
  if (call.out.count != call.in.count) require_shape(call.out, call.in.shape, call.in, 0, "out");
  if (receives) require_writable(call.out, "out");
  check_overlap(call, static_cast<const char*>(call.out.data), static_cast<const char*>(call.in.data));
}

// One block in, all blocks out: all_gather, gather (out at the root only).
void take_gather(Invocation& call, const PyCommunicator& comm, PyObject* x, const Arguments& args) {
  const schedule::World& world = call.request.call.world;
  const bool receives = world.has(world.traits().out, comm->rank());
  call.in = get_array(x, "x");
  const int n = comm->size(), me = comm->rank();
  std::vector<int64_t> rows(n, call.in.rows());
  if (args[Arg::counts]) {
    rows = counts_argument(comm, args[Arg::counts], "counts");
    if (rows[me] != call.in.rows()) {
      throw ValueError("`counts` says that rank " + std::to_string(me) + " gives " +
                       std::to_string(rows[me]) + " rows, and `x` has shape " + shape_text(call.in.shape));
    }
  }
  call.request.call.counts = scaled(rows, call.in.row_elements());
  if (!receives) {
    call.result = py::none();
    return;
  }
  take_out(call, x, args, with_rows(call.in, sum(rows)), args[Arg::counts] ? 0 : n);
  const char* const own = at(call.out, sum(std::span(call.request.call.counts).first(me)));
  check_overlap(call, own, static_cast<const char*>(call.out.data));
}

// All blocks in, one block out: reduce_scatter, scatter (in at the root only).
void take_scatter(Invocation& call, const PyCommunicator& comm, PyObject* x, const Arguments& args) {
  const int n = comm->size(), me = comm->rank();
  const bool gives = call.request.call.world.has(call.request.call.world.traits().in, me);
  std::vector<int64_t> rows;
  if (args[Arg::counts]) rows = counts_argument(comm, args[Arg::counts], "counts");
  if (!gives) {
    if (!args[Arg::out]) {
      throw TypeError(
          "scatter() needs out= on the ranks that receive: it says what they receive (only the root has x)");
    }
    call.result = py::reinterpret_borrow<py::object>(args[Arg::out]);
    call.out = get_array(args[Arg::out], "out");
    call.in.dtype = call.out.dtype;
    require_writable(call.out, "out");
    if (rows.empty()) rows.assign(n, call.out.rows());
    if (rows[me] != call.out.rows()) {
      throw ValueError("`counts` says that rank " + std::to_string(me) + " gets " + std::to_string(rows[me]) +
                       " rows, and `out` has shape " + shape_text(call.out.shape));
    }
    call.request.call.counts = scaled(rows, call.out.row_elements());
    return;
  }
  call.in = get_array(x, "x");
  if (rows.empty()) {
    if (call.in.rows() % n != 0 || call.in.shape.empty()) {
      throw ValueError("`x` has shape " + shape_text(call.in.shape) + ": its first axis does not divide by " +
                       std::to_string(n) + " ranks; pass counts=");
    }
    rows.assign(n, call.in.rows() / n);
  } else if (sum(rows) != call.in.rows()) {
    throw ValueError("`counts` add up to " + std::to_string(sum(rows)) + " rows, and `x` has shape " +
                     shape_text(call.in.shape));
  }
  call.request.call.counts = scaled(rows, call.in.row_elements());
  std::vector<int64_t> shape = with_rows(call.in, rows[me]);
  if (args[Arg::out] && rows[me] == 1) {  // a stacked input: (n, ...) -> (...)
    const Array out = get_array(args[Arg::out], "out");
    const std::vector<int64_t> row(call.in.shape.begin() + 1, call.in.shape.end());
    if (std::ranges::equal(out.shape, row)) shape = row;
  }
  take_out(call, x, args, shape, 0);
  const char* const own = at(call.in, sum(std::span(call.request.call.counts).first(me)));
  check_overlap(call, static_cast<const char*>(call.in.data), own);
}

void take_all_to_all(Invocation& call, const PyCommunicator& comm, PyObject* x, const Arguments& args) {
  const int n = comm->size(), me = comm->rank();
  call.in = get_array(x, "x");
  auto rows_of = [&](Arg arg, const char* name) {
    if (args[arg]) return counts_argument(comm, args[arg], name);
    if (call.in.shape.empty() || call.in.rows() % n != 0) {
      throw ValueError("`x` has shape " + shape_text(call.in.shape) + ": its first axis does not divide by " +
                       std::to_string(n) + " ranks; pass send_counts= and recv_counts=");
    }
    return std::vector<int64_t>(n, call.in.rows() / n);
  };
  if (!args[Arg::send_counts] != !args[Arg::recv_counts]) {
    throw TypeError("all_to_all() takes send_counts and recv_counts together");
  }
  const std::vector<int64_t> send = rows_of(Arg::send_counts, "send_counts"),
                             recv = rows_of(Arg::recv_counts, "recv_counts");
  if (sum(send) != call.in.rows()) {
    throw ValueError("`send_counts` add up to " + std::to_string(sum(send)) + " rows, and `x` has shape " +
                     shape_text(call.in.shape));
  }
  if (send[me] != recv[me]) {
    throw ValueError("rank " + std::to_string(me) + " sends itself " + std::to_string(send[me]) +
                     " rows and receives " + std::to_string(recv[me]));
  }
  const int64_t width = call.in.row_elements();
  // This rank does not know how many rows others exchange among themselves, and its plan does not depend on
  // that: those counts stay 0, except where all ranks exchange equal parts.
  const bool given = args[Arg::send_counts] != nullptr;
  auto& counts = call.request.call.counts;
  counts.assign(static_cast<size_t>(n) * n, given ? 0 : send[0] * width);
  for (int r = 0; r < n; ++r) {
    counts[me * n + r] = send[r] * width;
    counts[r * n + me] = recv[r] * width;
  }
  call.request.call.ragged = given;
  take_out(call, x, args, with_rows(call.in, sum(recv)), 0);
  check_overlap(call, static_cast<const char*>(call.out.data), static_cast<const char*>(call.in.data));
  if (call.request.call.in_place && send != recv) {
    throw ValueError(
        "in place, each rank must receive from a peer as much as it sends to it: pass another `out`");
  }
}

// One end of a message: which arguments are its buffer and its peer, and what the method calls them.
struct Side {
  bool sends;
  Arg buffer, peer;
  const char *buffer_name, *peer_name;
  bool may_be_self = false;
};

void take_message(Invocation& call, const PyCommunicator& comm, const Method& method, const Arguments& args,
                  const Side& side) {
  for (const auto& [arg, name] : {std::pair(side.buffer, side.buffer_name), {side.peer, side.peer_name}}) {
    if (!args[arg]) throw TypeError(std::string(method.name) + "() needs `" + name + "`");
  }
  const int peer = rank_argument(comm, args[side.peer], side.peer_name);
  if (peer == comm->rank() && !side.may_be_self) {
    throw ValueError(std::string("`") + side.peer_name + "` is this rank itself: copy the buffer instead");
  }
  Array buffer = get_array(args[side.buffer], side.buffer_name);
  if (!side.sends) require_writable(buffer, side.buffer_name);
  call.request.call.counts.assign(1, buffer.count);
  call.request.call.world.root = side.sends ? comm->rank() : peer;
  call.request.call.world.peer = side.sends ? peer : comm->rank();
  call.in.dtype = buffer.dtype;
  (side.sends ? call.in : call.out) = buffer;
  call.x = py::reinterpret_borrow<py::object>(args[side.buffer]);
  call.result = side.sends ? py::none() : call.x;
}

thread_local std::vector<int64_t> spare_counts;

}  // namespace

int root_argument(const PyCommunicator& comm, const Arguments& args) {
  return rank_argument(comm, args[Arg::root], "root");
}

void require_alike(const Array& in, const Array& out, const std::string& item) {
  require_same_dtype(in, out, item);
  if (in.count != out.count) require_shape(out, in.shape, in, 0, ("out" + item).c_str());
}

Invocation begin_call(const Method& method, const PyCommunicator& comm, const Arguments& args) {
  Invocation call;
  call.request.call.world.collective = method.collective;
  take_common(call.request, args);
  if (method.allowed & bit(Arg::root)) call.request.call.world.root = root_argument(comm, args);
  return call;
}

void finish_request(Invocation& call) {
  Request& request = call.request;
  request.call.dtype = call.in.dtype;
  request.in = call.in.data;
  request.out = call.out.data;
  check_premul(request);
  if (const std::string& signature = call.in.signature; !signature.empty()) {
    request.tag += (request.tag.empty() ? "" : ", ") + signature;
  }
}

Invocation::Invocation() { request.call.counts.swap(spare_counts); }

bool Invocation::eager(const PyCommunicator& comm) const {
  return comm->threads() || std::max(in.bytes(), out.bytes()) > kShortBytes;
}

void recycle(Invocation& call) { spare_counts.swap(call.request.call.counts); }

Invocation check_call(const Method& method, const PyCommunicator& comm, const Arguments& args) {
  PyObject* x = args[Arg::x];
  const schedule::Traits& traits = schedule::traits(method.collective);
  const bool blocks_of_root = traits.in.holds == Content::Holds::blocks && traits.in.on == Content::On::root;
  const bool needs_x = traits.moves() && !blocks_of_root;
  if (needs_x && !x) throw TypeError(std::string(method.name) + "() needs `x`");
  Invocation call = begin_call(method, comm, args);
  call.x = py::reinterpret_borrow<py::object>(x ? x : Py_None);
  if (!traits.moves()) {
    call.request.call.counts.assign(1, 0);
    call.result = py::none();
  } else if (traits.between_two()) {
    take_message(call, comm, method, args,
                 {std::strcmp(method.name, "send") == 0, Arg::x, Arg::peer, "x", method.peer_name});
  } else if (traits.pairwise) {
    take_all_to_all(call, comm, x, args);
  } else if (traits.in.holds == Content::Holds::own) {
    take_gather(call, comm, x, args);
  } else if (traits.out.holds == Content::Holds::own) {
    if (!x && blocks_of_root && comm->rank() == call.request.call.world.root) {
      throw TypeError("scatter() needs `x` on the root");
    }
    take_scatter(call, comm, x, args);
  } else {
    take_whole(call, comm, x, args);
  }
  finish_request(call);
  return call;
}

std::array<Invocation, 2> check_exchange(const Method& method, const PyCommunicator& comm,
                                         const Arguments& args) {
  std::array<Invocation, 2> calls;
  for (Invocation& call : calls) call = begin_call(method, comm, args);
  auto& [sent, received] = calls;
  const auto me = comm->rank();
  const bool alone = args[Arg::peer] && args[Arg::src] && rank_argument(comm, args[Arg::peer], "dst") == me &&
                     rank_argument(comm, args[Arg::src], "src") == me;
  take_message(sent, comm, method, args, {true, Arg::x, Arg::peer, "x", "dst", alone});
  take_message(received, comm, method, args, {false, Arg::out, Arg::src, "out", "src", alone});
  if (alone) {
    require_same_dtype(sent.in, received.out);
    if (sent.in.count != received.out.count) {
      throw ValueError("`out` has " + std::to_string(received.out.count) + " elements where `x` has " +
                       std::to_string(sent.in.count) + ": this rank sends to itself");
    }
  }
  if (overlap(sent.in, received.out)) {
    throw ValueError("`x` and `out` overlap: what comes would overwrite what has not been sent yet");
  }
  for (Invocation& call : calls) finish_request(call);
  return calls;
}

}  // namespace pycomm::bindings
