// Messages between the rank threads of one process: the test of all that MPI between hosts will stand on.
//
// A channel is a queue with one slot. With a seed, messages are delayed, and those of different channels
// overtake each other, in a way that the seed decides; status is not.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "transport/messages.h"

namespace pycomm::transport {

class Loopback {
 public:
  explicit Loopback(std::optional<uint64_t> seed) : seed_(seed) {}
  // The end of rank `me` of `ranks`. Ends that are opened with the same key are those of one group, which
  // lasts until all of its ranks have opened and closed theirs.
  std::unique_ptr<Messages> open(uint64_t key, int ranks, int me, std::function<void()> on_news = {});

 private:
  class Exchange;
  class End;
  const std::optional<uint64_t> seed_;
  std::mutex mutex_;
  std::map<uint64_t, std::shared_ptr<Exchange>> exchanges_;
};

}  // namespace pycomm::transport
