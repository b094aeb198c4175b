// Calls that are made as several: lists of buffers, and buckets of which error feedback exempts tensors.
#pragma once

#include <vector>

#include "bindings/invocation.h"

namespace pycomm::bindings {

// The calls that make up this one, in the order in which they run; all of them are bound before the first
// does. Throws TypeError or ValueError.
//
// A list (all_reduce, broadcast) is one call for each element type among its buffers, of a packed copy, and
// one for each large buffer, where a copy costs more than a call. With a codec all are packed, but what is
// exempt goes apart, uncompressed.
std::vector<Invocation> check_calls(const Method& method, const PyCommunicator& comm, const Arguments& args);

}  // namespace pycomm::bindings
