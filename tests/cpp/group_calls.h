// Calls on int64 by rank threads, for the tests of groups.
#pragma once

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "rank_threads.h"
#include "schedule/lower/layout.h"

namespace group_calls {

using namespace pycomm;
using namespace pycomm::runtime;

inline void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

inline Request request(Communicator& comm, Collective kind, int64_t count, const int64_t* in, int64_t* out) {
  Request request;
  request.call.world = {.collective = kind, .size = comm.size()};
  request.call.dtype = DType::int64;
  request.call.counts = schedule::uniform_counts(request.call.world, count);
  request.call.in_place = in == out;
  request.in = in;
  request.out = out;
  return request;
}

inline void all_reduce(Communicator& comm, std::vector<int64_t>& data) {
  Patience patience;
  comm.execute(
      request(comm, Collective::all_reduce, static_cast<int64_t>(data.size()), data.data(), data.data()),
      patience);
}

inline void pass(Communicator& comm, int src, int dst, std::vector<int64_t>& data,
                 const std::string& tag = "", double timeout_s = -1) {
  Patience patience;
  Request r =
      request(comm, Collective::send_recv, static_cast<int64_t>(data.size()), data.data(), data.data());
  r.call.in_place = false;
  r.call.world.root = src;
  r.call.world.peer = dst;
  r.tag = tag;
  r.timeout_s = timeout_s;
  comm.execute(r, patience);
}

// The sum over the group of (rank + 1).
inline int64_t total(int size) { return int64_t{size} * (size + 1) / 2; }

}  // namespace group_calls
