// Calls that run as several: those on lists, and those on buckets with tensors that error feedback exempts.
#pragma once

#include <vector>

#include "bindings/invocation.h"

namespace pycomm::bindings {

// The calls that make up a call of `method`, in the order in which they run. All of them must be bound
// before the first one runs. Throws TypeError or ValueError.
//
// A list (all_reduce, broadcast) takes one call on a packed copy for each element type among its buffers,
// and one call for each large buffer, whose copy would cost more than a call. With a codec all buffers are
// packed, and those that are exempt have a call of their own, without the codec.
std::vector<Invocation> check_calls(const Method& method, const PyCommunicator& comm, const Arguments& args);

}  // namespace pycomm::bindings
