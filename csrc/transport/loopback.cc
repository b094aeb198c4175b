#include "transport/loopback.h"

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <new>
#include <random>
#include <thread>
#include <utility>

#include "transport/node.h"

namespace pycomm::transport {

// All channels of a group. With a seed a thread of its own is the wire: it delivers one message after
// another, after a pause, of whichever channel it draws.
class Loopback::Exchange {
 public:
  Exchange(int ranks, std::optional<uint64_t> seed)
      : ranks_(ranks), channels_(static_cast<size_t>(ranks) * ranks * Messages::kChannels) {
    if (seed) wire_ = std::thread([this, s = *seed] { deliver_slowly(s); });
  }
  ~Exchange() {
    if (forked_since(generation_)) {  // the parent's: its threads are not here, and may have held the mutex
      if (wire_.joinable()) wire_.detach();
      new (&posted_) std::condition_variable;  // the parent's would wait for its waiters
      return;
    }
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
    }
    posted_.notify_all();
    if (wire_.joinable()) wire_.join();
  }

  struct Message {
    Header header;
    const void* data;
    int64_t bytes;
  };
  struct Channel {
    std::deque<Message> posted;   // and not delivered
    std::optional<Message> slot;  // delivered, and not taken
    std::atomic<uint64_t> arrived{0}, received{0};
  };
  Channel& channel(int from, int to, int index) {
    return channels_[(static_cast<size_t>(from) * ranks_ + to) * Messages::kChannels + index];
  }

  void post(Channel& channel, const Message& message) {
    const std::lock_guard lock(mutex_);
    channel.posted.push_back(message);
    if (wire_.joinable()) {
      posted_.notify_all();
    } else {
      deliver(channel);
    }
  }
  Header header(Channel& channel) {
    const std::lock_guard lock(mutex_);
    return channel.slot->header;
  }
  void take(Channel& channel, void* data, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    if (bytes > 0) std::memcpy(data, channel.slot->data, static_cast<size_t>(bytes));
    channel.slot.reset();
    channel.received.fetch_add(1, std::memory_order_release);
    if (wire_.joinable()) {
      posted_.notify_all();
    } else {
      deliver(channel);
    }
  }

 private:
  static bool deliverable(const Channel& channel) { return !channel.slot && !channel.posted.empty(); }
  static void deliver(Channel& channel) {
    if (!deliverable(channel)) return;
    channel.slot = channel.posted.front();
    channel.posted.pop_front();
    channel.arrived.fetch_add(1, std::memory_order_release);
  }

  void deliver_slowly(uint64_t seed) {
    std::mt19937_64 random(seed);
    std::unique_lock lock(mutex_);
    for (;;) {
      std::vector<Channel*> ready;
      for (Channel& channel : channels_) {
        if (deliverable(channel)) ready.push_back(&channel);
      }
      if (ending_) return;
      if (ready.empty()) {
        posted_.wait(lock);
        continue;
      }
      // Most go at once; some are late enough for others to come, and for ranks to fall asleep.
      Channel* const chosen = ready[random() % ready.size()];
      if (const uint64_t drawn = random() % 64; drawn < 4) {
        lock.unlock();
        std::this_thread::sleep_for(std::chrono::microseconds(drawn == 0 ? 1000 : 50));
        lock.lock();
      }
      deliver(*chosen);
    }
  }

  const uint64_t generation_ = fork_generation();
  const int ranks_;
  std::vector<Channel> channels_;
  std::mutex mutex_;
  std::condition_variable posted_;  // or taken, or ending
  bool ending_ = false;
  std::thread wire_;
};

class Loopback::End : public Messages {
 public:
  End(std::shared_ptr<Exchange> exchange, int ranks, int me)
      : exchange_(std::move(exchange)), me_(me), sent_(ranks * kChannels), taken_(ranks * kChannels) {}

  void send(int to, int channel, const Header& header, const void* data, int64_t bytes) override {
    ++sent_[to * kChannels + channel];
    exchange_->post(exchange_->channel(me_, to, channel), {header, data, bytes});
  }
  Header header(int from, int channel) override {
    return exchange_->header(exchange_->channel(from, me_, channel));
  }
  void receive(int from, int channel, void* data, int64_t bytes) override {
    ++taken_[from * kChannels + channel];
    exchange_->take(exchange_->channel(from, me_, channel), data, bytes);
  }
  const std::atomic<uint64_t>& arrived(int from, int channel) const override {
    return exchange_->channel(from, me_, channel).arrived;
  }
  const std::atomic<uint64_t>& received(int to, int channel) const override {
    return exchange_->channel(me_, to, channel).received;
  }
  uint64_t taken(int from, int channel) const override { return taken_[from * kChannels + channel]; }
  uint64_t sent(int to, int channel) const override { return sent_[to * kChannels + channel]; }

 private:
  std::shared_ptr<Exchange> exchange_;
  const int me_;
  std::vector<uint64_t> sent_, taken_;
};

std::unique_ptr<Messages> Loopback::open(int64_t key, int ranks, int me) {
  const std::lock_guard lock(mutex_);
  std::erase_if(exchanges_, [](const auto& entry) { return entry.second.expired(); });
  std::weak_ptr<Exchange>& known = exchanges_[key];
  std::shared_ptr<Exchange> exchange = known.lock();
  if (!exchange) known = exchange = std::make_shared<Exchange>(ranks, seed_);
  return std::make_unique<End>(std::move(exchange), ranks, me);
}

}  // namespace pycomm::transport
