// Calls by other means, each bound as one call that is made of others' plans and host work.
#pragma once

#include "runtime/binder.h"

namespace pycomm::runtime {

// Binds the request. Throws TypeError, ValueError.
//
// Of an all_reduce:
// TopK: each rank encodes its k largest elements, gathers all records, and adds them in the order of ranks.
// With segments, elements outside of them are left out, and are zero in the result.
// SharedInt: the ranks agree on every block's largest element, encode, sum the integers, decode.
//
// Of an all_gather and a broadcast:
// Lossless: each rank encodes what it gives; the ranks agree on how much room that takes, and move that many
// bytes; each decodes what it gets. Room is a share of the most that an encode can take (lossless_bound), the
// same for every rank, in steps of kLosslessShares: so a call has few plans, however its data change.
inline constexpr int kLosslessShares = 128;
Bound bind(Binder& binder, Request& request);

}  // namespace pycomm::runtime
