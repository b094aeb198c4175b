// The collectives as methods. Hot ones enter here from the interpreter's vectorcall with no Python frame and
// no pybind11 dispatch between; everything is checked before a rank moves.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>

#include "bindings/arguments.h"
#include "bindings/buffer.h"
#include "bindings/docs.h"
#include "bindings/python.h"
#include "common/error.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

using runtime::Bound;
using runtime::Request;
using runtime::Work;
using schedule::Collective;

constexpr int64_t kShortBytes = 32 << 10;  // shorter calls keep the interpreter's lock while they spin

constexpr uint32_t kCommon = bit(Arg::x) | bit(Arg::out) | bit(Arg::algorithm) | bit(Arg::timeout) |
                             bit(Arg::tag) | bit(Arg::async_op) | bit(Arg::stream);
constexpr uint32_t kReduces = kCommon | bit(Arg::op) | bit(Arg::deterministic);

struct Method {
  const char* name;
  Collective collective;
  uint32_t allowed;
  int positional;
  const char* peer_name;
  bool persistent;
};

constexpr Method kAllReduce{"all_reduce", Collective::all_reduce, kReduces, 1, nullptr, false};
constexpr Method kAllReduceInit{
    "all_reduce_init", Collective::all_reduce, kReduces & ~bit(Arg::async_op), 1, nullptr, true};
constexpr Method kReduceScatter{
    "reduce_scatter", Collective::reduce_scatter, kReduces | bit(Arg::counts), 1, nullptr, false};
constexpr Method kAllGather{"all_gather", Collective::all_gather, kCommon | bit(Arg::counts), 1, nullptr,
                            false};
constexpr Method kBroadcast{"broadcast", Collective::broadcast, kCommon | bit(Arg::root), 1, nullptr, false};
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

PyCommunicator& self_of(PyObject* self) {
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  void* value = instance->simple_layout ? instance->simple_value_holder[0] : nullptr;
  return value ? *static_cast<PyCommunicator*>(value) : py::handle(self).cast<PyCommunicator&>();
}

int64_t integer(PyObject* object, const char* name) {
  const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(object));
  if (!index) {
    PyErr_Clear();
    throw TypeError(std::string("`") + name + "` is a " + Py_TYPE(object)->tp_name + ", not an integer");
  }
  const int64_t value = PyLong_AsLongLong(index.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

std::string text(PyObject* object, const char* name) {
  const char* utf8 = PyUnicode_Check(object) ? PyUnicode_AsUTF8(object) : nullptr;
  if (!utf8) {
    PyErr_Clear();
    throw TypeError(std::string("`") + name + "` is a " + Py_TYPE(object)->tp_name + ", not a string");
  }
  return utf8;
}

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
  for (const py::handle item : py::reinterpret_borrow<py::iterable>(object)) {
    counts.push_back(integer(item.ptr(), name));
    if (counts.back() < 0)
      throw ValueError(std::string("`") + name + "` holds " + std::to_string(counts.back()));
  }
  if (static_cast<int>(counts.size()) != comm->size()) {
    throw ValueError(std::string("`") + name + "` has " + std::to_string(counts.size()) + " entries for " +
                     std::to_string(comm->size()) + " ranks");
  }
  return counts;
}

// Memory of a call's counts that waits for this thread's next call: nearly all calls have one count.
thread_local std::vector<int64_t> spare_counts;

// A call after its arguments have been checked.
struct Invocation {
  Invocation() { request.call.counts.swap(spare_counts); }
  Request request;
  Buffer in, out;        // as far as this rank has them
  py::object x, result;  // kept alive; what the method returns
  std::function<void()> then;
  std::shared_ptr<void> storage;  // coalesced calls: the packed buffer
};

void take_op(Request& request, PyObject* op) {
  if (!op) return;
  if (PyUnicode_Check(op)) {
    request.call.op = parse_op(text(op, "op"));
    return;
  }
  PyObject* factor = PyObject_GetAttrString(op, "factor");
  if (!factor) {
    PyErr_Clear();
    throw TypeError(std::string("`op` is a ") + Py_TYPE(op)->tp_name +
                    ": pass a name or pycomm.premul_sum(factor)");
  }
  request.call.op = Op::sum;
  request.call.prescale = PyFloat_AsDouble(factor);
  Py_DECREF(factor);
  if (PyErr_Occurred()) throw py::error_already_set();
}

void take_common(Request& request, const Arguments& args) {
  take_op(request, args[Arg::op]);
  if (args[Arg::algorithm]) request.algorithm = text(args[Arg::algorithm], "algorithm");
  if (args[Arg::deterministic]) {
    const int truth = PyObject_IsTrue(args[Arg::deterministic]);
    if (truth < 0) throw py::error_already_set();
    request.call.deterministic = truth != 0;
  }
  if (args[Arg::timeout]) {
    request.timeout_s = PyFloat_AsDouble(args[Arg::timeout]);
    if (PyErr_Occurred()) throw py::error_already_set();
    if (!(request.timeout_s > 0)) throw ValueError("`timeout` is not a positive number of seconds");
  }
  if (args[Arg::tag]) request.tag = text(args[Arg::tag], "tag");
  if (args[Arg::stream]) throw ValueError("`stream` is for GPU buffers: CPU buffers have none, leave it out");
}

void check_premul(const Request& request) {
  if (request.call.prescale == 1.0) return;
  switch (request.call.dtype) {
    case DType::float32:
    case DType::float64:
    case DType::float16:
    case DType::bfloat16:
    case DType::float8_e4m3fn:
    case DType::float8_e5m2:
    case DType::complex64:
    case DType::complex128:
      return;
    default:
      throw TypeError(std::string("premul_sum scales floats; the buffer is ") + name(request.call.dtype));
  }
}

void require_same_dtype(const Buffer& x, const Buffer& out) {
  if (x.dtype == out.dtype) return;
  throw TypeError(std::string("`out` is ") + name(out.dtype) + " where `x` is " + name(x.dtype));
}

// Shapes that hold `rows` rows like x's: concatenated along axis 0, or stacked (ranks, ...).
void require_shape(const Buffer& out, std::span<const int64_t> expected, const Buffer& x, int ranks,
                   const char* name) {
  if (std::ranges::equal(out.shape, expected)) return;
  std::vector<int64_t> stacked = {ranks};
  stacked.insert(stacked.end(), x.shape.begin(), x.shape.end());
  if (ranks > 0 && std::ranges::equal(out.shape, stacked)) return;
  throw ValueError(std::string("`") + name + "` has shape " + shape_text(out.shape) + " where " +
                   shape_text(expected) + " is needed for x of shape " + shape_text(x.shape));
}

std::vector<int64_t> with_rows(const Buffer& x, int64_t rows) {
  std::vector<int64_t> shape(x.shape.begin(), x.shape.end());
  if (shape.empty()) shape = {rows};
  shape[0] = rows;
  return shape;
}

// `out` may be exactly `in` (or, where `own` says so, that part of the other buffer); any other overlap is an
// error.
void check_overlap(Invocation& call, const char* own_in, const char* own_out) {
  const Buffer &in = call.in, &out = call.out;
  if (!in.data || !out.data || in.bytes() == 0 || out.bytes() == 0) return;
  const char *a = static_cast<const char*>(in.data), *b = static_cast<const char*>(out.data);
  if (a >= b + out.bytes() || b >= a + in.bytes()) return;
  if (a == own_in && b == own_out) {
    call.request.call.in_place = true;
    return;
  }
  throw ValueError("`x` and `out` overlap in part: pass separate buffers, or the very same one");
}

int64_t sum(const std::vector<int64_t>& counts) {
  int64_t total = 0;
  for (int64_t c : counts) total += c;
  return total;
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
    call.out = get_buffer(args[Arg::out], "out");
    require_same_dtype(call.in, call.out);
    require_shape(call.out, shape, call.in, ranks, "out");
    require_writable(call.out, "out");
  } else {
    call.result = new_array(x, call.in, shape);
    call.out = get_buffer(call.result.ptr(), "out");
  }
}

const char* at(const Buffer& buffer, int64_t element) {
  return static_cast<const char*>(buffer.data) + element * static_cast<int64_t>(size_of(buffer.dtype));
}

// x in and out: all_reduce, broadcast, reduce.
void take_whole(Invocation& call, const PyCommunicator& comm, PyObject* x, const Arguments& args) {
  const Collective kind = call.request.call.world.collective;
  const bool receives = kind != Collective::reduce || comm->rank() == call.request.call.world.root;
  call.in = get_buffer(x, "x");
  call.request.call.counts.assign(1, call.in.count);
  if (!args[Arg::out]) {
    call.result = call.x;
    call.out = call.in;
    const bool only_sends = kind == Collective::broadcast && comm->rank() == call.request.call.world.root;
    if (receives && !only_sends) require_writable(call.out, "x");
    call.request.call.in_place = true;
    return;
  }
  call.result = py::reinterpret_borrow<py::object>(args[Arg::out]);
  call.out = get_buffer(args[Arg::out], "out");
  require_same_dtype(call.in, call.out);
  if (call.out.count != call.in.count) require_shape(call.out, call.in.shape, call.in, 0, "out");
  if (receives) require_writable(call.out, "out");
  check_overlap(call, static_cast<const char*>(call.out.data), static_cast<const char*>(call.in.data));
}

// One block in, all out: all_gather, gather (out at the root only).
void take_gather(Invocation& call, const PyCommunicator& comm, PyObject* x, const Arguments& args) {
  const bool receives = call.request.call.world.collective == Collective::all_gather ||
                        comm->rank() == call.request.call.world.root;
  call.in = get_buffer(x, "x");
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
  int64_t before = 0;
  for (int r = 0; r < me; ++r) before += call.request.call.counts[r];
  check_overlap(call, at(call.out, before), static_cast<const char*>(call.out.data));
}

// All blocks in, one out: reduce_scatter, scatter (in at the root only).
void take_scatter(Invocation& call, const PyCommunicator& comm, PyObject* x, const Arguments& args) {
  const int n = comm->size(), me = comm->rank();
  const bool gives =
      call.request.call.world.collective == Collective::reduce_scatter || me == call.request.call.world.root;
  std::vector<int64_t> rows;
  if (args[Arg::counts]) rows = counts_argument(comm, args[Arg::counts], "counts");
  if (!gives) {
    if (!args[Arg::out]) {
      throw TypeError(
          "scatter() needs out= on the ranks that receive: it says what comes (x is the root's alone)");
    }
    call.result = py::reinterpret_borrow<py::object>(args[Arg::out]);
    call.out = get_buffer(args[Arg::out], "out");
    require_writable(call.out, "out");
    if (rows.empty()) rows.assign(n, call.out.rows());
    if (rows[me] != call.out.rows()) {
      throw ValueError("`counts` says that rank " + std::to_string(me) + " gets " + std::to_string(rows[me]) +
                       " rows, and `out` has shape " + shape_text(call.out.shape));
    }
    call.request.call.counts = scaled(rows, call.out.row_elements());
    return;
  }
  call.in = get_buffer(x, "x");
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
    const Buffer out = get_buffer(args[Arg::out], "out");
    const std::vector<int64_t> row(call.in.shape.begin() + 1, call.in.shape.end());
    if (std::ranges::equal(out.shape, row)) shape = row;
  }
  take_out(call, x, args, shape, 0);
  int64_t before = 0;
  for (int r = 0; r < me; ++r) before += call.request.call.counts[r];
  check_overlap(call, static_cast<const char*>(call.in.data), at(call.in, before));
}

void take_all_to_all(Invocation& call, const PyCommunicator& comm, PyObject* x, const Arguments& args) {
  const int n = comm->size(), me = comm->rank();
  call.in = get_buffer(x, "x");
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
  // What others exchange among themselves is not known here, and changes nothing here; but it must not look
  // like equal counts where this rank's are not, nor the reverse.
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

// Several buffers of one type in one call: packed side by side, reduced, unpacked.
void take_list(Invocation& call, std::vector<Buffer> ins, std::vector<Buffer> outs,
               std::shared_ptr<void> keep) {
  int64_t total = 0;
  for (const Buffer& b : ins) total += b.bytes();
  auto storage =
      std::shared_ptr<char>(static_cast<char*>(std::aligned_alloc(64, (total + 64) / 64 * 64)), std::free);
  if (!storage) throw std::bad_alloc();
  char* to = storage.get();
  for (const Buffer& b : ins) {
    std::memcpy(to, b.data, b.bytes());
    to += b.bytes();
  }
  call.in.data = call.out.data = storage.get();
  call.in.dtype = call.out.dtype = ins[0].dtype;
  call.in.count = call.out.count = total / static_cast<int64_t>(size_of(ins[0].dtype));
  call.request.call.counts.assign(1, call.in.count);
  call.request.call.in_place = true;
  call.storage = storage;
  call.then = [outs = std::move(outs), storage, keep = std::move(keep)] {
    const char* from = storage.get();
    for (const Buffer& b : outs) {
      std::memcpy(b.data, from, b.bytes());
      from += b.bytes();
    }
  };
}

void finish_request(Invocation& call) {
  Request& request = call.request;
  request.call.dtype = call.in.data || call.in.count ? call.in.dtype : call.out.dtype;
  request.in = call.in.data;
  request.out = call.out.data;
  check_premul(request);
}

class PyWork {
 public:
  PyWork(std::shared_ptr<Work> work, std::shared_ptr<Handle> handle, py::object result)
      : work_(std::move(work)), handle_(std::move(handle)), result_(std::move(result)) {}
  py::object wait(std::optional<double> timeout) {
    {
      GilPatience patience(true);
      work_->wait(timeout ? *timeout : INFINITY, patience);
    }
    return result_;
  }
  bool is_completed() const { return work_->is_completed(); }
  py::object exception() const {
    const std::exception_ptr error = work_->exception();
    if (!error) return py::none();
    try {
      std::rethrow_exception(error);
    } catch (...) {
      set_python_error();
      py::error_already_set raised;
      return raised.value();
    }
  }

 private:
  std::shared_ptr<Work> work_;
  std::shared_ptr<Handle> handle_;
  py::object result_;
};

// A call bound once; calling it runs it.
struct PersistentOp {
  PyObject_HEAD Bound* bound;
  std::shared_ptr<Handle>* handle;
  PyObject *x, *result;
  bool eager;
};

PyObject* call_persistent(PyObject* self, PyObject* args, PyObject* keywords) {
  auto* op = reinterpret_cast<PersistentOp*>(self);
  if (PyTuple_GET_SIZE(args) != 0 || (keywords && PyDict_GET_SIZE(keywords) != 0)) {
    PyErr_SetString(PyExc_TypeError,
                    "a persistent call takes no arguments: they were bound when it was made");
    return nullptr;
  }
  try {
    GilPatience patience(op->eager);
    (*op->handle)->comm->run(*op->bound, patience);
  } catch (...) {
    set_python_error();
    return nullptr;
  }
  Py_INCREF(op->result);
  return op->result;
}

void free_persistent(PyObject* self) {
  auto* op = reinterpret_cast<PersistentOp*>(self);
  delete op->bound;
  delete op->handle;
  Py_XDECREF(op->x);
  Py_XDECREF(op->result);
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyTypeObject* persistent_type() {
  static PyType_Slot slots[] = {
      {Py_tp_call, reinterpret_cast<void*>(call_persistent)},
      {Py_tp_dealloc, reinterpret_cast<void*>(free_persistent)},
      {Py_tp_doc,
       const_cast<char*>("A call that was bound once: call it to run it again on the same buffers.")},
      {0, nullptr}};
  static PyType_Spec spec = {"pycomm._native.PersistentOp", sizeof(PersistentOp), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  static PyTypeObject* type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
  return type;
}

// All that must live as long as the call may run.
std::shared_ptr<void> exports_of(const Invocation& call, std::shared_ptr<void> objects) {
  return std::make_shared<std::array<std::shared_ptr<void>, 4>>(
      std::array{call.in.exported, call.out.exported, call.storage, std::move(objects)});
}

py::object make_persistent(PyCommunicator& comm, Invocation& call) {
  auto bound = std::make_unique<Bound>(comm->bind(std::move(call.request)));
  bound->keeps_alive = exports_of(call, nullptr);
  auto* op = reinterpret_cast<PersistentOp*>(persistent_type()->tp_alloc(persistent_type(), 0));
  if (!op) throw py::error_already_set();
  op->bound = bound.release();
  op->handle = new std::shared_ptr<Handle>(comm.handle);
  op->x = call.x.release().ptr();
  op->eager = comm->threads() || call.in.bytes() > kShortBytes;
  op->result = call.result.release().ptr();
  return py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(op));
}

py::object keep_of(const Invocation& call, const Arguments& args) {
  return py::make_tuple(call.x, call.result,
                        args[Arg::out] ? py::handle(args[Arg::out]) : py::handle(Py_None));
}

py::object start(PyCommunicator& comm, Invocation& call, const Arguments& args) {
  Bound bound = comm->bind(std::move(call.request));
  bound.then = call.then;
  bound.keeps_alive = exports_of(call, keep_alive(keep_of(call, args)));
  return py::cast(PyWork(comm->submit(std::move(bound)), comm.handle, call.result));
}

void run_now(PyCommunicator& comm, Invocation& call) {
  GilPatience patience(comm->threads() || std::max(call.in.bytes(), call.out.bytes()) > kShortBytes);
  const Bound bound = comm->bind(call.request);
  comm->run(bound, patience);
  spare_counts.swap(call.request.call.counts);
  if (call.then) call.then();
}

bool truth(PyObject* object) {
  if (!object) return false;
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw py::error_already_set();
  return value != 0;
}

// all_reduce([a, b, c]): one call for each element type among them.
py::object all_reduce_list(PyCommunicator& comm, PyObject* list, const Arguments& args) {
  const py::list items(py::reinterpret_borrow<py::object>(list));
  const py::object out_list = py::reinterpret_borrow<py::object>(args[Arg::out] ? args[Arg::out] : list);
  const py::list out_items{out_list};
  if (items.size() != out_items.size()) {
    throw ValueError("`out` has " + std::to_string(out_items.size()) + " buffers for " +
                     std::to_string(items.size()));
  }
  std::vector<std::pair<std::vector<Buffer>, std::vector<Buffer>>> groups;
  for (size_t i = 0; i < items.size(); ++i) {
    Buffer in = get_buffer(items[i].ptr(), "x"), out = get_buffer(out_items[i].ptr(), "out");
    require_writable(out, args[Arg::out] ? "out" : "x");
    require_same_dtype(in, out);
    if (in.count != out.count) require_shape(out, in.shape, in, 0, "out");
    auto group =
        std::find_if(groups.begin(), groups.end(), [&](auto& g) { return g.first[0].dtype == in.dtype; });
    if (group == groups.end()) group = groups.emplace(groups.end());
    group->first.push_back(std::move(in));
    group->second.push_back(std::move(out));
  }
  const bool async = truth(args[Arg::async_op]);
  py::object last = async ? py::none() : out_list;
  std::vector<Invocation> calls;
  const auto keep = keep_alive(py::make_tuple(items, out_items));
  for (auto& [ins, outs] : groups) {
    Invocation& call = calls.emplace_back();
    call.request.call.world.collective = Collective::all_reduce;
    take_common(call.request, args);
    take_list(call, std::move(ins), std::move(outs), keep);
    finish_request(call);
    require(call.request.call.dtype, call.request.call.op);  // of all groups before the first runs
    call.x = py::reinterpret_borrow<py::object>(list);
    call.result = out_list;
  }
  if (calls.empty() && async) throw ValueError("`x` is an empty list: there is nothing to wait for");
  for (Invocation& call : calls) {
    if (async) {
      last = start(comm, call, args);
    } else {
      run_now(comm, call);
    }
  }
  return last;
}

void take_peer(Invocation& call, const PyCommunicator& comm, const Method& method, const Arguments& args) {
  const bool sends = &method == &kSend || std::strcmp(method.name, "send") == 0;
  if (!args[Arg::peer]) throw TypeError(std::string(method.name) + "() needs `" + method.peer_name + "`");
  const int peer = rank_argument(comm, args[Arg::peer], method.peer_name);
  if (peer == comm->rank()) {
    throw ValueError(std::string("`") + method.peer_name + "` is this rank itself: copy the buffer instead");
  }
  Buffer buffer = get_buffer(args[Arg::x], "x");
  if (!sends) require_writable(buffer, "x");
  call.request.call.counts.assign(1, buffer.count);
  call.request.call.world.root = sends ? comm->rank() : peer;
  call.request.call.world.peer = sends ? peer : comm->rank();
  (sends ? call.in : call.out) = buffer;
  call.result = sends ? py::none() : call.x;
}

py::object invoke(const Method& method, PyObject* self, PyObject* const* argv, Py_ssize_t nargs,
                  PyObject* keywords) {
  PyCommunicator& comm = self_of(self);
  const Arguments args = parse_arguments(method.name, method.allowed, method.positional, method.peer_name,
                                         argv, nargs, keywords);
  PyObject* x = args[Arg::x];
  const bool needs_x = method.collective != Collective::barrier && method.collective != Collective::scatter;
  if (needs_x && !x) throw TypeError(std::string(method.name) + "() needs `x`");
  if (method.collective == Collective::all_reduce && x && (PyList_Check(x) || PyTuple_Check(x))) {
    if (method.persistent) throw TypeError("all_reduce_init() takes one buffer; pack the list into one");
    return all_reduce_list(comm, x, args);
  }
  Invocation call;
  call.request.call.world.collective = method.collective;
  call.x = py::reinterpret_borrow<py::object>(x ? x : Py_None);
  take_common(call.request, args);
  if (method.allowed & bit(Arg::root))
    call.request.call.world.root = rank_argument(comm, args[Arg::root], "root");
  switch (method.collective) {
    case Collective::all_reduce:
    case Collective::broadcast:
    case Collective::reduce:
      take_whole(call, comm, x, args);
      break;
    case Collective::all_gather:
    case Collective::gather:
      take_gather(call, comm, x, args);
      break;
    case Collective::reduce_scatter:
    case Collective::scatter:
      if (!x && method.collective == Collective::scatter && comm->rank() == call.request.call.world.root) {
        throw TypeError("scatter() needs `x` on the root");
      }
      take_scatter(call, comm, x, args);
      break;
    case Collective::all_to_all:
      take_all_to_all(call, comm, x, args);
      break;
    case Collective::barrier:
      call.request.call.counts.assign(1, 0);
      call.result = py::none();
      break;
    case Collective::send_recv:
      take_peer(call, comm, method, args);
      break;
  }
  finish_request(call);
  if (method.persistent) return make_persistent(comm, call);
  if (truth(args[Arg::async_op])) return start(comm, call, args);
  run_now(comm, call);
  return std::move(call.result);
}

template <const Method& method>
PyObject* entry(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* keywords) {
  try {
    return invoke(method, self, args, nargs, keywords).release().ptr();
  } catch (...) {
    set_python_error();
    return nullptr;
  }
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
  };
  for (PyMethodDef& def : methods) {
    PyObject* method = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(communicator.ptr()), &def);
    if (!method) throw py::error_already_set();
    communicator.attr(def.ml_name) = py::reinterpret_steal<py::object>(method);
  }
  py::class_<PyWork>(module, "Work",
                     "An asynchronous call. It keeps its buffers alive until it has completed.")
      .def("wait", &PyWork::wait, py::arg("timeout") = py::none(),
           "Blocks until the call has completed and returns what the blocking call returns; raises its "
           "error. With a "
           "timeout in seconds, CommTimeoutError when it passes first; the call goes on.")
      .def("is_completed", &PyWork::is_completed, "Whether the call has completed, with or without an error.")
      .def("exception", &PyWork::exception, "The call's error, or None while it has none.")
      .def(
          "result", [](PyWork& work) { return work.wait(std::nullopt); },
          "Waits, and returns what the blocking call returns.");
  module.attr("PersistentOp") = py::handle(reinterpret_cast<PyObject*>(persistent_type()));
}

}  // namespace pycomm::bindings
