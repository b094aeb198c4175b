#include "runtime/plan_cache.h"

#include <algorithm>
#include <utility>

#include "common/env.h"
#include "common/error.h"
#include "common/hash.h"
#include "common/log.h"
#include "runtime/select.h"
#include "schedule/lower/lower.h"
#include "schedule/verify/verify.h"

namespace pycomm::runtime {

namespace {

constexpr size_t kCachedPlans = 1024;

uint64_t hash_of(const schedule::Call& call, const std::string& algorithm, int rank) {
  Hasher h;
  schedule::add(h, call);
  h.add(algorithm).add(rank);
  return h.digest();
}

// Throws ValueError that says which algorithms can.
void require_codecs(const schedule::Call& call, const std::string& algorithm) {
  const Collective collective = call.world.collective;
  using schedule::Algorithm;
  const bool wire = call.codec.links == Links::wire;
  const auto can = wire ? +[](const Algorithm& a) { return a.wire; }
                        : +[](const Algorithm& a) { return a.codecs != Algorithm::Codecs::none; };
  if (can(schedule::find_algorithm(collective, algorithm))) return;
  const std::string others = schedule::algorithms_that(collective, can);
  throw ValueError(std::string(schedule::name(collective)) + " algorithm \"" + algorithm +
                   (wire ? "\" carries no codec between nodes only (@wire); " : "\" carries no codec; ") +
                   (others.empty() ? schedule::codec_collectives() + " have algorithms that do"
                                   : "those that do are " + others));
}

// "all_reduce of 7 float32 (sum) on 3 ranks, in place".
std::string describe(const schedule::Call& call) {
  std::string text = schedule::name(call.world.collective);
  const schedule::Traits& traits = call.world.traits();
  if (traits.moves()) {
    text += " of " + std::to_string(call.counts[0]) + " " + name(call.dtype);
  }
  if (traits.reduces) text += std::string(" (") + name(call.op) + ")";
  text += " on " + std::to_string(call.world.size) + " ranks";
  if (call.world.root != 0) text += ", root " + std::to_string(call.world.root);
  return text + (call.in_place ? ", in place" : "");
}

}  // namespace

PlanCache::Write PlanCache::user_algorithm(Collective collective, const std::string& name) const {
  const std::lock_guard lock(mutex_);
  for (const UserAlgorithm& user : user_algorithms_) {
    if (user.collective == collective && user.name == name) return user.write;
  }
  return nullptr;
}

schedule::Plan PlanCache::lower_and_prove(const schedule::Call& call, const std::string& algorithm,
                                          int rank) const {
  const Geometry geometry = host_geometry(size_, fabric_.profile);
  const auto write = user_algorithm(call.world.collective, algorithm);
  if (call.deterministic && (write || !schedule::find_algorithm(call.world.collective, algorithm).balanced)) {
    throw ValueError("algorithm \"" + algorithm +
                     "\" does not sum in the balanced order that deterministic=True "
                     "asks for; leave algorithm out, or name one that does (docs/algorithms.md)");
  }
  if (call.coded() && !write) require_codecs(call, algorithm);
  const bool prove = write || env().verify;
  const auto wrong = [&](const std::string& what) {
    return ValueError("algorithm \"" + algorithm + "\" is wrong: " + describe(call) + ": " + what);
  };
  schedule::Plan plan;
  if (write) {
    const schedule::Schedule written = write(call.world);
    try {
      plan = schedule::lower(written, algorithm, call, geometry, -1);
    } catch (const ValueError& error) {  // steps that are no schedule at all
      throw wrong(error.what());
    }
  } else {
    plan = schedule::make_plan(algorithm, call, geometry, prove ? -1 : rank);
  }
  if (prove) {
    if (const auto found = schedule::verify(plan, {.balanced = call.deterministic})) throw wrong(found->what);
    for (int r = 0; r < call.world.size; ++r) {
      if (r != rank) plan.programs[r] = {};
    }
  }
  return plan;
}

std::shared_ptr<const Prepared> PlanCache::prepare(const schedule::Call& call, const std::string& algorithm,
                                                   int rank) {
  Entry& recent = recent_[(static_cast<uint64_t>(call.counts[0]) * 0x9e3779b97f4a7c15ULL >> 59 ^
                           static_cast<uint64_t>(call.world.collective)) %
                          recent_.size()];
  uint64_t key = 0, generation = 0;
  {
    const std::lock_guard lock(mutex_);
    generation = generation_;
    if (recent.prepared && recent.rank == rank && recent.call == call && recent.algorithm == algorithm) {
      return recent.prepared;
    }
    key = hash_of(call, algorithm, rank);
    for (auto [at, end] = all_.equal_range(key); at != end; ++at) {
      const Entry& entry = at->second;
      if (entry.rank == rank && entry.call == call && entry.algorithm == algorithm) {
        recent = entry;
        return entry.prepared;
      }
    }
  }
  // Without the lock: a user's algorithm may be Python, which lets other threads run meanwhile, and they may
  // call.
  const std::string chosen =
      algorithm.empty() ? select(call, fabric_.profile, fabric_.policy.yield).algorithm : algorithm;
  auto prepared = std::make_shared<const Prepared>(lower_and_prove(call, chosen, rank), rank);
  CallRecord made = prepared->record;
  if (call.codec.kind != CodecKind::none) tell(made, codec_words(call.codec), false);
  log(LogLevel::trace, "new plan: ", describe(made));
  const std::lock_guard lock(mutex_);
  if (generation != generation_) return prepared;  // an algorithm of this name may be another by now
  if (all_.size() >= kCachedPlans) all_.clear();
  recent = {call, algorithm, rank, prepared};
  all_.emplace(key, recent);
  return prepared;
}

void PlanCache::add_algorithm(Collective collective, const std::string& name, Write write) {
  const auto known = schedule::algorithm_names(collective);
  if (name.empty() || std::find(known.begin(), known.end(), name) != known.end()) {
    throw ValueError("the name \"" + name + "\" is taken: " + schedule::name(collective) +
                     " has an algorithm of this name; choose another");
  }
  std::vector<UserAlgorithm> kept;  // the old ones are dropped after the lock, since that may run Python
  const std::lock_guard lock(mutex_);
  for (const UserAlgorithm& user : user_algorithms_) {
    if (user.collective != collective || user.name != name) kept.push_back(user);
  }
  kept.push_back({collective, name, std::move(write)});
  kept.swap(user_algorithms_);
  ++generation_;
  std::erase_if(all_, [&](const auto& entry) { return entry.second.algorithm == name; });
  for (Entry& entry : recent_) {
    if (entry.algorithm == name) entry = {};
  }
}

}  // namespace pycomm::runtime
