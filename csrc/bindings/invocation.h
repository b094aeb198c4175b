// The arguments of a call, checked, before any rank has moved: from Python objects to a request that only has
// to be bound.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <functional>
#include <memory>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/array.h"
#include "bindings/python.h"

namespace pycomm::bindings {

// A collective as a method of the communicator: what it takes.
struct Method {
  const char* name;
  schedule::Collective collective;
  uint32_t allowed;       // a bit set of Arg
  int positional;         // how many of them may come without a keyword
  const char* peer_name;  // "dst" or "src"; null where there is no peer
  bool persistent;        // binds the call and returns it
};

class Feeding;

// A call after its arguments have been checked.
struct Invocation {
  Invocation();
  // Whether it gives the interpreter's lock up at once: calls of at most 32 KiB keep it until they sleep or yield.
  bool eager(const PyCommunicator& comm) const;

  runtime::Request request;
  Array in, out;                     // as far as this rank has them
  pybind11::object x, result;        // kept alive; what the method returns
  std::function<void()> before;      // by whoever runs the call, when those before it are over
  std::function<void()> then;        // after success
  std::shared_ptr<void> storage;     // coalesced calls: the packed buffer
  std::shared_ptr<Feeding> feeding;  // with error feedback
};

// One buffer; no codec. Makes `out` where the call has none and needs one. Throws TypeError or ValueError.
Invocation check_call(const Method& method, const PyCommunicator& comm, const Arguments& args);
// send_recv: the send and the receive.
std::array<Invocation, 2> check_exchange(const Method& method, const PyCommunicator& comm,
                                         const Arguments& args);

// What check_call() is made of, for calls on buffers that lists.cc has got.
Invocation begin_call(const Method& method, const PyCommunicator& comm, const Arguments& args);
void finish_request(Invocation& call);                                 // once `in` and `out` are known
int root_argument(const PyCommunicator& comm, const Arguments& args);  // 0 where none is given
// Throws unless `out` takes what `in` holds; `item` is as in "[3]" where they are of lists.
void require_alike(const Array& in, const Array& out, const std::string& item);

// Gives the memory of the call's counts to this thread's next call: nearly all calls have one count.
void recycle(Invocation& call);

}  // namespace pycomm::bindings
