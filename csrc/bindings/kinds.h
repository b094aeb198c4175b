// What must be known of an object's type before its memory can be read. Each type is inspected once.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/dlpack.h"

namespace pycomm::bindings {

struct Kind {
  const dlpack::ExchangeApi* exchange = nullptr;  // the table for exchange without Python calls
  // Methods of torch's types, or null. Torch defers conjugation and negation: until it has computed them,
  // memory does not hold a tensor's elements.
  PyObject* is_conj = nullptr;
  PyObject* is_neg = nullptr;
  PyObject* requires_grad = nullptr;  // the type's property, or null
  bool masked = false;                // NumPy's masked arrays: some elements do not count
  bool immutable = false;             // JAX's arrays; their DLPack capsules do not say so
  bool uninitialized = false;         // torch's parameters of lazy modules, which have no shape yet
  bool of_torch = false;              // a tensor, also of a torch that has no table yet
};

const Kind& kind_of(PyTypeObject* type);

// Throws unless the object's memory holds the elements that it has exported: ValueError if conjugation or
// negation is deferred, TypeError for a type such as torch.int4, which DLPack calls int8 or uint8.
void require_computed(const Kind& kind, PyObject* object, DType dtype, const char* name);

// Whether autograd has computed `object` from other tensors: it would not notice that its memory is written.
bool is_in_graph(const Kind& kind, PyObject* object);

}  // namespace pycomm::bindings
