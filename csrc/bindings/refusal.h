// Words for what is passed and cannot be taken: on the way to an error, so that none of this need be fast.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <string>

namespace pycomm::bindings {

// Throws TypeError with what to pass in place of this object, which is no buffer (pycomm/checks.py).
[[noreturn]] void refuse(PyObject* object, const char* name);
// Throw for a buffer that cannot be taken as it is, with the remedy.
[[noreturn]] void refuse_masked(const char* name, const char* remedy);
[[noreturn]] void refuse_dtype(const char* name, pybind11::handle dtype);
[[noreturn]] void refuse_swapped(const char* name, const char* remedy);
// `view`: of dense_view.
[[noreturn]] void refuse_strided(const char* name, const char* remedy, const std::string& view = "");
// For one that is elsewhere than on the host, where a group needs it, and than on a GPU, where pycomm.cuda does.
[[noreturn]] void refuse_device(const char* name, const std::string& where);
[[noreturn]] void refuse_outside_gpu(const char* name, const std::string& where);

// A NumPy scalar, whose buffer nothing can be written to.
bool is_number(PyObject* object);
// Throws TypeError for an object of a class of pybind11's whose __init__ has not been called.
void require_made(PyObject* self);

// For elements that lie side by side, with their axes in another order than C's, as in torch's channels_last:
// the view that is in C order, "x.permute(0, 2, 3, 1), which is the same memory, or ". Otherwise nothing.
// Strides count elements, or bytes of which an element has `item`.
std::string dense_view(std::span<const int64_t> shape, const int64_t* strides, const char* method,
                       int64_t item = 1);

// NumPy's dtype of whatever NumPy takes for one but None, which is float64 there. Throws TypeError.
pybind11::object described_dtype(PyObject* object);

// A name for `op` in the error message about an object that is none: of ReduceOp.SUM "SUM", of numpy.add
// "add".
std::string word_for(PyObject* object);

// From then on what pybind11 says to wrong arguments of the functions and methods of the module is said in
// our words (pycomm/signatures.py), and so is that a class cannot be made by hand.
void translate_type_errors(pybind11::module_& module);

}  // namespace pycomm::bindings
