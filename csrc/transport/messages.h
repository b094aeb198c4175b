// All that joins ranks of different nodes, which map nothing of each other's memory.
//
// Messages. A channel (sender, receiver, index) delivers in the order of its sends. Nothing is buffered: data
// stays in its sender's memory until the receiver has taken it. Counters say how far a channel is.
//
// Status. Each rank publishes a few bytes about itself. The others see the last that it has published, sooner
// or later, and also after it has closed its end.
//
// Nothing here blocks, and nothing here asks for progress: an implementation whose wire has to be driven has
// a thread for it. `on_news` of an end is called, by any thread, when a message has arrived there or one that
// it has sent has been received, to wake its rank; it does not call back. Ends that a child of fork() inherits
// are destroyed there without effect.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace pycomm::transport {

// Travels with each message: the call that its sender makes.
struct Header {
  uint64_t call = 0, fingerprint = 0;
  bool operator==(const Header&) const = default;
};

// One rank's end. One thread at a time uses its messages; publish() and status() may be called beside it. Its
// destructor withdraws.
class Messages {
 public:
  static constexpr int kChannels = 16;  // per pair, one way

  virtual ~Messages() = default;
  virtual void send(int to, int channel, const Header& header, const void* data, int64_t bytes) = 0;
  // Of the next message, which has arrived; empty if the message is gone, with its sender's end.
  virtual std::optional<Header> header(int from, int channel) = 0;
  // Takes it; it has this many bytes. False if the message is gone.
  virtual bool receive(int from, int channel, void* data, int64_t bytes) = 0;

  // Since the channel was made: how many messages have arrived here, taken or not; of those sent from here,
  // how many the receiver has taken.
  virtual const std::atomic<uint64_t>& arrived(int from, int channel) const = 0;
  virtual const std::atomic<uint64_t>& received(int to, int channel) const = 0;
  // This end's own count of what it has taken and sent.
  virtual uint64_t taken(int from, int channel) const = 0;
  virtual uint64_t sent(int to, int channel) const = 0;

  // Takes back what this end has sent and nobody has taken: its memory is the sender's again.
  virtual void withdraw() = 0;

  virtual void publish(std::string_view status) = 0;
  // The last status that has arrived from a rank; empty: none since the last call.
  virtual std::string status(int from) = 0;
};

}  // namespace pycomm::transport
