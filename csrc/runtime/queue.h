// Runs a rank's calls on one group: at once where nothing is queued, else as part of the queue.
//
// A group's collectives run one at a time, in the order in which they were made, and so do the messages
// from one rank to another; these sequences run beside each other. A call that finds nothing queued takes
// the group's token and runs at once. Asynchronous calls queue up, and whoever waits for one drives all
// that are queued; while nobody does, the progress thread.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/call.h"
#include "runtime/execution.h"
#include "runtime/fabric.h"
#include "runtime/token.h"

namespace pycomm::runtime {

// An asynchronous call. It is waited for while its queue lives; stop() completes all.
class Queue;
class Work {
 public:
  bool is_completed() const { return done_.load(std::memory_order_acquire); }
  // Blocks until completed; throws the call's error. With a timeout throws CommTimeoutError when it passes;
  // the call goes on.
  void wait(double timeout_s, Patience& patience);
  std::exception_ptr exception() const { return is_completed() ? error_ : nullptr; }
  // Runs once, soon after the call has completed, on the thread that drove it, which has given up the
  // group's token by then and may call; at once on this thread if it has completed. Callbacks of a work run
  // in the order in which they were added. `callback` must not throw.
  void on_completion(std::function<void()> callback);

 private:
  friend class Queue;
  Queue* owner_ = nullptr;
  Bound bound_;  // empty for a call whose caller waits, and keeps it
  bool taken_up_ = false;
  std::atomic<bool> done_{false};
  std::exception_ptr error_;
  std::vector<std::function<void()>> callbacks_;  // under the queue's mutex
};

class Queue {
 public:
  // All must outlive it.
  Queue(Domain& group, Sequences& sequences, const Fabric& fabric)
      : domain_(group), sequences_(sequences), fabric_(fabric) {}
  ~Queue();
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  // Blocks until the call has ended; throws its error. The caller's buffers are its own again then.
  void run(const Bound& call, Patience& patience);
  // Two messages, neither of which waits for the other.
  void run_both(const Bound& first, const Bound& second, Patience& patience);
  // A short call is begun by the thread that makes it: peers find its data sooner, and where their data is
  // there already, no other thread has to wake up for it.
  std::shared_ptr<Work> submit(Bound bound);

  // A rank that has begun to send to this one what no call here receives, in turn if several have; -1: none.
  // Does not look at the ranks in `skip`. Throws ValueError in a group on several nodes, where that is not
  // known, and PeerLostError if a rank has ended, or all others have closed.
  int find_sender(const std::vector<int>& skip);

  bool idle() const { return queued_.load(std::memory_order_acquire) == 0; }
  bool forked() const { return transport::forked_since(fork_generation_); }
  bool on_progress_thread() const { return std::this_thread::get_id() == progress_.get_id(); }
  bool closed() const { return closed_.load(std::memory_order_relaxed); }
  double progress_seconds();  // of processor time
  // Throw CommError in a child of fork(); in a call's own wait, as in a signal handler; unless calls can be
  // made.
  void refuse_child() const;
  void refuse_reentry() const;
  void check_usable();

  // Takes no more calls, and returns when what is queued has ended; false if that was done before. A caller's
  // interrupt fails what is queued, and is left in `interrupted`. Throws CommError on the progress thread.
  bool stop(Patience& patience, std::exception_ptr& interrupted);

  // Holds the token: if it was free, or after waiting for it. Its end wakes threads that wait for the token,
  // and runs the callbacks of works that have completed under it.
  class Holding {
   public:
    enum Wait { wait };
    explicit Holding(Queue& queue) : queue_(queue), held_(queue.token_.try_lock()) {}
    Holding(Queue& queue, Wait) : queue_(queue), held_(true) { queue.token_.lock(); }
    ~Holding();
    Holding(const Holding&) = delete;
    Holding& operator=(const Holding&) = delete;
    explicit operator bool() const { return held_; }

   private:
    Queue& queue_;
    bool held_;
  };

 private:
  friend class Work;
  class Driving {  // while a thread is here that drives what it waits for
   public:
    explicit Driving(Queue& queue) : queue_(queue) { ++queue_.drivers_; }
    ~Driving();
    Driving(const Driving&) = delete;
    Driving& operator=(const Driving&) = delete;

   private:
    Queue& queue_;
  };
  struct Active {
    std::shared_ptr<Work> work;
    Execution execution;
  };

  template <size_t N>
  void run_all(const std::array<const Bound*, N>& calls, Patience& patience);
  template <size_t N>
  void run_at_once(const std::array<const Bound*, N>& calls, Patience& patience);
  void run_queued(std::span<const Bound* const> calls, Patience& patience);
  void wait_for(const std::shared_ptr<Work>& work, Patience& patience);

  // Under the token.
  void join(std::span<const Execution> begun, Patience& patience);
  void settle();
  void take_up();
  bool go_on(Active& active, int polls);
  void complete(Active& active);
  bool advance_all(int polls);
  void complete_some(Patience& patience, const WaitPolicy& policy);

  void drive(const Work& work, Patience& patience);
  void progress();
  void wake_progress();
  void deliver();

  Domain& domain_;
  Sequences& sequences_;
  const Fabric& fabric_;
  const uint64_t fork_generation_ = transport::fork_generation();
  std::atomic<bool> closed_{false};

  Token token_;
  int last_sender_ = 0;         // that find_sender found; under the token
  std::vector<Active> active_;  // the first queued call of each sequence
  std::atomic<int> token_waiters_{0};

  std::mutex mutex_;
  std::condition_variable changed_;    // a call has ended, or the progress thread has given back the token
  std::condition_variable work_left_;  // for the progress thread, while it rests
  std::map<std::pair<int, int>, std::deque<std::shared_ptr<Work>>> queues_;  // by sequence
  std::atomic<uint64_t> queued_{0};                                          // in all of them
  std::atomic<uint64_t> attention_{
      0};  // grows with each call that is queued, and each thread that comes to wait
  std::atomic<int> drivers_{0};
  std::vector<std::function<void()>> due_;  // callbacks of works that have completed
  std::atomic<bool> any_due_{false};
  std::thread progress_;
  bool stopping_ = false, rests_ = false;
};

}  // namespace pycomm::runtime
