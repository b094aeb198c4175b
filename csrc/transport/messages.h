// Messages between ranks of which one maps nothing of the other's memory.
//
// A channel (sender, receiver, index) delivers in the order of its sends. Nothing is buffered: what is sent
// stays in its sender's memory until the receiver has taken it. Nothing here blocks; counters say how far a
// channel is.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace pycomm::transport {

// Ahead of each message: what its sender calls.
struct Header {
  uint64_t call = 0, fingerprint = 0;
  bool operator==(const Header&) const = default;
};

// One rank's end of all its channels. One thread at a time uses it.
class Messages {
 public:
  static constexpr int kChannels = 16;  // per pair, one way

  virtual ~Messages() = default;
  virtual void send(int to, int channel, const Header& header, const void* data, int64_t bytes) = 0;
  // The next message, which has arrived.
  virtual Header header(int from, int channel) = 0;
  // Takes it; it has this many bytes.
  virtual void receive(int from, int channel, void* data, int64_t bytes) = 0;

  // Since the channel was made: how many messages have arrived here, taken or not; of those sent from here,
  // how many the receiver has taken.
  virtual const std::atomic<uint64_t>& arrived(int from, int channel) const = 0;
  virtual const std::atomic<uint64_t>& received(int to, int channel) const = 0;
  // This end's own count of what it has taken and sent.
  virtual uint64_t taken(int from, int channel) const = 0;
  virtual uint64_t sent(int to, int channel) const = 0;
};

}  // namespace pycomm::transport
