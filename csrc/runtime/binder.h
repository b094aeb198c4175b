// From a request to a bound call: checks, the plan, where the buffers lie, and what ranks have to agree on
// first (agreement.h). Moves nothing. Thread-safe.
#pragma once

#include <string>

#include "runtime/agreement.h"
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
      : domain_(group),
        fabric_(fabric),
        heap_(heap),
        plans_(plans),
        timeout_s_(timeout_s),
        agreement_(group, fabric, plans) {}

  int rank() const { return domain_.rank(); }
  int size() const { return domain_.size(); }
  Domain& domain() const { return domain_; }

  // Throws ValueError, TypeError. The request's placement, world and operator are filled in.
  Bound bind(Request& request);
  Bound bind(const Request& request) {
    Request mine = request;
    return bind(mine);
  }
  // In words: which plan would run, why, and what it does.
  std::string explain(const Request& request);

 private:
  Domain& domain_;
  const Fabric& fabric_;
  const Heap& heap_;
  PlanCache& plans_;
  const double timeout_s_;
  Agreement agreement_;
};

}  // namespace pycomm::runtime
