// Checks the arguments of a call before this rank moves, and makes a request of them, ready to be bound.
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

// A method of the communicator that calls a collective: what it takes.
struct Method {
  const char* name;
  schedule::Collective collective;
  uint32_t allowed;       // a bit set of Arg
  int positional;         // how many arguments may be positional
  const char* peer_name;  // "dst" or "src"; null without a peer
  bool persistent;        // binds the call and returns a PersistentOp
};

class Feeding;

// A call after its arguments have been checked.
struct Invocation {
  Invocation();
  // Whether the call gives up the interpreter's lock at once. Calls of at most 32 KiB, but not those of rank
  // threads, keep it until they sleep or yield.
  bool eager(const PyCommunicator& comm) const;

  runtime::Request request;
  Array in, out;                     // empty where this rank has none
  pybind11::object x, result;        // kept alive; what the method returns
  std::function<void()> before;      // on the thread that runs the call, once earlier calls are over
  std::function<void()> then;        // after success
  std::shared_ptr<void> storage;     // coalesced calls: the packed buffer
  std::shared_ptr<Feeding> feeding;  // null without error feedback
};

// Checks a call on one buffer, without its codec, and makes `out` if the call needs one and has none. Throws
// TypeError or ValueError.
Invocation check_call(const Method& method, const PyCommunicator& comm, const Arguments& args);
// The send and the receive of a send_recv.
std::array<Invocation, 2> check_exchange(const Method& method, const PyCommunicator& comm,
                                         const Arguments& args);

// Parts of check_call(), for calls on buffers that lists.cc has read.
Invocation begin_call(const Method& method, const PyCommunicator& comm, const Arguments& args);
void finish_request(Invocation& call);                                 // once `in` and `out` are set
int root_argument(const PyCommunicator& comm, const Arguments& args);  // 0 if none is given
// Throws unless `out` has the type and the count of `in`. `item`: their index in a list, as "[3]", or empty.
void require_alike(const Array& in, const Array& out, const std::string& item);

// Keeps the memory of the call's counts for this thread's next call: nearly all calls have one count.
void recycle(Invocation& call);

}  // namespace pycomm::bindings
