#include "bindings/memo.h"

#include <algorithm>
#include <bit>

namespace py = pybind11;

namespace pycomm::bindings {

namespace {

// Whether `f` holds for all arguments that are given but the buffers, and the step, which may always differ.
template <class F>
bool all_others(const Arguments& args, F f) {
  constexpr uint32_t kLeftOut = bit(Arg::x) | bit(Arg::out) | bit(Arg::step);
  for (uint32_t left = args.given & ~kLeftOut; left; left &= left - 1) {
    if (!f(std::countr_zero(left))) return false;
  }
  return true;
}

template <class F>
void for_others(const Arguments& args, F f) {
  all_others(args, [&](int arg) { return f(args.values[arg]), true; });
}

// Whether the object is immutable and refers to nothing: then it has the same value each time, and keeps
// nothing else alive. Strings and numbers are such, and codecs that say so.
bool is_plain(PyObject* object) {
  if (PyUnicode_CheckExact(object) || PyLong_CheckExact(object) || PyFloat_CheckExact(object) ||
      PyBool_Check(object)) {
    return true;
  }
  return py::getattr(object, "__pycomm_plain__", py::bool_(false)).ptr() == Py_True;
}

}  // namespace

bool Memo::Query::read_buffers() {
  PyObject *in = (*args)[Arg::x], *result = (*args)[Arg::out];
  return (!in || peek_array(in, x)) && (!result || peek_array(result, out));
}

void Memo::Place::assign(const Array& buffer) {
  data = buffer.data;
  dtype = buffer.dtype;
  writable = buffer.writable;
  num_dims = buffer.shape.size();
  std::ranges::copy(buffer.shape, shape.begin());
}

bool Memo::Place::is(const Array& buffer) const {
  if (data != buffer.data || dtype != buffer.dtype || writable != buffer.writable ||
      num_dims != buffer.shape.size()) {
    return false;
  }
  for (size_t d = 0; d < num_dims; ++d) {  // they are few: calling memcmp takes longer
    if (shape[d] != buffer.shape[d]) return false;
  }
  return true;
}

Memo::~Memo() {
  for (const Entry& entry : entries_) for_others(entry.args, Py_DecRef);
}

Memo::Entry& Memo::entry_of(const Query& query) {
  auto hash = reinterpret_cast<uintptr_t>(query.method) + reinterpret_cast<uintptr_t>(query.x.data) +
              3 * reinterpret_cast<uintptr_t>(query.out.data);
  for_others(*query.args, [&](PyObject* other) { hash += reinterpret_cast<uintptr_t>(other); });
  return entries_[hash * 0x9e3779b97f4a7c15ULL >> (64 - kLogEntries)];
}

Memo::Use Memo::find(const Query& query) {
  Entry& entry = entry_of(query);
  const Arguments& args = *query.args;
  const bool found = entry.known && entry.generation == generation_ && entry.method == query.method &&
                     entry.args.given == args.given && entry.x.is(query.x) && entry.out.is(query.out) &&
                     all_others(args, [&](int arg) { return entry.args.values[arg] == args.values[arg]; });
  // A run of a call with a codec changes what is bound: one at a time.
  if (!found || (entry.call.bound.coding && entry.uses > 0)) return {};
  return Use(entry);
}

Memo::Use Memo::claim(const Query& query) {
  Entry& entry = entry_of(query);
  const bool keeps = query.x.shape.size() <= kMaxDims && query.out.shape.size() <= kMaxDims &&
                     all_others(*query.args, [&](int arg) { return is_plain(query.args->values[arg]); });
  if (!keeps || entry.uses > 0) return {};
  for_others(*query.args, Py_IncRef);
  for_others(entry.args, Py_DecRef);
  entry.known = false;
  entry.generation = generation_;
  entry.method = query.method;
  entry.x.assign(query.x);
  entry.out.assign(query.out);
  entry.args = *query.args;
  return Use(entry);
}

}  // namespace pycomm::bindings
