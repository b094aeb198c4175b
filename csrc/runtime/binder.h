// From a request to a bound call: checks, the plan, where the buffers lie, and what ranks have to agree on
// first. Moves nothing. Thread-safe.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "runtime/call.h"
#include "runtime/domain.h"
#include "runtime/fabric.h"
#include "runtime/heap.h"
#include "runtime/plan_cache.h"

namespace pycomm::runtime {

class Binder {
 public:
  // All must outlive it and what it binds. `timeout_s` is that of calls that name none.
  Binder(Domain& group, const Fabric& fabric, const Heap& heap, PlanCache& plans, double timeout_s)
      : domain_(group), fabric_(fabric), heap_(heap), plans_(plans), timeout_s_(timeout_s) {}

  int rank() const { return domain_.rank(); }
  int size() const { return domain_.size(); }

  // Throws ValueError, TypeError. The request's placement, world and operator are filled in.
  Bound bind(Request& request);
  Bound bind(const Request& request) {
    Request mine = request;
    return bind(mine);
  }
  // In words: which plan would run, why, and what it does.
  std::string explain(const Request& request);

 private:
  struct Agreement {
    std::vector<int64_t> mine, all;  // what this rank says, what it hears
  };
  struct Sides {
    bool in = false, out = false;
    bool any() const { return in || out; }
  };
  struct Places;
  Sides sides_in_reach(const schedule::Call& call, bool in_place) const;
  Sides sides_to_tell(const schedule::Call& call, bool in_place) const;
  BoundPlan exchange(const CallRecord& record, Collective kind, Agreement& words);
  void agree_on_counts(Bound& bound);
  std::shared_ptr<const Prepared> prepare_reading(const schedule::Call& call, const std::string& algorithm,
                                                  int rank);
  void agree_on_places(Bound& bound, const std::string& algorithm, Sides told,
                       std::shared_ptr<const Prepared> reading);
  bool reaches_arenas();
  const BoundPlan& use_told(const BoundPlan& own, Places& places, bool in, bool out);

  Domain& domain_;
  const Fabric& fabric_;
  const Heap& heap_;
  PlanCache& plans_;
  const double timeout_s_;
  std::vector<char*> arenas_;  // by rank, when they have been mapped; for the run that is under way
};

}  // namespace pycomm::runtime
