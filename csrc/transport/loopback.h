// Messages between the rank threads of one process: the second user of what MPI will be, and its test.
//
// A channel is a queue with one slot. With a seed, messages are delayed, and those of different channels
// overtake each other, in a way that the seed decides.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "transport/messages.h"

namespace pycomm::transport {

class Loopback {
 public:
  explicit Loopback(std::optional<uint64_t> seed) : seed_(seed) {}
  // The end of rank `me` of `ranks`. Ends that are opened with the same key are those of one group; the
  // key's group lasts as long as one of its ends.
  std::unique_ptr<Messages> open(int64_t key, int ranks, int me);

 private:
  class Exchange;
  class End;
  const std::optional<uint64_t> seed_;
  std::mutex mutex_;
  std::map<int64_t, std::weak_ptr<Exchange>> exchanges_;
};

}  // namespace pycomm::transport
