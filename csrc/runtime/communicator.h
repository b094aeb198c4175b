// A group of ranks and what it can do: the object behind pycomm.Communicator.
//
// Thread-safe. A group's collectives run one at a time, in the order in which they were made, and so do the
// messages from one rank to another; these sequences run beside each other. A call that finds nothing queued
// takes the group's token and runs at once; asynchronous calls queue up, and whoever waits for one drives all
// that are queued (while nobody does, the progress thread).
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
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "common/caches.h"
#include "runtime/domain.h"
#include "runtime/executor.h"
#include "runtime/heap.h"
#include "runtime/sequence.h"
#include "runtime/token.h"
#include "runtime/waiter.h"
#include "schedule/plan.h"

namespace pycomm::runtime {

// One call as the caller made it. Buffers have been checked for size, contiguity and overlap.
struct Request {
  schedule::Call call;  // placement is found by the communicator
  const void* in = nullptr;
  void* out = nullptr;
  std::shared_ptr<const Coding> coding;  // with a codec
  std::string algorithm;                 // empty: the library chooses
  std::string tag;
  double timeout_s = -1;  // negative: the communicator's
  // What mismatches and errors shall tell: the call that this one is made for, where it is made by the
  // library.
  std::optional<CallRecord> part_of;
};

// A request with its plan, ready to run again and again.
struct Bound {
  std::shared_ptr<const Prepared> prepared;
  Buffers buffers;
  CallRecord record;
  double timeout_s = 0;
  int src = -1, dst = -1;  // send and recv: the pair, in ranks of the group
  std::pair<int, int> sequence() const { return {src, dst}; }
  std::shared_ptr<const Coding> coding;
  std::function<void()> before;       // by whichever thread runs the call, before anything moves
  std::function<void()> then;         // after success, by whichever thread completes the call
  std::shared_ptr<void> keeps_alive;  // asynchronous calls: the caller's buffers
  std::shared_ptr<struct Agreement> agreement;
};

// What ranks tell each other before a call, in a call of its own.
struct Agreement {
  std::vector<int64_t> mine, all;                      // what this rank says, what it hears
  std::function<void(const Bound&)> ask;               // if set, finds what to say
  Bound exchange;                                      // of it
  std::function<const Bound&(const Bound&)> conclude;  // what is to run; may throw
};

// An asynchronous call. It is waited for while its communicator lives; close() completes all.
class Communicator;
class Work {
 public:
  bool is_completed() const { return done_.load(std::memory_order_acquire); }
  // Blocks until completed; throws the call's error. With a timeout throws CommTimeoutError when it passes;
  // the call goes on.
  void wait(double timeout_s, Patience& patience);
  std::exception_ptr exception() const { return is_completed() ? error_ : nullptr; }

 private:
  friend class Communicator;
  Communicator* owner_ = nullptr;
  Bound bound_;
  bool taken_up_ = false;
  std::atomic<bool> done_{false};
  std::exception_ptr error_;
};

class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  static std::shared_ptr<Communicator> join(const transport::Node::Options& options);
  // For rank threads of one process.
  static std::vector<std::shared_ptr<Communicator>> threads(int size, double timeout_s);
  ~Communicator();

  int rank() const { return domain_->rank(); }
  int size() const { return domain_->size(); }
  bool threads() const { return domain_->node().threads(); }
  bool closed() const { return closed_.load(std::memory_order_relaxed); }
  double default_timeout_s() const { return timeout_s_; }

  // Checks, chooses and lowers; moves nothing. Throws ValueError, TypeError.
  // The call's placement, world and operator are filled in.
  Bound bind(Request& request);
  Bound bind(const Request& request) {
    Request mine = request;
    return bind(mine);
  }
  // An all_reduce by other means, bound in the same way (communicator_codecs.cc). `topk`: the k largest of
  // every rank; of request.coding only the residuals count. `shared_int`: integers of `width` bits under
  // scales that the ranks share.
  Bound bind_topk(const Request& request, int64_t k);
  Bound bind_shared_int(const Request& request, int width);
  // The step of the next call with a codec whose caller names none.
  uint32_t codec_step() const { return codec_step_.load(std::memory_order_relaxed); }
  uint32_t take_codec_step() { return codec_step_.fetch_add(1, std::memory_order_relaxed); }
  void run(const Bound& bound, Patience& patience);
  // Two messages (they have no agreements), neither of which waits for the other.
  void run_both(const Bound& first, const Bound& second, Patience& patience);
  std::shared_ptr<Work> submit(Bound bound);
  void execute(Request request, Patience& patience) { run(bind(request), patience); }

  std::string explain(const Request& request);
  // A user's own algorithm, known from now on under its name for this collective. `write` must be pure. Plans
  // it gives are proved before they run.
  void add_algorithm(schedule::Collective collective, const std::string& name,
                     std::function<schedule::Schedule(const schedule::World&)> write);

  // Collective: symmetric memory, the same on every rank.
  std::shared_ptr<Allocation> allocate(int64_t bytes, Patience& patience);
  // Collective: the ranks with this rank's color, ordered by (key, rank); null for a negative color.
  std::shared_ptr<Communicator> split(int64_t color, int64_t key, Patience& patience);
  // Collective among the ranks that are left, also after a failure: their group, in the same order. This one
  // is of no more use.
  std::shared_ptr<Communicator> shrink(Patience& patience);
  // Finishes what is queued. Throws MismatchError if another rank's last call was another one; it is closed
  // all the same.
  void close(Patience& patience);
  void close() {
    Patience none;
    close(none);
  }
  // As close(), with an error on its way: what is queued is not waited for, and fails the group.
  void leave(const std::string& error, Patience& patience);
  // For rank threads: this rank has failed and will make no more calls.
  void abandon();

 private:
  friend class Work;
  Communicator(std::unique_ptr<Domain> domain, double timeout_s);
  void check_usable() const;
  void refuse_child() const;
  std::shared_ptr<const Prepared> prepare(const schedule::Call& call, const std::string& algorithm, int rank);
  std::function<schedule::Schedule(const schedule::World&)> user_algorithm(schedule::Collective collective,
                                                                           const std::string& name) const;
  schedule::Plan make_plan(const schedule::Call& call, const std::string& algorithm, int rank) const;
  std::shared_ptr<Agreement> make_agreement(const Bound& bound, schedule::Collective kind,
                                            std::vector<int64_t> mine);
  std::shared_ptr<Agreement> agree_on_counts(const Bound& bound, const schedule::Call& call);
  std::shared_ptr<const Prepared> prepare_reading(const schedule::Call& call, const std::string& algorithm,
                                                  int rank);
  std::shared_ptr<Agreement> agree_on_reading(const Bound& bound, std::shared_ptr<const Prepared> prepared);

  // Under the token.
  Sequence& sequence_of(const Bound& bound);
  void run_alone(const Bound& bound, Patience& patience);
  void run_both_alone(const Bound& first, const Bound& second, Patience& patience);
  void run_queued(const std::shared_ptr<Work>& work, Patience& patience);
  struct Active {
    std::shared_ptr<Work> work;
    const Bound* bound = nullptr;  // what runs: the work's own, its agreement's exchange, what that concluded
    Sequence* sequence = nullptr;
    Pending pending;
  };
  void start(Active& active, const Bound& bound);
  bool go_on(Active& active, int polls);
  void complete(Active& active);
  void take_up();
  bool advance_all(int polls);
  void complete_some(Patience& patience, const WaitPolicy& policy);
  void join_queue(std::span<Active> begun, Patience& patience);

  void drive(const Work& work, Patience& patience);
  void progress();
  void wake_progress();
  class Holding {  // the token, if it was free or is waited for; whoever waits for it hears when it is free
                   // again
   public:
    enum Wait { wait };
    explicit Holding(Communicator& comm) : comm_(comm), held_(comm.token_.try_lock()) {}
    Holding(Communicator& comm, Wait) : comm_(comm), held_(true) { comm.token_.lock(); }
    ~Holding();
    Holding(const Holding&) = delete;
    Holding& operator=(const Holding&) = delete;
    explicit operator bool() const { return held_; }

   private:
    Communicator& comm_;
    bool held_;
  };
  class Driving {  // while a thread is here that drives what it waits for
   public:
    explicit Driving(Communicator& comm) : comm_(comm) { ++comm_.drivers_; }
    ~Driving();
    Driving(const Driving&) = delete;
    Driving& operator=(const Driving&) = delete;

   private:
    Communicator& comm_;
  };
  std::exception_ptr wait_for_queue(Patience& patience);
  void let_go();
  std::optional<std::string> find_last_mismatch() const;
  void refuse_reentry() const;
  // Everyone's values, rank by rank; all give equally many.
  std::vector<int64_t> exchange(const std::vector<int64_t>& mine, Patience& patience);
  std::vector<int64_t> exchange_extent(const std::vector<int64_t>& mine, int64_t offset, int64_t bytes,
                                       Patience& patience);
  void check_coding(const Request& request) const;
  void finish_coding(const Request& request, Bound& bound) const;
  void deliver_exact_share(const Request& request, Bound& bound) const;
  CallRecord record_of_whole(const Request& request, const std::string& codec) const;
  void find_symmetric(const Request& request, Heap::Place& in, Heap::Place& out) const;
  void learn_cores();
  void learn_caches();
  void learn_single_copy();
  bool gone(int rank) const;

  std::unique_ptr<Domain> domain_;
  double timeout_s_;
  uint64_t fork_generation_;
  WaitPolicy policy_, background_policy_;
  Caches caches_;             // the least that any rank has
  bool single_copy_ = false;  // all ranks can read each other's memory through the kernel
  std::shared_ptr<Heap> heap_;
  std::atomic<bool> closed_{false};
  std::atomic<uint32_t> codec_step_{0};

  // The executor's state, under the token.
  Token token_;
  bool let_go_ = false;
  Sequence collectives_;
  struct Channel {  // of a pair, one way
    explicit Channel(std::unique_ptr<Domain> d) : domain(std::move(d)), messages(*domain) {}
    std::unique_ptr<Domain> domain;
    Sequence messages;
  };
  std::map<std::pair<int, int>, Channel> channels_;
  std::vector<Active> active_;  // the first queued call of each sequence
  std::atomic<int> token_waiters_{0};

  mutable Token cache_mutex_;
  struct CacheEntry {
    schedule::Call call;
    std::string algorithm;
    int rank;
    std::shared_ptr<const Prepared> prepared;
  };
  std::array<CacheEntry, 32> recent_;  // by a cheap hash: what a training loop calls
  std::unordered_multimap<uint64_t, CacheEntry> cache_;
  uint64_t cache_generation_ = 0;  // grows with each algorithm that is added
  struct UserAlgorithm {
    schedule::Collective collective;
    std::string name;
    std::function<schedule::Schedule(const schedule::World&)> write;
  };
  std::vector<UserAlgorithm> user_algorithms_;

  std::mutex queue_mutex_;
  std::condition_variable
      queue_changed_;                  // a call has ended, or the progress thread has given back the token
  std::condition_variable work_left_;  // for the progress thread, while it rests
  std::map<std::pair<int, int>, std::deque<std::shared_ptr<Work>>> queues_;  // by sequence
  std::atomic<uint64_t> queued_{0};                                          // in all of them
  std::atomic<uint64_t> attention_{
      0};  // grows with each call that is queued, and each thread that comes to wait
  std::atomic<int> drivers_{0};
  std::thread progress_;
  bool stopping_ = false, rests_ = false;
};

}  // namespace pycomm::runtime
