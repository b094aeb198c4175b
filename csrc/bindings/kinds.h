// What is to be known of an object's type before its memory says what the object means. A type is asked once.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/dlpack.h"

namespace pycomm::bindings {

struct Kind {
  const dlpack::ExchangeApi* exchange = nullptr;  // the table for exchange without Python calls
  // The type's methods, or null: torch defers conjugation and negation, and its memory then holds something
  // else than its elements.
  PyObject* is_conj = nullptr;
  PyObject* is_neg = nullptr;
  PyObject* requires_grad = nullptr;  // the type's property, or null
  bool masked = false;                // NumPy's masked arrays: of some elements the memory does not count
  bool immutable = false;             // JAX's arrays, which their DLPack capsules do not say
  bool unmade = false;                // torch's parameters of lazy modules, which have no shape yet
  bool of_torch = false;              // a tensor, also of a torch that has no table yet
};

const Kind& kind_of(PyTypeObject* type);

// Throws unless the elements that `object` has exported are in its memory as they are: ValueError for lazy
// bits, TypeError for a type of its own that DLPack calls int8 or uint8 (torch.int4).
void require_computed(const Kind& kind, PyObject* object, DType dtype, const char* name);

// Whether autograd has computed `object` from others: it would not notice that its memory is written.
bool is_in_graph(const Kind& kind, PyObject* object);

}  // namespace pycomm::bindings
