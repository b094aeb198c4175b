// From a request to a bound plan: what the communicator does before anything moves.
#include <algorithm>
#include <cstring>
#include <utility>

#include "common/env.h"
#include "common/error.h"
#include "common/hash.h"
#include "common/log.h"
#include "runtime/communicator.h"
#include "runtime/select.h"
#include "schedule/layout.h"
#include "schedule/lower.h"
#include "schedule/verify.h"

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
void require_codecs(Collective collective, const std::string& algorithm) {
  if (schedule::find_algorithm(collective, algorithm).codecs != schedule::Algorithm::Codecs::none) return;
  const std::string others = schedule::codec_algorithms(collective, schedule::Algorithm::Codecs::any);
  throw ValueError(std::string(schedule::name(collective)) + " algorithm \"" + algorithm +
                   "\" carries no codec; " +
                   (others.empty() ? "all_reduce, reduce_scatter and all_gather have algorithms that do"
                                   : "those that do are " + others));
}

// "all_reduce of 7 float32 (sum) on 3 ranks, in place".
std::string describe(const schedule::Call& call) {
  std::string text = name(call.world.collective);
  if (call.world.collective != Collective::barrier) {
    text += " of " + std::to_string(call.counts[0]) + " " + name(call.dtype);
  }
  if (schedule::reduces(call.world.collective)) text += std::string(" (") + name(call.op) + ")";
  text += " on " + std::to_string(call.world.size) + " ranks";
  if (call.world.root != 0) text += ", root " + std::to_string(call.world.root);
  return text + (call.in_place ? ", in place" : "");
}

}  // namespace

std::function<schedule::Schedule(const schedule::World&)> Communicator::user_algorithm(
    Collective collective, const std::string& name) const {
  const std::lock_guard lock(cache_mutex_);
  for (const UserAlgorithm& user : user_algorithms_) {
    if (user.collective == collective && user.name == name) return user.write;
  }
  return nullptr;
}

schedule::Plan Communicator::make_plan(const schedule::Call& call, const std::string& algorithm,
                                       int rank) const {
  const Geometry geometry = host_geometry(size(), caches_);
  const auto write = user_algorithm(call.world.collective, algorithm);
  if (call.deterministic && (write || !schedule::find_algorithm(call.world.collective, algorithm).balanced)) {
    throw ValueError("algorithm \"" + algorithm +
                     "\" does not sum in the balanced order that deterministic=True "
                     "asks for; leave algorithm out, or name one that does (docs/algorithms.md)");
  }
  if (call.coded() && !write) require_codecs(call.world.collective, algorithm);
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

std::shared_ptr<const Prepared> Communicator::prepare(const schedule::Call& call,
                                                      const std::string& algorithm, int rank) {
  CacheEntry& recent = recent_[(static_cast<uint64_t>(call.counts[0]) * 0x9e3779b97f4a7c15ULL >> 59 ^
                                static_cast<uint64_t>(call.world.collective)) %
                               recent_.size()];
  uint64_t key = 0, generation = 0;
  {
    const std::lock_guard lock(cache_mutex_);
    generation = cache_generation_;
    if (recent.prepared && recent.rank == rank && recent.call == call && recent.algorithm == algorithm) {
      return recent.prepared;
    }
    key = hash_of(call, algorithm, rank);
    for (auto [at, end] = cache_.equal_range(key); at != end; ++at) {
      const CacheEntry& entry = at->second;
      if (entry.rank == rank && entry.call == call && entry.algorithm == algorithm) {
        recent = entry;
        return entry.prepared;
      }
    }
  }
  // Without the lock: a user's algorithm may be Python, which lets other threads run meanwhile, and they may
  // call.
  const std::string chosen = algorithm.empty() ? select(call, policy_.yield).algorithm : algorithm;
  auto prepared = std::make_shared<const Prepared>(make_plan(call, chosen, rank), rank);
  log(LogLevel::trace, "new plan: ", describe(prepared->record));
  const std::lock_guard lock(cache_mutex_);
  if (generation != cache_generation_) return prepared;  // an algorithm of this name may be another by now
  if (cache_.size() >= kCachedPlans) cache_.clear();
  recent = {call, algorithm, rank, prepared};
  cache_.emplace(key, recent);
  return prepared;
}

void Communicator::add_algorithm(Collective collective, const std::string& name,
                                 std::function<schedule::Schedule(const schedule::World&)> write) {
  const auto known = schedule::algorithm_names(collective);
  if (name.empty() || std::find(known.begin(), known.end(), name) != known.end()) {
    throw ValueError("the name \"" + name + "\" is taken: " + schedule::name(collective) +
                     " has an algorithm of this name; choose another");
  }
  std::vector<UserAlgorithm> kept;  // the old ones are dropped after the lock, since that may run Python
  const std::lock_guard lock(cache_mutex_);
  for (const UserAlgorithm& user : user_algorithms_) {
    if (user.collective != collective || user.name != name) kept.push_back(user);
  }
  kept.push_back({collective, name, std::move(write)});
  kept.swap(user_algorithms_);
  ++cache_generation_;
  std::erase_if(cache_, [&](const auto& entry) { return entry.second.algorithm == name; });
  for (CacheEntry& entry : recent_) {
    if (entry.algorithm == name) entry = {};
  }
}

// All ranks must find the same. A rank's own slot of the other buffer lies elsewhere on every rank; what only
// the root has (gather, scatter, the output of reduce), and empty blocks, may lie anywhere: these are plain.
void Communicator::find_symmetric(const Request& request, Heap::Place& in, Heap::Place& out) const {
  const schedule::Call& call = request.call;
  const Collective kind = call.world.collective;
  if (kind == Collective::gather || kind == Collective::scatter || call.ragged) return;
  const auto item = static_cast<int64_t>(size_of(call.dtype));
  const bool empty_blocks = std::count(call.counts.begin(), call.counts.end(), 0) > 0;
  const bool all_empty = std::count(call.counts.begin(), call.counts.end(), 0) ==
                         static_cast<std::ptrdiff_t>(call.counts.size());
  const bool one_block_in = kind == Collective::all_gather,
             one_block_out = kind == Collective::reduce_scatter;
  if (!(one_block_in ? call.in_place || empty_blocks : all_empty)) {
    in = heap_->find(request.in, schedule::in_elements(call, rank()) * item, size());
  }
  if (!(one_block_out ? call.in_place || empty_blocks : all_empty || kind == Collective::reduce)) {
    out = heap_->find(request.out, schedule::out_elements(call, rank()) * item, size());
  }
}

Bound Communicator::bind(Request& request) {
  check_usable();
  if (schedule::reduces(request.call.world.collective)) {
    require(request.call.dtype, request.call.op);
  } else {
    request.call.op = any_op(request.call.dtype);
  }
  Bound bound;
  bound.timeout_s = request.timeout_s < 0 ? timeout_s_ : request.timeout_s;
  bound.buffers = {static_cast<const char*>(request.in), static_cast<char*>(request.out), 0, 0};
  schedule::Call& call = request.call;
  if (request.coding) {
    check_coding(request);
    call.codec = request.coding->codec;
    call.codec.seed = 0;
    bound.coding = request.coding;
    bound.buffers.coding = bound.coding.get();
  }
  int plan_rank = rank();
  Heap::Place in, out;
  if (call.world.collective == Collective::send_recv) {
    bound.src = call.world.root;
    bound.dst = call.world.peer;
    plan_rank = rank() == bound.src ? 0 : 1;
    call.world = {.collective = Collective::send_recv, .size = 2, .root = 0, .peer = 1};
  } else {
    call.world.size = size();
    if (!heap_->empty() && size() > 1 && !call.coded()) {
      find_symmetric(request, in, out);
      if (in.distance) call.in = schedule::Placement::symmetric;
      if (out.distance) call.out = schedule::Placement::symmetric;
      bound.buffers.in_distance = in.distance;
      bound.buffers.out_distance = out.distance;
    }
  }
  bound.prepared = prepare(call, request.algorithm, plan_rank);
  bound.record = bound.prepared->record;
  if (request.coding) finish_coding(request, bound);
  if (request.part_of) {
    const uint64_t fingerprint = bound.record.fingerprint;
    bound.record = *request.part_of;
    bound.record.fingerprint = Hasher(bound.record.fingerprint).add(fingerprint).digest() | 1;
  }
  if (bound.src >= 0) {
    const bool sends = rank() == bound.src;
    bound.record.side = sends ? CallRecord::Side::sends : CallRecord::Side::receives;
    bound.record.peer = static_cast<int16_t>(sends ? bound.dst : bound.src);
  }
  if (in.distance || out.distance) {
    bound.record.symmetric_offset = in.distance ? in.offset : out.offset;
    bound.record.fingerprint = Hasher(bound.record.fingerprint).add(in.offset).add(out.offset).digest() | 1;
  }
  if (!request.tag.empty()) {
    std::strncpy(bound.record.tag, request.tag.c_str(), sizeof bound.record.tag - 1);
    bound.record.fingerprint = Hasher(bound.record.fingerprint).add(request.tag).digest() | 1;
  }
  if (call.world.collective == Collective::all_to_all && call.ragged && size() > 1) {
    bound.agreement = agree_on_counts(bound, call);
  }
  if (auto reading = prepare_reading(call, request.algorithm, plan_rank)) {
    bound.agreement = agree_on_reading(bound, std::move(reading));
  }
  return bound;
}

// A part of the call that it is for, also to the others.
std::shared_ptr<Agreement> Communicator::make_agreement(const Bound& bound, Collective kind,
                                                        std::vector<int64_t> mine) {
  auto agreement = std::make_shared<Agreement>();
  agreement->mine = std::move(mine);
  agreement->all.resize(size());
  Request request;
  request.call.world = {.collective = kind, .size = size()};
  request.call.dtype = DType::int64;
  request.call.counts = schedule::uniform_counts(request.call.world, 1);
  request.in = agreement->mine.data();
  request.out = agreement->all.data();
  request.timeout_s = bound.timeout_s;
  agreement->exchange = bind(request);
  agreement->exchange.record = bound.record;
  agreement->exchange.record.fingerprint = Hasher(bound.record.fingerprint).add(size()).digest() | 1;
  return agreement;
}

// Pairwise counts are not in the fingerprint (a rank knows only its row and its column), so ranks exchange
// them first.
std::shared_ptr<Agreement> Communicator::agree_on_counts(const Bound& bound, const schedule::Call& call) {
  std::vector<int64_t> sent, expected;  // elements, by peer
  for (int r = 0; r < size(); ++r) {
    sent.push_back(call.counts[rank() * size() + r]);
    expected.push_back(call.counts[r * size() + rank()]);
  }
  auto agreement = make_agreement(bound, Collective::all_to_all, std::move(sent));
  agreement->conclude = [this, expected](const Bound& asked) -> const Bound& {
    const std::vector<int64_t>& coming = asked.agreement->all;
    for (int r = 0; r < size(); ++r) {
      if (coming[r] == expected[r]) continue;
      domain_->fail(FailureKind::mismatch,
                    "rank " + std::to_string(r) + " sends " + std::to_string(coming[r]) +
                        " elements to rank " + std::to_string(rank()) + ", which expects " +
                        std::to_string(expected[r]) + ", in " + describe(asked.record) +
                        ". What is in send_counts of one rank must be in recv_counts of the other.");
      domain_->raise_failure(Domain::Caller::under_way);
    }
    return asked;
  };
  return agreement;
}

// The plan that reads inputs where they lie; null if there is none, or it does not pay.
std::shared_ptr<const Prepared> Communicator::prepare_reading(const schedule::Call& call,
                                                              const std::string& algorithm, int rank) {
  if (!single_copy_ || call.coded() || call.in != schedule::Placement::plain ||
      !single_copy_pays(call, caches_))
    return nullptr;
  schedule::Call other = call;
  other.in = schedule::Placement::reachable;
  auto prepared = prepare(other, algorithm, rank);
  // In place, this rank has to say no to what the others can do.
  if (!prepared->reachable && call.in_place) {
    other.in_place = false;
    prepared = prepare(other, algorithm, rank);
  }
  return prepared->reachable ? prepared : nullptr;
}

namespace {

// What a rank says of its buffers: 0 if its input is not fit to be read, else 1 and where in a page the two
// begin.
constexpr int64_t kPageBits = 12, kPage = int64_t{1} << kPageBits;

int64_t word_of(bool fit, const Buffers& buffers) {
  const auto in = static_cast<int64_t>(reinterpret_cast<uintptr_t>(buffers.in) % kPage);
  const auto out = static_cast<int64_t>(reinterpret_cast<uintptr_t>(buffers.out) % kPage);
  return fit ? 1 | in << 1 | out << (1 + kPageBits) : 0;
}

// The kernel copies by `rep movsb`, which Zen 3 and Zen 4 run many times slower where the destination lies 1
// to 63 bytes beyond the source modulo 4 KiB.
bool reads_fast(const schedule::Call& call, const std::vector<int64_t>& words) {
  const auto item = static_cast<int64_t>(size_of(call.dtype));
  for (int to = 0; to < call.world.size; ++to) {
    for (int from = 0; from < call.world.size; ++from) {
      if (from == to) continue;
      const int64_t in = words[from] >> 1 & (kPage - 1), out = words[to] >> (1 + kPageBits);
      const int block = call.world.collective == Collective::all_gather ? from : to;
      const int64_t source = schedule::block_offset(call, from, schedule::Buffer::in, block) * item;
      const int64_t landing = schedule::block_offset(call, to, schedule::Buffer::out, from) * item;
      const int64_t beyond = (out + landing - in - source) & (kPage - 1);
      if (beyond > 0 && beyond < 32) return false;
    }
  }
  return true;
}

}  // namespace

// Whether an input is fit to be read where it lies, its owner alone knows.
std::shared_ptr<Agreement> Communicator::agree_on_reading(const Bound& bound,
                                                          std::shared_ptr<const Prepared> prepared) {
  auto agreement = make_agreement(bound, Collective::all_gather, {0});
  const schedule::Call& call = bound.prepared->plan.call;
  const int64_t bytes = schedule::in_elements(call, rank()) * static_cast<int64_t>(size_of(call.dtype));
  const bool kept = prepared->plan.call.in_place == call.in_place;  // else `out` would be written over `in`
  agreement->ask = [this, bytes, kept](const Bound& asked) {
    const bool fit = kept && domain_->node().fit_to_read(asked.buffers.in, bytes);
    asked.agreement->mine[0] = word_of(fit, asked.buffers);
  };
  Bound reading = bound;
  reading.record.in = schedule::Placement::reachable;
  reading.record.fingerprint =
      Hasher(bound.record.fingerprint).add(prepared->record.fingerprint).digest() | 1;
  reading.prepared = std::move(prepared);
  agreement->conclude = [reading = std::move(reading)](const Bound& asked) -> const Bound& {
    const std::vector<int64_t>& words = asked.agreement->all;
    const bool fit = std::count(words.begin(), words.end(), 0) == 0;
    return fit && reads_fast(reading.prepared->plan.call, words) ? reading : asked;
  };
  return agreement;
}

std::string Communicator::explain(const Request& request) {
  schedule::Call call = request.call;
  call.world.size = size();
  if (schedule::reduces(call.world.collective)) {
    require(call.dtype, call.op);
  } else {
    call.op = any_op(call.dtype);
  }
  const Choice choice = request.algorithm.empty() ? select(call, policy_.yield)
                                                  : Choice{request.algorithm, "named by the caller"};
  const auto prepared = prepare(call, request.algorithm, rank());
  const schedule::Plan& plan = prepared->plan;
  const schedule::Program& program = prepared->program(rank());
  int64_t waits = 0, moved = 0, trips = 0;
  for (const schedule::Loop& loop : program.loops) {
    trips += loop.trips;
    for (int s = loop.step; s < loop.step + loop.num_steps; ++s) {
      const schedule::Step& step = program.steps[s];
      if (step.kind == schedule::Step::Kind::wait) waits += loop.trips;
      if (step.kind == schedule::Step::Kind::combine) {
        moved += loop.trips * step.count * (step.num_dsts + step.num_srcs) *
                 static_cast<int64_t>(size_of(call.dtype));
      }
    }
  }
  std::string text = describe(prepared->record) + " on " + std::to_string(size()) + " ranks\n";
  text += "algorithm  " + choice.algorithm + ": " + choice.reason + "\n";
  text += "plan       " + std::to_string(program.steps.size()) + " steps, " + std::to_string(trips) +
          " trip" + (trips == 1 ? "" : "s") + ", " + std::to_string(waits) + " waits, " +
          std::to_string(moved) + " bytes read and written by rank " + std::to_string(rank()) + "\n";
  if (const auto reading = prepare_reading(call, request.algorithm, rank())) {
    text += "instead    where all ranks' inputs lie in huge pages: " +
            std::to_string(reading->program(rank()).steps.size()) +
            " steps that read them through the kernel, with one copy and no window\n";
  }
  text += "window     " + std::to_string(plan.slots) + " slot" + (plan.slots == 1 ? "" : "s") + " of " +
          std::to_string(plan.slot_bytes) + " bytes\n";
  for (const schedule::Step& step : program.steps)
    text += "  " + schedule::describe(plan, rank(), step) + "\n";
  return text;
}

}  // namespace pycomm::runtime
