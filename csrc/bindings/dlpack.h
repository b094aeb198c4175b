// Tensors of other libraries as DLPack describes them, on the host and on devices.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "bindings/elements.h"
#include "common/dtype.h"

namespace pycomm::bindings::dlpack {

// DLPack 1.3's structures, as far as they are read here.
struct Device {
  int32_t type, id;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};
struct Version {
  uint32_t major, minor;
};
struct ManagedVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Tensor tensor;
};
struct ExchangeApi {
  Version version;
  void* previous;
  void* allocate;
  int (*managed_from_object)(void*, void**);
  void* to_object;
  int (*tensor_from_object)(void* object, Tensor* out);
};

enum Code : uint8_t {
  kInt = 0,
  kUint = 1,
  kFloat = 2,
  kBfloat = 4,
  kComplex = 5,
  kBool = 6,
  kE4M3FN = 10,
  kE5M2 = 12
};
inline constexpr int32_t kCpu = 1, kCuda = 2, kCudaManaged = 13;  // device types

std::optional<DType> dtype_of(uint8_t code, uint32_t bits, uint16_t lanes);

// The tensor's elements, as checked() leaves them; throws TypeError for an unknown element type as well.
// `name` is the argument's name.
Elements read(const Tensor& tensor, const char* name);

// What `object.__dlpack_device__()` returns; the object exports nothing. Throws TypeError.
Device device_of(PyObject* object, const char* name);

// What `object.__dlpack__()` exports. The capsule owns the tensor: nobody takes it from there.
struct Export {
  pybind11::object capsule;
  const Tensor* tensor;
  bool read_only, copied;  // false if the exporter does not say: before DLPack 1.0 none did
};
// `on_gpu`: the exporter is told not to synchronise streams, since the caller does. Throws TypeError.
Export export_of(PyObject* object, bool on_gpu, const char* name);

}  // namespace pycomm::bindings::dlpack
