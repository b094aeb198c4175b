#include "bindings/arguments.h"

#include <cstring>
#include <string>
#include <vector>

#include "common/error.h"
#include "common/words.h"
#include "schedule/collective.h"

namespace py = pybind11;

namespace pycomm::bindings {

namespace {
// "peer" is no keyword: each method has its own name for the peer, dst or src.
constexpr auto kPeer = static_cast<size_t>(Arg::peer);
constexpr std::array<const char*, kNumArgs> kNames = {
    "x",        "peer",   "out",  "src",    "op",          "algorithm",   "deterministic", "timeout", "tag",
    "async_op", "stream", "root", "counts", "send_counts", "recv_counts", "codec",         "step"};

// The argument that a keyword names, or kNumArgs. Keywords in calls are interned, so comparing pointers
// nearly always suffices.
size_t find_argument(PyObject* keyword, const char* peer_name) {
  static const auto interned = [] {
    std::array<PyObject*, kNumArgs> made{};
    for (size_t i = 0; i < kNumArgs; ++i) made[i] = PyUnicode_InternFromString(kNames[i]);
    return made;
  }();
  const auto is_peer = [&](const char* text) { return peer_name && std::strcmp(text, peer_name) == 0; };
  for (size_t i = 0; i < kNumArgs; ++i) {
    if (keyword == interned[i] && i != kPeer) return is_peer(kNames[i]) ? kPeer : i;
  }
  const char* text = PyUnicode_AsUTF8(keyword);
  if (!text) throw pybind11::error_already_set();
  if (is_peer(text)) return kPeer;
  for (size_t i = 0; i < kNumArgs; ++i) {
    if (std::strcmp(text, kNames[i]) == 0 && i != kPeer) return i;
  }
  return kNumArgs;
}

// "`name` is VALUE", or "`name` is a TYPE" if the value would fill a line.
std::string name_and_value(PyObject* object, const char* name) {
  constexpr size_t kLongest = 80;
  std::string shown = pybind11::repr(object).cast<std::string>();
  if (shown.size() > kLongest || shown.find('\n') != std::string::npos) {
    shown = std::string("a ") + Py_TYPE(object)->tp_name;
  }
  return std::string("`") + name + "` is " + shown;
}

[[noreturn]] void refuse_keyword(const char* method, uint32_t allowed, const char* peer_name,
                                 const std::string& keyword) {
  std::vector<std::string_view> known;
  std::string all;
  for (size_t i = 0; i < kNumArgs; ++i) {
    if (!(allowed >> i & 1)) continue;
    known.emplace_back(i == kPeer ? peer_name : kNames[i]);
    all += (all.empty() ? "" : ", ") + std::string(known.back());
  }
  // torch.distributed calls the root src or dst.
  const bool rooted = allowed & bit(Arg::root) && (keyword == "src" || keyword == "dst");
  throw TypeError(std::string(method) + "() got an unexpected keyword argument '" + keyword + "'" +
                  did_you_mean(rooted ? "root" : keyword, known) + ": it takes " + all);
}
}  // namespace

const char* name_of(Arg arg) { return kNames[static_cast<size_t>(arg)]; }

Arguments parse_arguments(const char* method, uint32_t allowed, int positional, const char* peer_name,
                          PyObject* const* args, Py_ssize_t nargs, PyObject* keywords) {
  Arguments result;
  const auto set = [&](size_t arg, PyObject* value) {
    if (value == Py_None) return;
    result.values[arg] = value;
    result.given |= 1u << arg;
  };
  if (nargs > positional) {
    throw TypeError(std::string(method) + "() takes " + std::to_string(positional) + " positional argument" +
                    (positional == 1 ? "" : "s") + " but " + std::to_string(nargs) +
                    " were given: name the others, as in op=\"avg\" or out=y");
  }
  for (Py_ssize_t i = 0; i < nargs; ++i) {
    set(static_cast<size_t>(i), args[i]);
  }
  const Py_ssize_t num_keywords = keywords ? PyTuple_GET_SIZE(keywords) : 0;
  for (Py_ssize_t k = 0; k < num_keywords; ++k) {
    PyObject* key = PyTuple_GET_ITEM(keywords, k);
    const size_t found = find_argument(key, peer_name);
    if (found == static_cast<size_t>(Arg::codec) && !(allowed >> found & 1)) {
      throw TypeError(std::string(method) + "() takes no codec: " + schedule::codec_collectives() + " do");
    }
    if (found == kNumArgs || !(allowed >> found & 1)) {
      refuse_keyword(method, allowed, peer_name, text(key, "keyword"));
    }
    if (static_cast<Py_ssize_t>(found) < nargs) {
      throw TypeError(std::string(method) + "() got multiple values for argument '" + text(key, "keyword") +
                      "'");
    }
    set(found, args[nargs + k]);
  }
  return result;
}

int64_t integer(PyObject* object, const char* name) {
  const pybind11::object index = pybind11::reinterpret_steal<pybind11::object>(PyNumber_Index(object));
  if (!index) {
    PyErr_Clear();
    throw TypeError(name_and_value(object, name) + ": pass an integer");
  }
  const int64_t value = PyLong_AsLongLong(index.ptr());
  if (value == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    throw ValueError(name_and_value(object, name) + ": pass an integer that fits in 64 bits");
  }
  return value;
}

double seconds(PyObject* object, const char* name, bool or_zero) {
  const double value = PyFloat_AsDouble(object);
  const bool number = !PyErr_Occurred() && !PyBool_Check(object);
  PyErr_Clear();
  if (!number) throw TypeError(name_and_value(object, name) + ": pass seconds, as a number");
  if (or_zero && !(value >= 0)) throw ValueError(name_and_value(object, name) + ": pass seconds, 0 or more");
  if (!or_zero && !(value > 0)) {
    throw ValueError(name_and_value(object, name) +
                     ": pass a positive number of seconds, or float(\"inf\") for no deadline");
  }
  return value;
}

std::string text(PyObject* object, const char* name) {
  if (!PyUnicode_Check(object)) throw TypeError(name_and_value(object, name) + ": pass a string");
  Py_ssize_t length = 0;
  const char* utf8 = PyUnicode_AsUTF8AndSize(object, &length);
  if (!utf8 || std::memchr(utf8, 0, static_cast<size_t>(length))) {
    PyErr_Clear();
    throw ValueError(std::string("`") + name + "` is " +
                     py::reinterpret_steal<py::object>(PyObject_ASCII(object)).cast<std::string>() +
                     ": pass a string that is UTF-8 and has no null character");
  }
  return {utf8, static_cast<size_t>(length)};
}

bool truth(PyObject* object) {
  if (!object) return false;
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw pybind11::error_already_set();
  return value != 0;
}

}  // namespace pycomm::bindings
