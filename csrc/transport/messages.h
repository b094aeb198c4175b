// What joins ranks of which one maps nothing of the other's memory.
//
// Messages. A channel (sender, receiver, index) delivers in the order of its sends. Nothing is buffered:
// what is sent stays in its sender's memory until the receiver has taken it. Counters say how far a channel
// is.
//
// Status. Each rank publishes a few bytes about itself, which the others see beside all messages, sooner or
// later; of several the last.
//
// Nothing here blocks. `on_news`, which whoever opens an end gives, is called by any thread when a message
// has arrived or one of this end's has been received: to wake whoever waits for it.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace pycomm::transport {

// Ahead of each message: what its sender calls.
struct Header {
  uint64_t call = 0, fingerprint = 0;
  bool operator==(const Header&) const = default;
};

// One rank's end. One thread at a time uses it. What it has sent, and nobody has taken, is gone with it.
class Messages {
 public:
  static constexpr int kChannels = 16;  // per pair, one way

  virtual ~Messages() = default;
  virtual void send(int to, int channel, const Header& header, const void* data, int64_t bytes) = 0;
  // Of the next message, which has arrived; nothing if it has gone again, with its sender's end.
  virtual std::optional<Header> header(int from, int channel) = 0;
  // Takes it; it has this many bytes. False if it has gone.
  virtual bool receive(int from, int channel, void* data, int64_t bytes) = 0;

  // Since the channel was made: how many messages have arrived here, taken or not; of those sent from here,
  // how many the receiver has taken.
  virtual const std::atomic<uint64_t>& arrived(int from, int channel) const = 0;
  virtual const std::atomic<uint64_t>& received(int to, int channel) const = 0;
  // This end's own count of what it has taken and sent.
  virtual uint64_t taken(int from, int channel) const = 0;
  virtual uint64_t sent(int to, int channel) const = 0;

  virtual void publish(std::string_view status) = 0;
  // The last that has arrived from a rank; empty: none since this was asked before.
  virtual std::string status(int from) = 0;
};

}  // namespace pycomm::transport
