// Errors for arguments that cannot be taken. Nothing here has to be fast.
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
// `view` is what dense_view() returned.
[[noreturn]] void refuse_strided(const char* name, const char* remedy, const std::string& view = "");
// For a buffer in the wrong memory, `where`: a group needs it on the host, pycomm.cuda on a GPU.
[[noreturn]] void refuse_device(const char* name, const std::string& where);
[[noreturn]] void refuse_outside_gpu(const char* name, const std::string& where);

// Whether the object is a NumPy scalar, whose buffer cannot be written to.
bool is_number(PyObject* object);
// Throws TypeError for an object of a pybind11 class if its __init__ has not been called.
void require_made(PyObject* self);

// If the elements lie side by side, but with their axes in another order than C's (torch's channels_last):
// words for the view in C order, "x.permute(0, 2, 3, 1), a view of the same memory, or ". Else "". `item`
// is the stride between adjacent elements: 1, or an element's bytes if strides count bytes.
std::string dense_view(std::span<const int64_t> shape, const int64_t* strides, const char* method,
                       int64_t item = 1);

// numpy.dtype(object). Throws TypeError if NumPy refuses the object, and for None, which NumPy would accept.
pybind11::object described_dtype(PyObject* object);

// The name that an object has for itself, or "": "SUM" for torch's ReduceOp.SUM, "add" for numpy.add.
std::string own_name(PyObject* object);

// Replaces pybind11's errors about wrong arguments of the module's functions and methods by ours
// (pycomm/signatures.py), and its error about a class that cannot be made by hand. To be called last.
void translate_type_errors(pybind11::module_& module);

}  // namespace pycomm::bindings
