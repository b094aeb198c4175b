// A group of ranks and what it can do: the object behind pycomm.Communicator. Thread-safe.
//
// A facade: requests are bound to plans by a Binder, plans come from a PlanCache, calls run through a Queue
// over the group's Sequences, in the shared memory of its Domain. How a group comes to be: bootstrap.h.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "runtime/binder.h"
#include "runtime/composites.h"
#include "runtime/domain.h"
#include "runtime/fabric.h"
#include "runtime/heap.h"
#include "runtime/plan_cache.h"
#include "runtime/queue.h"
#include "runtime/sequence.h"

namespace pycomm::runtime {

class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  Communicator(std::unique_ptr<Domain> domain, const Fabric& fabric, double timeout_s);
  ~Communicator();

  int rank() const { return domain_->rank(); }
  int size() const { return domain_->size(); }
  // Where this rank lies among the group's nodes.
  struct Place {
    int local_rank, local_size, num_nodes;
  };
  Place place() const;
  bool threads() const { return domain_->group().node->threads(); }
  bool closed() const { return queue_.closed(); }
  bool on_progress_thread() const { return queue_.on_progress_thread(); }
  double default_timeout_s() const { return timeout_s_; }
  Domain& domain() const { return *domain_; }

  // Checks, chooses and lowers; moves nothing. Throws ValueError, TypeError. The request's placement, world
  // and operator are filled in.
  Bound bind(Request& request) {
    queue_.check_usable();
    return runtime::bind(binder_, request);
  }
  Bound bind(const Request& request) {
    Request mine = request;
    return bind(mine);
  }
  // The step of the next call with a codec that is counted.
  uint32_t codec_step() const { return codec_step_.load(std::memory_order_relaxed); }

  // A call with a codec changes its Bound, which one thread at a time may run.
  void run(Bound& bound, Patience& patience) {
    if (bound.coding) [[unlikely]]
      count(bound);
    queue_.run(bound, patience);
  }
  // Two messages, neither of which waits for the other.
  void run_both(const Bound& first, const Bound& second, Patience& patience) {
    queue_.run_both(first, second, patience);
  }
  std::shared_ptr<Work> submit(Bound bound) {
    if (bound.coding) count(bound);
    return queue_.submit(std::move(bound));
  }
  int find_sender(const std::vector<int>& skip) { return queue_.find_sender(skip); }
  void execute(Request request, Patience& patience) {
    Bound bound = bind(request);
    run(bound, patience);
  }

  // From now on logs this rank's collectives, the latest `capacity` of them; 0: no more. A collective call,
  // since ranks note for each other when they enter calls.
  void log_calls(size_t capacity, Patience& patience);
  CallLog::Taken take_log();
  // The processor time that the progress thread has taken so far.
  double progress_seconds() { return queue_.progress_seconds(); }

  std::string explain(const Request& request) { return binder_.explain(request); }
  // See PlanCache.
  void add_algorithm(Collective collective, const std::string& name, PlanCache::Write write) {
    plans_.add_algorithm(collective, name, std::move(write));
  }

  // Collective: everyone's values, rank by rank; all give equally many. Errors name `method`, which the user
  // called; ranks that call different ones get MismatchError.
  std::vector<int64_t> exchange(const char* method, const std::vector<int64_t>& mine, Patience& patience);
  // Collective: symmetric memory, the same on every rank.
  std::shared_ptr<Allocation> allocate(int64_t bytes, Patience& patience);
  // Collective: the ranks with this rank's color, ordered by (key, rank); null for a negative color.
  std::shared_ptr<Communicator> split(int64_t color, int64_t key, Patience& patience);
  // Collective among the ranks that are left, also after a failure: their group, in the same order. This
  // one is of no more use.
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
  friend std::shared_ptr<Communicator> join(const transport::Node::Options& options);  // it finds fabric_ out

  void count(Bound& bound) {
    if (bound.coding->counted) bound.set_step(codec_step_.fetch_add(1, std::memory_order_relaxed));
  }
  void let_go();
  std::optional<std::string> await_receipts(Patience& patience);
  std::optional<std::string> find_last_mismatch() const;
  std::vector<int64_t> exchange_extent(const char* method, const std::vector<int64_t>& mine, int64_t offset,
                                       int64_t bytes, Patience& patience);
  std::vector<int> on_this_node(const std::vector<int>& ranks) const;
  // This rank's communicator of a new group, whose memory lies at `offset` of its node.
  std::shared_ptr<Communicator> group_of(const std::vector<int>& members, int64_t offset, GroupKey key) const;
  bool gone(int rank) const { return domain_->board().gone(rank); }

  std::unique_ptr<Domain> domain_;
  const double timeout_s_;
  Fabric fabric_;
  std::shared_ptr<Heap> heap_;
  std::atomic<uint32_t> codec_step_{0};
  std::atomic<uint64_t> splits_{0};
  bool shrunk_ = false;
  Sequences sequences_;  // under the queue's token, and so is let_go_
  bool let_go_ = false;
  std::unique_ptr<CallLog> log_;
  PlanCache plans_;
  Binder binder_;
  Queue queue_;
};

}  // namespace pycomm::runtime
