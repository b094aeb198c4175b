// `codec=` and `step=` of a call. Names, options and error feedback are Python's (pycomm/codecs); here they
// go into the request.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/array.h"
#include "bindings/python.h"
#include "runtime/coding.h"

namespace pycomm::bindings {

inline constexpr uint32_t kCodecArguments = bit(Arg::codec) | bit(Arg::step);

// The error feedback of a call. Its objects are touched under the interpreter's lock alone.
class Feeding {
 public:
  Feeding(pybind11::object comm, pybind11::object feedback, pybind11::object places, int64_t count,
          bool of_torch);
  // Takes the residuals that the next run uses. If it throws ValueError, `coding` is as it was.
  void renew(runtime::Coding& coding);
  // Before a run of which nothing is refused any more; and after it, with its Work, if it is asynchronous.
  void begun() const { feedback_.attr("begun")(comm_, residuals_); }
  void started(const pybind11::object& work) const { residuals_.attr("start")(work); }

 private:
  pybind11::object comm_, feedback_, places_, residuals_;
  int64_t count_;
  bool of_torch_;
};

// What a codec has to know of the tensors in a buffer.
struct Parts {
  bool whole = true;  // the buffer is one tensor; else these are all in it
  std::vector<std::string> names;
  std::vector<kernels::Segment> segments;
  std::vector<pybind11::object> shapes;
};

// A call's codec.
class Coder {
 public:
  // Throws TypeError, ValueError. `args` outlives it.
  Coder(const char* collective, const Arguments& args);

  bool feeds() const { return !feedback_.is_none(); }
  // Throws TypeError for elements or an operator that no codec takes, also where all is exempt.
  void check(const runtime::Request& request) const;
  // Names for the items of a list. Throws ValueError where the tag must tell them and there is none.
  std::vector<std::string> names(const std::vector<size_t>& items) const;
  // The tensors in `x`, if it is a bucket.
  Parts parts_of(PyObject* x) const;
  // Which of them are reduced uncompressed, ascending.
  std::vector<size_t> exempt(const Parts& parts) const;
  // What ranks compare of them besides their elements.
  static std::string signature(const Parts& parts, const std::vector<size_t>& exempt);
  // Puts the codec into the request of a call on `count` elements; `exempt` parts are left out. `x`: what
  // holds the elements, or was packed. Null: without error feedback.
  std::shared_ptr<Feeding> code(runtime::Request& request, const Parts& parts,
                                const std::vector<size_t>& exempt, PyObject* x, int64_t count) const;

 private:
  const Arguments& args_;
  pybind11::object codec_, feedback_;
};

// The codec that plans carry, of what `codec=` names. Throws ValueError for one that no plan carries.
Codec native_codec(const pybind11::object& codec, const char* collective);

uint32_t step_argument(PyObject* step);  // 32 bits; throws TypeError, ValueError

void add_coding(pybind11::module_& module, pybind11::class_<PyCommunicator>& communicator);

}  // namespace pycomm::bindings
