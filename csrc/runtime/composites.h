// All-reduces by other means, each bound as one call that is made of others' plans and host work.
#pragma once

#include "runtime/binder.h"

namespace pycomm::runtime {

// The k largest elements of every rank: encode, gather all records, add them up in the order of ranks. Of
// request.coding only the residuals count. Throws TypeError, ValueError.
Bound bind_topk(Binder& binder, const Request& request, int64_t k);

// Integers of `width` bits under scales that the ranks share: agree on every block's largest element,
// encode, sum the integers, decode. Throws TypeError, ValueError.
Bound bind_shared_int(Binder& binder, const Request& request, int width);

}  // namespace pycomm::runtime
