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

// All channels of a group, and what its ranks tell. With a seed a thread of its own is the wire: it delivers one message after
// another, after a pause, of whichever channel it draws.
class Loopback::Exchange {
 public:
  Exchange(int ranks, std::optional<uint64_t> seed)
      : ranks_(ranks), channels_(static_cast<size_t>(ranks) * ranks * Messages::kChannels), states_(ranks) {
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

  void open(int me, std::function<void()> on_news) {
    const std::lock_guard lock(mutex_);
    states_[me].on_news = std::move(on_news);
    states_[me].seen.resize(ranks_);
  }
  void withdraw(int me) {
    const std::lock_guard lock(mutex_);
    for (int to = 0; to < ranks_; ++to) {
      for (int index = 0; index < Messages::kChannels; ++index) {
        channel(me, to, index).posted.clear();
        channel(me, to, index).slot.reset();
      }
    }
  }
  bool close(int me) {  // true: it was the last
    withdraw(me);
    const std::lock_guard lock(mutex_);
    states_[me].on_news = {};
    return ++closed_ == ranks_;
  }

  void publish(int me, std::string_view status) {
    const std::lock_guard lock(mutex_);
    states_[me].status = status;
    ++states_[me].published;
  }
  std::string status(int me, int from) {
    const std::lock_guard lock(mutex_);
    const bool news =
        std::exchange(states_[me].seen[from], states_[from].published) != states_[from].published;
    return news ? states_[from].status : std::string();
  }

  void post(int from, int to, int index, const Message& message) {
    const std::lock_guard lock(mutex_);
    channel(from, to, index).posted.push_back(message);
    if (wire_.joinable()) {
      posted_.notify_all();
    } else {
      deliver(to, channel(from, to, index));
    }
  }
  std::optional<Header> header(int from, int to, int index) {
    const std::lock_guard lock(mutex_);
    const std::optional<Message>& slot = channel(from, to, index).slot;
    return slot ? std::optional(slot->header) : std::nullopt;
  }
  bool take(int from, int to, int index, void* data, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    Channel& taken = channel(from, to, index);
    if (!taken.slot) return false;
    if (bytes > 0) std::memcpy(data, taken.slot->data, static_cast<size_t>(bytes));
    taken.slot.reset();
    taken.received.fetch_add(1, std::memory_order_release);
    tell(from);
    if (wire_.joinable()) {
      posted_.notify_all();
    } else {
      deliver(to, taken);
    }
    return true;
  }

 private:
  // One rank's.
  struct State {
    std::function<void()> on_news;
    std::string status;
    uint64_t published = 0;      // how many of these
    std::vector<uint64_t> seen;  // of the other ranks' published
  };

  static bool deliverable(const Channel& channel) { return !channel.slot && !channel.posted.empty(); }
  void tell(int rank) {
    if (states_[rank].on_news) states_[rank].on_news();
  }
  void deliver(int to, Channel& channel) {
    if (!deliverable(channel)) return;
    channel.slot = channel.posted.front();
    channel.posted.pop_front();
    channel.arrived.fetch_add(1, std::memory_order_release);
    tell(to);
  }

  void deliver_slowly(uint64_t seed) {
    std::mt19937_64 random(seed);
    std::unique_lock lock(mutex_);
    for (;;) {
      std::vector<size_t> ready;
      for (size_t i = 0; i < channels_.size(); ++i) {
        if (deliverable(channels_[i])) ready.push_back(i);
      }
      if (ending_) return;
      if (ready.empty()) {
        posted_.wait(lock);
        continue;
      }
      // Most go at once; some are late enough for others to come, and for ranks to fall asleep.
      const size_t chosen = ready[random() % ready.size()];
      if (const uint64_t drawn = random() % 64; drawn < 4) {
        lock.unlock();
        std::this_thread::sleep_for(std::chrono::microseconds(drawn == 0 ? 1000 : 50));
        lock.lock();
      }
      deliver(static_cast<int>(chosen / Messages::kChannels) % ranks_, channels_[chosen]);
    }
  }

  const uint64_t generation_ = fork_generation();
  const int ranks_;
  std::vector<Channel> channels_;
  std::vector<State> states_;
  int closed_ = 0;
  std::mutex mutex_;
  std::condition_variable posted_;  // or taken, or ending
  bool ending_ = false;
  std::thread wire_;
};

class Loopback::End : public Messages {
 public:
  End(Loopback& loopback, uint64_t key, std::shared_ptr<Exchange> exchange, int ranks, int me)
      : loopback_(loopback),
        key_(key),
        exchange_(std::move(exchange)),
        me_(me),
        sent_(ranks * kChannels),
        taken_(ranks * kChannels) {}
  ~End() override {
    if (forked_since(generation_) || !exchange_->close(me_)) return;
    const std::lock_guard lock(loopback_.mutex_);
    loopback_.exchanges_.erase(key_);
  }

  void send(int to, int channel, const Header& header, const void* data, int64_t bytes) override {
    ++sent_[to * kChannels + channel];
    exchange_->post(me_, to, channel, {header, data, bytes});
  }
  std::optional<Header> header(int from, int channel) override {
    return exchange_->header(from, me_, channel);
  }
  bool receive(int from, int channel, void* data, int64_t bytes) override {
    if (!exchange_->take(from, me_, channel, data, bytes)) return false;
    ++taken_[from * kChannels + channel];
    return true;
  }
  const std::atomic<uint64_t>& arrived(int from, int channel) const override {
    return exchange_->channel(from, me_, channel).arrived;
  }
  const std::atomic<uint64_t>& received(int to, int channel) const override {
    return exchange_->channel(me_, to, channel).received;
  }
  uint64_t taken(int from, int channel) const override { return taken_[from * kChannels + channel]; }
  uint64_t sent(int to, int channel) const override { return sent_[to * kChannels + channel]; }

  void withdraw() override { exchange_->withdraw(me_); }
  void publish(std::string_view status) override { exchange_->publish(me_, status); }
  std::string status(int from) override { return exchange_->status(me_, from); }

 private:
  Loopback& loopback_;  // which outlives it: the node's network
  const uint64_t key_;
  std::shared_ptr<Exchange> exchange_;
  const int me_;
  const uint64_t generation_ = fork_generation();
  std::vector<uint64_t> sent_, taken_;
};

std::unique_ptr<Messages> Loopback::open(uint64_t key, int ranks, int me, std::function<void()> on_news) {
  const std::lock_guard lock(mutex_);
  std::shared_ptr<Exchange>& exchange = exchanges_[key];
  if (!exchange) exchange = std::make_shared<Exchange>(ranks, seed_);
  exchange->open(me, std::move(on_news));
  return std::make_unique<End>(*this, key, exchange, ranks, me);
}

}  // namespace pycomm::transport
