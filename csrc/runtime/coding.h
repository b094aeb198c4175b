// Calls with codecs: what they ask for besides their plans.
#pragma once

#include <string>

#include "runtime/call.h"

namespace pycomm::runtime {

// A codec takes these elements and this operator. Throws TypeError that names `codec`.
void check_floats(const schedule::Call& call, const std::string& codec);
// All that can be said of a request with `coding` before it has a plan. Throws TypeError, ValueError.
void check_coding(const Request& request);
// Tells the record how the call encodes, and adds what no plan does; the rest of `bound` is there. Throws
// ValueError.
void finish_coding(const Request& request, int rank, Bound& bound);

// Ranks that encode in other ways, or in another step, do not make the same call: `codec` is told and
// compared.
void tell(CallRecord& record, const std::string& codec);
// ", error feedback", with its scale; empty without.
std::string feedback_words(const Coding& coding);

}  // namespace pycomm::runtime
