// When the calls of a group began and ended, and whom they waited for; kept while somebody wants to know.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "runtime/domain.h"

namespace pycomm::runtime {

// Nanoseconds of the steady clock, which the processes of a machine share.
int64_t now_ns();

struct CallTimes {
  uint64_t number = 0;  // of the call's own plan, in the group
  std::string collective, algorithm, codec, tag;
  int64_t bytes = 0;  // of the count that the call was made with
  int64_t started = 0, finished = 0;
  // When the first and the last of the node's other ranks entered the call, and which one was last; -1: none.
  int64_t first_arrival = 0, last_arrival = 0;
  int last_rank = -1;
};

// Thread-safe.
class CallLog {
 public:
  // The latest `capacity` calls are kept.
  explicit CallLog(size_t capacity) : capacity_(capacity) {}
  // The call, which has ended on this rank and was described so.
  void add(const Domain& group, uint64_t number, const CallRecord& record, int64_t started);
  // What has been added since the last take, oldest first, and how many before these had to go.
  struct Taken {
    std::vector<CallTimes> calls;
    uint64_t dropped;
  };
  Taken take();

 private:
  const size_t capacity_;
  std::mutex mutex_;
  std::deque<CallTimes> calls_;
  uint64_t dropped_ = 0;
};

}  // namespace pycomm::runtime
