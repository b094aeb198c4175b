// Every algorithm is tested twice: a small interpreter that knows only message passing runs its schedule, and
// the verifier proves the plans that it is lowered to.
//
// Tests: schedule/schedule.cc.
#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <numeric>
#include <optional>
#include <tuple>

#include "check.h"
#include "common/error.h"
#include "schedule/algorithms.h"
#include "schedule/lower/lower.h"
#include "schedule/verify/verify.h"

using namespace pycomm;
using namespace pycomm::schedule;

namespace {

using Kind = ScheduleStep::Kind;

constexpr int kWorlds[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 24, 32, 64};

bool rooted(Collective c) { return traits(c).rooted || traits(c).between_two(); }

// The worlds to try an algorithm in: all roots (send_recv: all pairs) of small ones, some of large ones.
std::vector<World> worlds_of(Collective collective, int n, int all_roots_up_to) {
  std::vector<int> roots = {0};
  if (rooted(collective) && n <= all_roots_up_to) {
    roots.resize(n);
    std::iota(roots.begin(), roots.end(), 0);
  } else if (rooted(collective) && n > 1) {
    roots = {0, n / 2, n - 1};
  }
  std::vector<World> worlds;
  for (int root : roots) {
    const std::vector<int> peers = collective == Collective::send_recv ? roots : std::vector{0};
    for (int peer : peers) worlds.push_back({collective, n, root, peer});
  }
  return worlds;
}

std::string title(const std::string& name, const World& w) {
  return name + " " + schedule::name(w.collective) + ", " + std::to_string(w.size) + " ranks, root " +
         std::to_string(w.root) + ", peer " + std::to_string(w.peer);
}

// Expressions, each stored once, so that equal numbers are equal expressions.
class Expressions {
 public:
  int leaf(int rank, int block, int element) { return intern({0, rank, block, element}); }
  int sum(int left, int right) { return intern({1, left, right, 0}); }
  int finished(int value) { return intern({2, value, 0, 0}); }
  bool is_leaf(int value) const { return nodes_[value][0] == 0; }
  bool is_finished(int value) const { return nodes_[value][0] == 2; }
  // tree(first, last) over values, as in kernels/combine.h.
  int balanced(const std::vector<int>& values, size_t first, size_t last) {
    if (last - first == 1) return values[first];
    size_t p = 1;
    while (2 * p < last - first) p *= 2;
    return sum(balanced(values, first, first + p), balanced(values, first + p, last));
  }
  void leaves(int value, std::vector<int>& found) const {
    const auto& [kind, left, right, unused] = nodes_[value];
    if (kind == 0) found.push_back(value);
    if (kind != 0) leaves(left, found);
    if (kind == 1) leaves(right, found);
  }

 private:
  using Node = std::array<int, 4>;
  int intern(const Node& node) {
    const auto [at, is_new] = numbers_.try_emplace(node, static_cast<int>(nodes_.size()));
    if (is_new) nodes_.push_back(node);
    return at->second;
  }
  std::vector<Node> nodes_;
  std::map<Node, int> numbers_;
};

using Clock = std::vector<int>;

void join(Clock& clock, const Clock& other) {
  for (size_t r = 0; r < clock.size(); ++r) clock[r] = std::max(clock[r], other[r]);
}

struct Broken : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs one trip of a schedule. Offers are messages that combines wait for; the accept of what was only read
// orders nothing, as schedule.h says. Throws Broken at a race, a deadlock, an offer left over, or a wrong
// result.
class Interpreter {
 public:
  Interpreter(const Schedule& schedule, const World& world, bool balanced, bool in_place)
      : world_(world), n_(world.size), balanced_(balanced), in_place_(in_place), programs_(schedule.ranks) {
    programs_.resize(n_);
    for (auto& program : programs_) {
      const auto earlier = [](const ScheduleStep& a, const ScheduleStep& b) { return a.stage < b.stage; };
      std::stable_sort(program.begin(), program.end(), earlier);
      for (const ScheduleStep& step : program)
        for (const auto* refs : {&step.dsts, &step.srcs})
          for (const Ref& ref : *refs) length_ = std::max(length_, ref.chunk.of + 1);
    }
  }

  void run() {
    clocks_.assign(n_, Clock(n_, 0));
    std::vector<size_t> next(n_, 0);
    for (bool moved = true; moved;) {
      moved = false;
      for (int rank = 0; rank < n_; ++rank)
        for (; next[rank] < programs_[rank].size() && step(rank, programs_[rank][next[rank]]); ++next[rank])
          moved = true;
    }
    for (int rank = 0; rank < n_; ++rank) {
      if (next[rank] < programs_[rank].size())
        throw Broken("rank " + std::to_string(rank) + " waits forever at step " + std::to_string(next[rank]));
    }
    for (const auto* open : {&offered_, &used_})
      for (const auto& [key, clocks] : *open)
        if (!clocks.empty())
          throw Broken("an offer of rank " + std::to_string(std::get<0>(key)) + " is left over");
    check_results();
  }

 private:
  using Place = std::tuple<int, Buffer, int, int>;               // rank, buffer, block, element
  using Key = std::tuple<int, int, Buffer, int, int, int, int>;  // owner, peer, buffer, chunk
  struct Use {
    Clock clock;
    bool written;
    bool operator==(const Use&) const = default;
  };
  struct Cell {
    int value = -1;
    std::pair<int, int> written{-1, 0};     // rank, its time
    std::vector<std::pair<int, int>> read;  // since then
  };

  static Key key(int peer, const Ref& r) {
    return {r.rank, peer, r.buffer, r.chunk.block, r.chunk.first, r.chunk.last, r.chunk.of};
  }
  int begin(const Ref& ref) const { return length_ * ref.chunk.first / ref.chunk.of; }
  int count(const Ref& ref) const { return length_ * ref.chunk.last / ref.chunk.of - begin(ref); }

  Place place(const Ref& ref, int i) const {
    const Buffer buffer = in_place_ && ref.buffer == Buffer::out ? Buffer::in : ref.buffer;
    return {ref.rank, buffer, ref.chunk.block, begin(ref) + i};
  }

  Cell& cell(const Place& at) {
    const auto [found, is_new] = memory_.try_emplace(at);
    const auto [rank, buffer, block, element] = at;
    if (is_new && buffer == Buffer::in && has_input(rank, block))
      found->second.value = values_.leaf(rank, block, element);
    return found->second;
  }

  bool has_input(int rank, int block) const {
    switch (world_.collective) {
      case Collective::all_gather:
      case Collective::gather:
        return block == rank;
      case Collective::broadcast:
      case Collective::scatter:
      case Collective::send_recv:
        return rank == world_.root;
      case Collective::all_reduce:
      case Collective::reduce:
      case Collective::reduce_scatter:
      case Collective::all_to_all:
        return true;
      case Collective::barrier:
        return false;
    }
    return false;
  }

  void ordered(int rank, std::pair<int, int> access) const {
    if (access.first >= 0 && clocks_[rank][access.first] < access.second)
      throw Broken("a race of ranks " + std::to_string(rank) + " and " + std::to_string(access.first));
  }

  bool step(int rank, const ScheduleStep& step) {
    Clock& clock = clocks_[rank];
    if (step.kind == Kind::offer) {
      ++clock[rank];
      offered_[key(step.peer, step.srcs[0])].push_back({clock, false});
      return true;
    }
    if (step.kind == Kind::accept) {
      auto& uses = used_[key(step.peer, step.srcs[0])];
      if (uses.empty()) return false;
      if (uses.front().written) join(clock, uses.front().clock);
      uses.pop_front();
      return true;
    }
    std::map<Key, bool> remote;  // and whether it is written
    for (const Ref& ref : step.srcs)
      if (ref.rank != rank) remote[key(rank, ref)];
    for (const Ref& ref : step.dsts)
      if (ref.rank != rank) remote[key(rank, ref)] = true;
    for (const auto& [k, written] : remote)
      if (offered_[k].empty()) return false;
    for (const auto& [k, written] : remote) {
      join(clock, offered_[k].front().clock);
      offered_[k].pop_front();
    }
    ++clock[rank];
    combine(rank, step);
    for (const auto& [k, written] : remote) used_[k].push_back({clock, written});
    return true;
  }

  void combine(int rank, const ScheduleStep& step) {
    const bool partial = step.dsts[0].buffer == Buffer::scratch;
    const bool copy = !step.final && step.srcs.size() == 1 && !partial;
    for (const Ref& dst : step.dsts) {
      if (dst.buffer == Buffer::in || (dst.buffer == Buffer::scratch) != partial || (step.final && partial) ||
          (!step.final && !copy && !partial))
        throw Broken("a result in the wrong buffer");
    }
    for (int i = 0; i < count(step.dsts[0]); ++i) {
      if (copy && place(step.dsts[0], i) == place(step.srcs[0], i) && step.dsts.size() == 1) continue;
      std::vector<int> terms;
      for (const Ref& src : step.srcs) {
        if (count(src) != count(step.dsts[0])) throw Broken("sources and results differ in length");
        Cell& from = cell(place(src, i));
        ordered(rank, from.written);
        from.read.push_back({rank, clocks_[rank][rank]});
        if (from.value < 0) throw Broken("reads what nobody wrote");
        if (values_.is_finished(from.value) && !copy) throw Broken("reduces a finished result");
        if (copy && !values_.is_leaf(from.value) && !values_.is_finished(from.value))
          throw Broken("copies a partial result");
        terms.push_back(from.value);
      }
      int value = values_.balanced(terms, 0, terms.size());
      if (step.final) value = values_.finished(value);
      for (const Ref& dst : step.dsts) {
        if (count(dst) != count(step.dsts[0])) throw Broken("results differ in length");
        Cell& to = cell(place(dst, i));
        ordered(rank, to.written);
        for (const auto& read : to.read) ordered(rank, read);
        to = {value, {rank, clocks_[rank][rank]}, {}};
      }
    }
  }

  int result(int rank, int block, int element) {
    return cell(place({rank, Buffer::out, {block}}, element)).value;
  }

  void expect(int rank, int block, int from, int from_block) {
    for (int i = 0; i < length_; ++i)
      if (result(rank, block, i) != values_.leaf(from, from_block, i)) throw Broken("a wrong result");
  }

  void expect_sum(int rank, int block) {
    for (int i = 0; i < length_; ++i) {
      std::vector<int> terms, found;
      for (int peer = 0; peer < n_; ++peer) terms.push_back(values_.leaf(peer, block, i));
      const int value = result(rank, block, i);
      if (value < 0 || !values_.is_finished(value)) throw Broken("an unfinished result");
      if (balanced_ && value != values_.finished(values_.balanced(terms, 0, terms.size())))
        throw Broken("the sum is not the balanced tree");
      const int first = sums_.try_emplace({block, i}, value).first->second;
      if (first != value) throw Broken("ranks have different sums");
      values_.leaves(value, found);
      std::sort(found.begin(), found.end());
      std::sort(terms.begin(), terms.end());
      if (found != terms) throw Broken("the sum has not each rank's term once");
    }
  }

  void check_results() {
    for (int rank = 0; rank < n_; ++rank) {
      const int root = world_.root;
      switch (world_.collective) {
        case Collective::all_reduce:
          expect_sum(rank, 0);
          break;
        case Collective::reduce_scatter:
          expect_sum(rank, rank);
          break;
        case Collective::reduce:
          if (rank == root) expect_sum(rank, 0);
          break;
        case Collective::broadcast:
          expect(rank, 0, root, 0);
          break;
        case Collective::scatter:
          expect(rank, rank, root, rank);
          break;
        case Collective::gather:
          if (rank != root) break;
          [[fallthrough]];
        case Collective::all_gather:
          for (int block = 0; block < n_; ++block) expect(rank, block, block, block);
          break;
        case Collective::all_to_all:
          for (int block = 0; block < n_; ++block) expect(rank, block, block, rank);
          break;
        case Collective::send_recv:
          if (rank == world_.peer) expect(rank, 0, root, 0);
          break;
        case Collective::barrier:
          for (int peer = 0; peer < n_ && n_ > 1; ++peer)
            if (clocks_[rank][peer] == 0) throw Broken("a rank leaves the barrier before another has come");
          break;
      }
    }
    if (in_place_) return;
    for (const auto& [at, cell] : memory_) {
      const auto [rank, buffer, block, element] = at;
      if (buffer == Buffer::in && cell.value >= 0 && cell.value != values_.leaf(rank, block, element))
        throw Broken("an input has changed");
      if (buffer == Buffer::out && world_.collective == Collective::reduce && rank != world_.root)
        throw Broken("`out` is touched where there is none");
    }
  }

  const World world_;
  const int n_;
  const bool balanced_, in_place_;
  int length_ = 1;  // elements of a block
  std::vector<std::vector<ScheduleStep>> programs_;
  std::vector<Clock> clocks_;
  std::map<Key, std::deque<Use>> offered_, used_;
  std::map<Place, Cell> memory_;
  std::map<std::pair<int, int>, int> sums_;
  Expressions values_;
};

// In words, what is wrong with a schedule; empty if nothing is.
std::string wrong(const Schedule& schedule, const World& world, bool balanced, bool in_place) {
  try {
    Interpreter(schedule, world, balanced, in_place).run();
    return "";
  } catch (const Broken& broken) {
    return broken.what();
  }
}

}  // namespace

TEST(schedules_compute_their_collective) {
  for (const Algorithm& algorithm : algorithms()) {
    for (int n : kWorlds) {
      for (const World& world : worlds_of(algorithm.collective, n, 9)) {
        const Schedule schedule = algorithm.write(world);
        for (bool in_place : {false, true}) {
          const std::string what = wrong(schedule, world, algorithm.balanced, in_place);
          if (!what.empty()) check::fail(__FILE__, __LINE__, title(algorithm.name, world) + ": " + what);
        }
      }
    }
  }
}

// The interpreter can tell: without any one of its steps, no schedule passes.
TEST(schedules_need_every_step) {
  for (const Algorithm& algorithm : algorithms()) {
    const World world{algorithm.collective, 4, 1, 2};
    const Schedule schedule = algorithm.write(world);
    for (int rank = 0; rank < 4; ++rank) {
      for (size_t i = 0; i < schedule.ranks[rank].size(); ++i) {
        Schedule broken = schedule;
        broken.ranks[rank].erase(broken.ranks[rank].begin() + static_cast<ptrdiff_t>(i));
        if (wrong(broken, world, false, false).empty())
          check::fail(__FILE__, __LINE__,
                      title(algorithm.name, world) + ": not missed: step " + std::to_string(i) + " of rank " +
                          std::to_string(rank));
      }
    }
  }
}

TEST(names_are_found) {
  for (int c = 0; c < kNumCollectives; ++c) {
    const auto collective = static_cast<Collective>(c);
    const std::vector<std::string> names = algorithm_names(collective);
    CHECK(!names.empty());
    for (const std::string& name : names) {
      CHECK_EQ(std::count(names.begin(), names.end(), name), 1);
      CHECK_EQ(find_algorithm(collective, name).name, name);
    }
  }
  CHECK_THROWS(ValueError, find_algorithm(Collective::barrier, "ring"));
}

// ---- the plans ----

namespace {

int blocks_of(const World& w) {
  switch (w.collective) {
    case Collective::all_reduce:
    case Collective::broadcast:
    case Collective::reduce:
    case Collective::barrier:
    case Collective::send_recv:
      return 1;
    case Collective::reduce_scatter:
    case Collective::all_gather:
    case Collective::gather:
    case Collective::scatter:
      return w.size;
    case Collective::all_to_all:
      return w.size * w.size;
  }
  return 0;
}

// Counts of `about` elements a block; uneven ones differ from block to block and are zero here and there. In
// place, what a rank sends to another must be as long as what it gets.
std::vector<int64_t> counts_of(const World& w, int64_t about, bool uneven, bool in_place = false) {
  if (w.collective == Collective::barrier) return {0};
  std::vector<int64_t> counts(blocks_of(w), about);
  for (int b = 0; uneven && b < blocks_of(w); ++b) {
    const int from = b / w.size, to = b % w.size;
    const int pair = in_place && from > to ? to * w.size + from : b;
    counts[b] = pair % 5 == 1 ? 0 : about * (pair % 3 + 1) / 3 + pair % 4;
  }
  return counts;
}

// A geometry in which a block of `elements` float32 goes through the window in one trip.
Geometry trips_of(const World& w, int64_t elements) {
  const int64_t blocks = w.collective == Collective::all_to_all ? w.size : blocks_of(w);
  Geometry geometry;
  geometry.trip_bytes = std::max<int64_t>(elements * blocks * 4, 64);
  geometry.bank_bytes = int64_t{1} << 40;
  geometry.payload_bytes = kPayloadBytes;
  return geometry;
}

constexpr const char* kPlacements[] = {"plain", "symmetric", "reachable", "told"};

// Proves one plan, or says what is wrong. Returns its trips.
int64_t prove(const Algorithm& algorithm, const Call& call, const Geometry& geometry) {
  std::string what;
  int64_t trips = 0;
  try {
    const Plan plan = make_plan(algorithm.name, call, geometry);
    if (const auto wrong = verify(plan, {.balanced = algorithm.balanced})) what = wrong->what;
    for (const Loop& loop : plan.programs[call.world.root].loops) trips += loop.trips;
  } catch (const ValueError& error) {
    what = error.what();
  }
  if (what.empty()) return trips;
  what = title(algorithm.name, call.world) + ", in " + kPlacements[static_cast<int>(call.in)] + ", out " +
         kPlacements[static_cast<int>(call.out)] + (call.in_place ? ", in place" : "") + ", " +
         std::to_string(call.counts[0]) + " elements, trips of " + std::to_string(geometry.trip_bytes) +
         " bytes: " + what;
  check::fail(__FILE__, __LINE__, what);
  return trips;
}

struct Buffers {
  Placement in, out;
  bool in_place;
};

constexpr Buffers kBuffers[] = {
    {Placement::plain, Placement::plain, false},
    {Placement::plain, Placement::plain, true},
    {Placement::symmetric, Placement::symmetric, false},
    {Placement::symmetric, Placement::symmetric, true},
    {Placement::plain, Placement::symmetric, false},
    {Placement::symmetric, Placement::plain, false},
    {Placement::reachable, Placement::plain, false},
    {Placement::reachable, Placement::plain, true},
    {Placement::symmetric, Placement::plain, true},  // reduce: only the root has an output
    {Placement::told, Placement::told, false},
    {Placement::told, Placement::told, true},
    {Placement::plain, Placement::told, false},
    {Placement::told, Placement::plain, false},
    {Placement::symmetric, Placement::told, false},
    {Placement::told, Placement::symmetric, false},
    {Placement::told, Placement::plain, true},
    {Placement::plain, Placement::told, true},  // a rank's own block of the output
};

// Every placement, counts that do not divide, are smaller than the world, are zero; one trip and many.
void prove_all(const Algorithm& algorithm, const World& world) {
  const int n = world.size;
  for (const Buffers& buffers : kBuffers) {
    if (n > 17 && buffers.in != buffers.out) continue;
    if (n > 17 && (in_reach(buffers.in) ? buffers.in : buffers.out) == Placement::told) continue;
    // One buffer lies in one place: but for an output that only the root has, and a rank's own block.
    if (buffers.in_place && in_reach(buffers.in) && buffers.out == Placement::plain &&
        world.collective != Collective::reduce && world.collective != Collective::reduce_scatter) {
      continue;
    }
    if (buffers.in_place && in_reach(buffers.out) && buffers.in == Placement::plain &&
        world.collective != Collective::all_gather) {
      continue;
    }
    // Other algorithms use a reachable input as a plain one, and are proved with that.
    if (buffers.in == Placement::reachable && std::string(algorithm.name) != "direct") continue;
    Call call{
        .world = world, .counts = {}, .in = buffers.in, .out = buffers.out, .in_place = buffers.in_place};
    const int64_t width = 16 * n + 16;  // a line for every rank, and one that does not divide
    for (int64_t count : {int64_t{0}, int64_t{1}, int64_t{n - 1}, 33 * width + 7}) {
      if (n > 17 && count < n) continue;
      call.counts = counts_of(world, count, false);
      prove(algorithm, call, trips_of(world, 64 * width));
    }
    call.counts = counts_of(world, 12 * width + 37, false);
    const int64_t trips = prove(algorithm, call, trips_of(world, width));
    // More than there are slots, so that each is used again, wherever there is something to show.
    const bool local = n == 1 || (world.collective == Collective::send_recv && world.root == world.peer);
    if (!local && buffers.in == Placement::plain && world.collective != Collective::barrier) CHECK(trips > 6);
    if (blocks_of(world) > 1 && world.collective != Collective::barrier && algorithm.ragged) {
      call.counts = counts_of(world, 3 * width + 5, true, call.in_place);
      prove(algorithm, call, trips_of(world, 64 * width));
      if (n <= 17) prove(algorithm, call, trips_of(world, 32));
    }
  }
}

}  // namespace

TEST(plans_are_proved) {
  for (const Algorithm& algorithm : algorithms())
    for (int n : kWorlds)
      for (const World& world : worlds_of(algorithm.collective, n, 5)) prove_all(algorithm, world);
}

// Small floats have wider partial sums, and avg divides.
TEST(plans_of_other_types_are_proved) {
  for (const Algorithm& algorithm : algorithms()) {
    for (int n : {2, 3, 5, 8}) {
      const World world{algorithm.collective, n, n - 1, 0};
      for (DType dtype : {DType::bfloat16, DType::float8_e5m2, DType::complex128}) {
        Call call{.world = world, .dtype = dtype, .op = Op::avg, .counts = counts_of(world, 5000, false)};
        prove(algorithm, call, trips_of(world, 512));
        prove(algorithm, call, trips_of(world, 1 << 16));
      }
    }
  }
}

// Calls that follow each other reuse windows: all pairs of algorithms, and some triples.
TEST(sequences_are_proved) {
  for (int n : {2, 3, 4, 5}) {
    for (Placement in : {Placement::plain, Placement::symmetric, Placement::reachable, Placement::told}) {
      const Placement out = in == Placement::reachable ? Placement::plain : in;
      std::vector<Plan> plans;
      for (const Algorithm& algorithm : algorithms()) {
        const World world{algorithm.collective, n, n / 2, n - 1};
        const Call call{.world = world, .counts = counts_of(world, 1000, false), .in = in, .out = out};
        plans.push_back(make_plan(algorithm.name, call, trips_of(world, 240)));
      }
      const auto check_sequence = [&](const std::vector<const Plan*>& calls) {
        const auto wrong = verify_sequence(calls);
        if (!wrong) return;
        std::string names;
        for (const Plan* plan : calls) names += title(plan->algorithm, plan->call.world) + "; ";
        check::fail(__FILE__, __LINE__, names + "call " + std::to_string(wrong->call) + ": " + wrong->what);
      };
      for (size_t a = 0; a < plans.size(); ++a) {
        for (size_t b = 0; b < plans.size(); ++b) {
          check_sequence({&plans[a], &plans[b]});
          if ((a + 2 * b) % 5 == 0) check_sequence({&plans[a], &plans[b], &plans[a]});
          if ((2 * a + b) % 7 == 0) check_sequence({&plans[a], &plans[b], &plans[(a + b) % plans.size()]});
        }
      }
    }
  }
}
