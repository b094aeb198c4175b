// What ranks tell each other right before a call, in a small exchange, where no rank alone knows enough to
// choose the plan: the counts of a ragged all_to_all, and where buffers lie that peers could use in place.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "runtime/call.h"
#include "runtime/domain.h"
#include "runtime/fabric.h"
#include "runtime/plan_cache.h"

namespace pycomm::runtime {

struct Sides {
  bool in = false, out = false;
  bool any() const { return in || out; }
};

// Which buffers of a call peers could use in place, if they lie in memory that all map. All ranks find the
// same. A rank's own slot of the other buffer lies elsewhere on every rank; what only the root has (gather,
// scatter, the output of reduce), and empty blocks, may lie anywhere: these are plain.
Sides sides_in_reach(const schedule::Call& call, bool in_place);

class Agreement {
 public:
  // All must outlive it and the calls that it completes.
  Agreement(Domain& group, const Fabric& fabric, PlanCache& plans)
      : domain_(group), fabric_(fabric), plans_(plans) {}

  // Adds to a bound call of the whole group what ranks must agree on before it, if there is anything.
  // `algorithm`: as the caller named it. `part`: of another call, on memory of the library's own.
  void complete(Bound& bound, const std::string& algorithm, bool part);

  // The plan that reads inputs where they lie; null if there is none, or it does not pay.
  std::shared_ptr<const Prepared> prepare_reading(const schedule::Call& call, const std::string& algorithm);
  // Which plain buffers of a call are worth telling. Ranks may differ in working in place, but not in asking.
  Sides sides_to_tell(const schedule::Call& call, bool in_place) const;

 private:
  struct Words {
    std::vector<int64_t> mine, all;  // what this rank says, what it hears
  };
  struct Places;
  int rank() const { return domain_.rank(); }
  int size() const { return domain_.size(); }
  BoundPlan exchange(const CallRecord& record, Collective kind, Words& words);
  void agree_on_counts(Bound& bound);
  void agree_on_places(Bound& bound, const std::string& algorithm, Sides told,
                       std::shared_ptr<const Prepared> reading);
  bool reaches_arenas();
  const BoundPlan& use_told(const BoundPlan& own, Places& places, bool in, bool out);

  Domain& domain_;
  const Fabric& fabric_;
  PlanCache& plans_;
  std::vector<char*> arenas_;  // by rank, when they have been mapped; for the run that is under way
};

}  // namespace pycomm::runtime
