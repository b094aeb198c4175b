// The errors of the library, as C++ exceptions. The bindings turn each into the Python class of the same
// name.
//
// Usage errors (TypeError, ValueError) are thrown before any rank has moved: nothing is lost and the group
// stays usable. A CommError ends the group: the buffers of the failed call are undefined and every later call
// raises AbortedError. A message names the rank, the values and the remedy.
#pragma once

#include <stdexcept>
#include <string>

namespace pycomm {

struct TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct ValueError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// There is not enough memory; raised before any of it is touched. Python's MemoryError.
struct OutOfMemoryError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct CommError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// A peer's process ended, or its communicator was closed, before it had done its part.
struct PeerLostError : CommError {
  using CommError::CommError;
};
// The ranks made different calls.
struct MismatchError : CommError {
  using CommError::CommError;
};
// A peer was stopped or late beyond the deadline.
struct CommTimeoutError : CommError {
  using CommError::CommError;
};
// The group had failed or was closed before this call.
struct AbortedError : CommError {
  using CommError::CommError;
};

}  // namespace pycomm
