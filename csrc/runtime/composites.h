// All-reduces by other means, each bound as one call that is made of others' plans and host work.
#pragma once

#include "runtime/binder.h"

namespace pycomm::runtime {

// Binds the request, an all_reduce if it is a composite. Throws TypeError, ValueError.
//
// TopK: each rank encodes its k largest elements, gathers all records, and adds them in the order of ranks.
// With segments, elements outside of them are left out, and are zero in the result.
// SharedInt: the ranks agree on every block's largest element, encode, sum the integers, decode.
Bound bind(Binder& binder, Request& request);

}  // namespace pycomm::runtime
