// Puts `codec=` and `step=` of a call into its request. Python keeps the names, the options and the error
// feedback (pycomm/codecs).
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

// The error feedback of a call. To be used under the interpreter's lock.
class Feeding {
 public:
  Feeding(pybind11::object comm, pybind11::object feedback, pybind11::object places, int64_t count,
          bool of_torch);
  // Takes the residuals that the next run uses. If it throws ValueError, `coding` is as it was.
  void renew(runtime::Coding& coding);
  // begun() comes before a run, after the last check; started() after an asynchronous run has its Work.
  void begun() const { feedback_.attr("begun")(comm_, residuals_); }
  void started(const pybind11::object& work) const { residuals_.attr("start")(work); }

 private:
  pybind11::object comm_, feedback_, places_, residuals_;
  int64_t count_;
  bool of_torch_;
};

// The tensors in a buffer, as a codec has to know them.
struct Parts {
  bool whole = true;  // the buffer is one tensor, and the lists are empty; else each tensor has entries there
  std::vector<std::string> names;
  std::vector<kernels::Segment> segments;
  std::vector<pybind11::object> shapes;
};

// The codec of a call.
class Coder {
 public:
  // Throws TypeError, ValueError. `args` must outlive it.
  Coder(const char* collective, const Arguments& args);

  bool feeds() const { return !feedback_.is_none(); }
  // Throws TypeError for elements or an operator that no codec takes, even if all tensors are exempt.
  void check(const runtime::Request& request) const;
  void check_item(DType dtype, const std::string& item) const;  // of a list
  // Names for the items of a list, made from the tag. Throws ValueError if error feedback needs names and the
  // call has no tag.
  std::vector<std::string> names(const std::vector<size_t>& items) const;
  // The tensors in `x` if it is a bucket; else `x` is one tensor.
  Parts parts_of(PyObject* x) const;
  // The tensors that error feedback exempts from the codec, ascending.
  std::vector<size_t> exempt(const Parts& parts) const;
  // The names and shapes of the exempt tensors in words, for ranks to compare.
  static std::string signature(const Parts& parts, const std::vector<size_t>& exempt);
  // Puts the codec into the request of a call on `count` elements, without the `exempt` tensors. `x` holds
  // the elements, or is one of the buffers that were packed. Returns null without error feedback.
  std::shared_ptr<Feeding> code(runtime::Request& request, const Parts& parts,
                                const std::vector<size_t>& exempt, PyObject* x, int64_t count) const;

 private:
  const Arguments& args_;
  pybind11::object codec_, feedback_;
};

// The codec that `codec=` names, as plans carry it. Throws ValueError for those that no plan
// carries.
Codec native_codec(const pybind11::object& codec, const char* collective);

uint32_t step_argument(PyObject* step);  // 32 bits; throws TypeError, ValueError

void add_coding(pybind11::module_& module, pybind11::class_<PyCommunicator>& communicator);

}  // namespace pycomm::bindings
