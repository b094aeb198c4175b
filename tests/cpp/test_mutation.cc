// The verifier is tested by mutation: correct plans are broken in every small way, an explicit search of
// all interleavings says which mutants are wrong, and the verifier must reject each of them.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>

#include "check.h"
#include "common/error.h"
#include "explore.h"
#include "schedule/lower/lower.h"
#include "schedule/verify/verify.h"

namespace {

using namespace pycomm;
using namespace pycomm::schedule;

// ---- Mutants ----

using Visit = std::function<void(const std::string&, const Plan&)>;

void erase_step(Program& program, int at) {
  program.steps.erase(program.steps.begin() + at);
  for (Loop& loop : program.loops) {
    if (loop.step > at) {
      --loop.step;
    } else if (at < loop.step + loop.num_steps) {
      --loop.num_steps;
    }
  }
}

void duplicate_step(Program& program, int at) {
  program.steps.insert(program.steps.begin() + at, Step(program.steps[at]));
  for (Loop& loop : program.loops) {
    if (loop.step > at) {
      ++loop.step;
    } else if (at < loop.step + loop.num_steps) {
      ++loop.num_steps;
    }
  }
}

bool same_loop(const Program& program, int a, int b) {
  return std::any_of(program.loops.begin(), program.loops.end(), [&](const Loop& loop) {
    return a >= loop.step && b >= loop.step && a < loop.step + loop.num_steps &&
           b < loop.step + loop.num_steps;
  });
}

// All single changes of a plan, one after the other.
class Mutator {
 public:
  Mutator(const Plan& plan, const Visit& visit) : plan_(plan), visit_(visit) {}

  void run() {
    for (rank_ = 0; rank_ < static_cast<int>(plan_.programs.size()); ++rank_) {
      const Program& program = plan_.programs[rank_];
      for (int i = 0; i < static_cast<int>(program.steps.size()); ++i) mutate_step(i);
      for (size_t i = 0; i < program.loops.size(); ++i) mutate_loop(i);
    }
    mutate_plan();
  }

 private:
  template <typename Change>
  void mutant(const std::string& what, Change change) {
    Plan copy = plan_;
    change(copy);
    visit_(what, copy);
  }

  // One field set to each of the values that differ from what it is.
  template <typename T, typename Field>
  void set(const std::string& what, Field field, std::vector<T> values) {
    for (T value : values) {
      mutant(what, [&](Plan& plan) { field(plan) = value; });
    }
  }

  void mutate_step(int i) {
    const Program& program = plan_.programs[rank_];
    const Step& step = program.steps[i];
    const std::string who = describe(plan_, rank_, step) + ": ";
    mutant(who + "drop", [&](Plan& plan) { erase_step(plan.programs[rank_], i); });
    mutant(who + "duplicate", [&](Plan& plan) { duplicate_step(plan.programs[rank_], i); });
    if (same_loop(program, i, i + 1)) {
      mutant(who + "swap with the next", [&](Plan& plan) {
        std::swap(plan.programs[rank_].steps[i], plan.programs[rank_].steps[i + 1]);
      });
    }
    auto here = [&](auto member) {
      return [this, i, member](Plan& plan) -> auto& { return plan.programs[rank_].steps[i].*member; };
    };
    set<uint8_t>(
        who + "stage", here(&Step::stage),
        {static_cast<uint8_t>(step.stage + 1), static_cast<uint8_t>(step.stage > 0 ? step.stage - 1 : 2)});
    if (step.kind == Step::Kind::send || step.kind == Step::Kind::recv) {
      set<int64_t>(who + "count", here(&Step::count), {step.count - 1, step.count + 1, 0});
      mutate_place(step, who, here);
      return mutate_operand(step, 0);
    }
    if (step.kind != Step::Kind::combine) {
      set<int64_t>(
          who + "value", here(&Step::value),
          {step.value - 1, step.value + 1, step.value + step.per_trip, step.value - step.per_trip, -1000});
      set<int64_t>(who + "per_trip", here(&Step::per_trip), {step.per_trip - 1, step.per_trip + 1, 0});
      mutate_place(step, who, here);
      if (step.kind == Step::Kind::complete) return;
      set<Step::Kind>(who + "kind", here(&Step::kind),
                      {step.kind == Step::Kind::wait ? Step::Kind::signal : Step::Kind::wait});
      return;
    }
    set<int64_t>(who + "count", here(&Step::count), {step.count - 1, step.count + 1, 0, step.count / 2});
    if (plan_.call.coded()) mutate_transcode(i);
    for (Format format : formats()) {
      if (format == step.dst_format) continue;
      mutant(who + "destination format", [&](Plan& plan) {
        Program& changed = plan.programs[rank_];
        changed.steps[i].dst_format = format;
        for (int d = 0; d < step.num_dsts; ++d) changed.operands[step.operand + d].format = format;
      });
    }
    if (step.num_dsts > 1) {
      mutant(who + "fewer destinations", [&](Plan& plan) {
        Step& changed = plan.programs[rank_].steps[i];
        --changed.num_dsts;
        ++changed.operand;
      });
    }
    if (step.num_srcs > 1) set<int32_t>(who + "fewer sources", here(&Step::num_srcs), {step.num_srcs - 1});
    for (int o = 0; o < step.num_dsts + step.num_srcs; ++o) mutate_operand(step, o);
  }

  // Which cell or channel of which pair.
  template <typename Here>
  void mutate_place(const Step& step, const std::string& who, const Here& here) {
    set<uint8_t>(
        who + "cell", here(&Step::cell),
        {static_cast<uint8_t>(step.cell + 1), static_cast<uint8_t>(step.cell > 0 ? step.cell - 1 : 3)});
    set<int32_t>(who + "peer", here(&Step::peer), {(step.peer + 1) % plan_.call.world.size, -1});
  }

  std::vector<Format> formats() const {
    std::vector<Format> all = {Format::raw, Format::partial, Format::final};
    if (plan_.call.coded()) all.push_back(Format::wire);
    return all;
  }

  // What goes wrong with codecs alone: where an encode is, what is encoded, and by whom it is read how.
  void mutate_transcode(int i) {
    const Program& program = plan_.programs[rank_];
    const Step& step = program.steps[i];
    const std::string who = describe(plan_, rank_, step) + ": ";
    const auto item = static_cast<int64_t>(size_of(plan_.call.dtype));
    set<int32_t>(who + "transcode",
                 [&](Plan& plan) -> auto& { return plan.programs[rank_].steps[i].transcode; },
                 {step.transcode >= 0 ? -1 : 0, static_cast<int32_t>(program.transcodes.size())});
    if (step.transcode < 0) return;
    const Transcode& how = program.transcodes[step.transcode];
    auto here = [&](auto member) {
      return [this, t = step.transcode, member](Plan& plan) -> auto& {
        return plan.programs[rank_].transcodes[t].*member;
      };
    };
    set<bool>(who + "divides", here(&Transcode::divides), {!how.divides});
    for (int s = step.num_dsts; s < step.num_dsts + step.num_srcs; ++s) {
      if (program.operands[step.operand + s].format != Format::wire) continue;
      mutant(who + "a source exact", [&](Plan& plan) {
        plan.programs[rank_].operands[step.operand + s] = {Space::in, Format::raw, rank_, how.element * item,
                                                           how.stride * item};
      });
    }
    if (step.num_dsts == 1 && step.num_srcs == 1) {
      mutant(who + "bytes copied as they are", [&](Plan& plan) {
        Program& changed = plan.programs[rank_];
        changed.steps[i].transcode = -1;
        changed.steps[i].dst_format = Format::raw;
        changed.operands[step.operand].format = changed.operands[step.operand + 1].format = Format::raw;
      });
    }
    if (!encodes(program, step)) return;
    constexpr int64_t tile = kTile;
    set<uint8_t>(who + "encode's turn", here(&Transcode::turn),
                 {static_cast<uint8_t>(how.turn + 1), static_cast<uint8_t>(how.turn - 1)});
    set<int64_t>(who + "index", here(&Transcode::index),
                 {how.index + tile, how.index - tile, how.index + 1, 0});
    set<int64_t>(who + "element", here(&Transcode::element), {how.element + tile, how.element + 1, 0});
    set<int64_t>(who + "encode's stride", here(&Transcode::stride), {how.stride + tile, how.stride - 1, 0});
    mutant(who + "again", [&](Plan& plan) {
      duplicate_step(plan.programs[rank_], i);
      Program& changed = plan.programs[rank_];
      changed.transcodes.push_back(how);
      ++changed.transcodes.back().turn;
      changed.steps[i + 1].transcode = static_cast<int32_t>(changed.transcodes.size()) - 1;
    });
  }

  void mutate_operand(const Step& step, int o) {
    const int index = step.operand + o;
    const Operand& operand = plan_.programs[rank_].operands[index];
    const std::string who = describe(plan_, rank_, step) + ": operand " + std::to_string(o) + " ";
    auto here = [&](auto member) {
      return
          [this, index, member](Plan& plan) -> auto& { return plan.programs[rank_].operands[index].*member; };
    };
    const auto item = static_cast<int64_t>(size_of(plan_.call.dtype));
    set<int64_t>(who + "offset", here(&Operand::offset),
                 {operand.offset + item, operand.offset - item, operand.offset + 1, operand.offset + 64,
                  operand.offset - 64, 0});
    if (operand.format == Format::wire) {
      const int64_t tile = tile_bytes(plan_.call.codec.kind);
      set<int64_t>(who + "offset", here(&Operand::offset), {operand.offset + tile, operand.offset - tile});
    }
    set<int64_t>(who + "stride", here(&Operand::stride),
                 {operand.stride + item, operand.stride - item, operand.stride * 2, 0});
    set<int32_t>(who + "rank", here(&Operand::rank), {(operand.rank + 1) % plan_.call.world.size});
    for (Space space : {Space::in, Space::out, Space::window, Space::outgoing, Space::incoming}) {
      if (space != operand.space) set<Space>(who + "space", here(&Operand::space), {space});
    }
    for (Format format : formats()) {
      if (format != operand.format) set<Format>(who + "format", here(&Operand::format), {format});
    }
    if (o + 1 < step.num_dsts + step.num_srcs) {
      mutant(who + "swap with the next", [&](Plan& plan) {
        auto& operands = plan.programs[rank_].operands;
        std::swap(operands[index], operands[index + 1]);
      });
    }
  }

  void mutate_loop(size_t l) {
    const Loop& loop = plan_.programs[rank_].loops[l];
    const std::string who = "rank " + std::to_string(rank_) + " loop " + std::to_string(l) + ": ";
    auto here = [&](auto member) {
      return [this, l, member](Plan& plan) -> auto& { return plan.programs[rank_].loops[l].*member; };
    };
    set<int64_t>(who + "trips", here(&Loop::trips), {loop.trips - 1, loop.trips + 1});
    set<int64_t>(who + "first", here(&Loop::first), {loop.first - 1, loop.first + 1});
    set<int32_t>(who + "stages", here(&Loop::stages), {loop.stages - 1, loop.stages + 1});
    set<int32_t>(who + "steps", here(&Loop::num_steps), {loop.num_steps - 1});
  }

  void mutate_plan() {
    set<int32_t>("slots", [](Plan& plan) -> auto& { return plan.slots; }, {plan_.slots - 1, plan_.slots + 1});
    set<int64_t>("slot bytes", [](Plan& plan) -> auto& { return plan.slot_bytes; },
                 {plan_.slot_bytes - 64, plan_.slot_bytes / 2, plan_.slot_bytes + 64});
    set<int64_t>("bank bytes", [](Plan& plan) -> auto& { return plan.bank_bytes; },
                 {plan_.bank_bytes - 64, plan_.bank_bytes / 2});
    mutant("one slot more, of as much less",
           [](Plan& plan) { plan.slot_bytes = plan.bank_bytes / ++plan.slots; });
    mutant("one slot for all trips", [](Plan& plan) { plan.slots = 1; });
    set<int32_t>("cells", [](Plan& plan) -> auto& { return plan.cells; }, {plan_.cells - 1});
    if (!plan_.call.world.nodes.empty()) {
      set<int32_t>("channels", [](Plan& plan) -> auto& { return plan.channels; }, {plan_.channels - 1});
      mutant("all ranks on one node", [](Plan& plan) { plan.call.world.nodes.clear(); });
      for (int rank = 0; rank < plan_.call.world.size; ++rank) {
        mutant("another node", [&](Plan& plan) { plan.call.world.nodes[rank] ^= 1; });
      }
    }
    set<double>("prescale", [](Plan& plan) -> auto& { return plan.prescale; }, {plan_.prescale * 2});
    set<double>("divisor", [](Plan& plan) -> auto& { return plan.divisor; }, {plan_.divisor * 2});
    set<bool>("full exchange", [](Plan& plan) -> auto& { return plan.full_exchange; },
              {!plan_.full_exchange});
    if (plan_.call.coded()) {
      set<bool>("encodes once", [](Plan& plan) -> auto& { return plan.encodes_once; }, {!plan_.encodes_once});
    }
    set<Op>("operator", [](Plan& plan) -> auto& { return plan.call.op; },
            {plan_.call.op == Op::avg ? Op::sum : Op::avg});
    for (Placement placement :
         {Placement::plain, Placement::symmetric, Placement::reachable, Placement::told}) {
      if (placement != plan_.call.in)
        set<Placement>("input's placement", [](Plan& plan) -> auto& { return plan.call.in; }, {placement});
      if (placement != plan_.call.out)
        set<Placement>("output's placement", [](Plan& plan) -> auto& { return plan.call.out; }, {placement});
    }
    for (int delta : {-1, 1}) {
      mutant("all ranks' trips", [&](Plan& plan) {
        for (Program& program : plan.programs) {
          if (!program.loops.empty()) program.loops.front().trips += delta;
        }
      });
      mutant("all ranks' stages", [&](Plan& plan) {
        for (Program& program : plan.programs) {
          for (Loop& loop : program.loops) loop.stages += delta;
        }
      });
    }
  }

  const Plan& plan_;
  const Visit& visit_;
  int rank_ = 0;
};

// ---- The trial ----

struct Tally {
  long plans = 0, reachable = 0, mutants = 0, wrong = 0, rejected = 0, overcautious = 0, unknown = 0;
  long by_kind[6] = {};  // how the wrong ones were rejected
  void print(const char* what) const {
    std::printf(
        "       %s: %ld plans (%ld reachable), %ld mutants, %ld wrong, %ld of these rejected (data %ld, race "
        "%ld, bounds "
        "%ld, "
        "deadlock %ld, exchange %ld, malformed %ld); %ld more rejected that no interleaving breaks; %ld too "
        "large to judge\n",
        what, plans, reachable, mutants, wrong, rejected, by_kind[0], by_kind[1], by_kind[2], by_kind[3],
        by_kind[4], by_kind[5], overcautious, unknown);
  }
};

// Breaks call `target` of a sequence in every way, or in every `every`-th.
void try_mutants(const std::vector<const Plan*>& calls, size_t target, bool balanced, int every,
                 Tally& tally) {
  ++tally.plans;
  const VerifyOptions options{.balanced = balanced};
  const auto sound = verify_sequence(calls, options);
  if (sound) return check::fail(__FILE__, __LINE__, "rejects a correct plan: " + sound->what);
  const auto judged = explore::explore(calls, balanced);
  if (judged.wrong)
    return check::fail(__FILE__, __LINE__, "the search finds a correct plan wrong: " + judged.why);
  CHECK(judged.complete);
  long index = tally.plans;  // another sample of each plan
  const Visit visit = [&](const std::string& what, const Plan& mutant) {
    if (++index % every != 0) return;
    ++tally.mutants;
    std::vector<const Plan*> changed = calls;
    for (const Plan*& plan : changed) {
      if (plan == calls[target]) plan = &mutant;
    }
    const auto verdict = explore::explore(changed, balanced);
    const auto counterexample = verify_sequence(changed, options);
    if (!verdict.complete) {
      ++tally.unknown;
    } else if (!verdict.wrong) {
      tally.overcautious += counterexample.has_value();
    } else {
      ++tally.wrong;
      tally.rejected += counterexample.has_value();
      if (counterexample) ++tally.by_kind[static_cast<int>(counterexample->kind)];
      if (!counterexample) {
        check::fail(__FILE__, __LINE__,
                    std::string("proves a wrong mutant of ") + name(mutant.call.world.collective) + " " +
                        mutant.algorithm + ", " + what + " (" + verdict.why + ")");
      }
    }
  };
  Mutator(*calls[target], visit).run();
}

Call make_call(const World& world, int64_t count, Placement in, Placement out, bool in_place, DType dtype) {
  Call call;
  call.world = world;
  call.dtype = dtype;
  call.in = in;
  call.out = out;
  call.in_place = in_place;
  switch (world.collective) {
    case Collective::all_reduce:
    case Collective::broadcast:
    case Collective::reduce:
    case Collective::send_recv:
      call.counts = {count};
      break;
    case Collective::barrier:
      call.counts = {0};
      break;
    case Collective::reduce_scatter:
    case Collective::all_gather:
    case Collective::gather:
    case Collective::scatter:
      for (int rank = 0; rank < world.size; ++rank) call.counts.push_back(count / world.size + 1 - rank);
      break;
    case Collective::all_to_all:
      call.counts.assign(static_cast<size_t>(world.size) * world.size, count / world.size);
      break;
  }
  return call;
}

// complex128: four elements make a cache line, the grain of chunks, so that plans stay small.
void try_algorithms(int n, int64_t count, int every, DType dtype, Tally& tally) {
  const struct {
    Placement in, out;
    bool in_place;
  } kinds[] = {{Placement::plain, Placement::plain, false},
               {Placement::plain, Placement::plain, true},
               {Placement::symmetric, Placement::symmetric, false},
               {Placement::symmetric, Placement::symmetric, true},
               {Placement::plain, Placement::symmetric, false},
               {Placement::reachable, Placement::plain, false},
               {Placement::reachable, Placement::plain, true},
               {Placement::reachable, Placement::symmetric, false},
               {Placement::told, Placement::told, true}};
  Geometry geometry;
  geometry.bank_bytes = 64 << 10;
  geometry.trip_bytes = 64 * n;
  geometry.payload_bytes = kPayloadBytes;
  for (const Algorithm& algorithm : algorithms()) {
    if (algorithm.write == find_algorithm(Collective::all_reduce, "hierarchical").write)
      continue;  // on nodes, below
    for (const auto& kind : kinds) {
      const Call call =
          make_call({algorithm.collective, n, n - 1, 0}, count, kind.in, kind.out, kind.in_place, dtype);
      const Plan plan = make_plan(algorithm.name, call, geometry);
      if (plan.call.in != call.in) continue;  // lowered as plain
      tally.reachable += plan.call.in == Placement::reachable;
      try_mutants({&plan}, 0, algorithm.balanced, every, tally);
    }
  }
}

}  // namespace

TEST(every_wrong_mutant_of_a_single_call_is_rejected) {
  // In the cells; one trip; four trips in two slots; eleven, so that the verifier leaves some out.
  const struct {
    int n;
    int64_t count;
    int every;
  } trials[] = {{2, 3, 1}, {3, 3, 2}, {2, 6, 1}, {2, 27, 1}, {2, 83, 5}, {3, 9, 2}, {3, 41, 5}};
  for (const auto& trial : trials) {
    Tally tally;
    try_algorithms(trial.n, trial.count, trial.every, DType::complex128, tally);
    tally.print((std::to_string(trial.n) + " ranks, count " + std::to_string(trial.count)).c_str());
    CHECK(tally.wrong > 1000);
    CHECK(tally.reachable >= 3 * 5);  // direct alone has five
    CHECK_EQ(tally.rejected, tally.wrong);
    CHECK_EQ(tally.unknown, 0);
  }
}

// Some pairs share memory, others send messages.
TEST(every_wrong_mutant_between_nodes_is_rejected) {
  const struct {
    std::vector<int> nodes;
    int64_t count;
    int every;
  } trials[] = {{{0, 1}, 3, 1},    {{0, 1}, 27, 1},   {{0, 1}, 83, 5},
                {{0, 0, 1}, 3, 2}, {{0, 1, 2}, 9, 3}, {{0, 1, 0}, 41, 9}};
  Geometry geometry;
  geometry.bank_bytes = 64 << 10;
  geometry.payload_bytes = kPayloadBytes;
  for (const auto& [nodes, count, every] : trials) {
    const int n = static_cast<int>(nodes.size());
    geometry.trip_bytes = 64 * n;
    Tally tally;
    for (const Algorithm& algorithm : algorithms()) {
      for (const auto& [in, out, in_place] : {std::tuple{Placement::plain, Placement::plain, false},
                                              {Placement::plain, Placement::plain, true},
                                              {Placement::symmetric, Placement::symmetric, false},
                                              {Placement::symmetric, Placement::symmetric, true},
                                              {Placement::reachable, Placement::plain, false}}) {
        const Call call = make_call({algorithm.collective, n, n - 1, 0, nodes}, count, in, out, in_place,
                                    DType::complex128);
        const Plan plan = make_plan(algorithm.name, call, geometry);
        if (plan.call.in != in) continue;  // nothing of it is only copied
        try_mutants({&plan}, 0, algorithm.balanced, every, tally);
      }
    }
    tally.print((std::to_string(n) + " ranks on nodes, count " + std::to_string(count)).c_str());
    CHECK(tally.wrong > 500);
    CHECK_EQ(tally.rejected, tally.wrong);
    CHECK_EQ(tally.unknown, 0);
  }
}

// Results of 16-bit floats travel as float32: formats and element sizes differ.
TEST(every_wrong_mutant_with_wide_partial_results_is_rejected) {
  Tally tally;
  for (const char* name : {"ring", "tree", "recursive_doubling"}) {
    Call call = make_call({Collective::all_reduce, 2, 0, 1}, 100, Placement::plain, Placement::plain, false,
                          DType::float16);
    call.prescale = 0.5;
    Geometry geometry;
    geometry.bank_bytes = 64 << 10;
    geometry.trip_bytes = 128;
    const Plan plan = make_plan(name, call, geometry);
    try_mutants({&plan}, 0, find_algorithm(Collective::all_reduce, name).balanced, 1, tally);
  }
  tally.print("float16");
  CHECK(tally.wrong > 500);
  CHECK_EQ(tally.rejected, tally.wrong);
  CHECK_EQ(tally.unknown, 0);
}

// Windows hold tiles, and an encode depends on the rank that makes it and on its place. sign has the
// smallest tiles. Two ranks with a tile each and a tail; trips of a tile or two, in three slots; blocks
// shorter than a tile.
TEST(every_wrong_mutant_with_a_codec_is_rejected) {
  Tally tally;
  const struct {
    Collective collective;
    const char* algorithm;
    int n;
    std::vector<int64_t> counts;
    int64_t trip_tiles;
    int every;
    std::vector<int> nodes = {};
    Links links = Links::all;
  } trials[] = {
      {Collective::all_reduce, "two_shot", 2, {2051}, 8, 1},
      {Collective::all_reduce, "two_shot", 2, {4 * 2048 + 5}, 2, 9},
      {Collective::all_reduce, "one_shot", 2, {5}, 8, 1},
      {Collective::all_reduce, "one_shot", 2, {1030}, 1, 2},
      {Collective::all_reduce, "ring", 2, {2051}, 8, 2},
      {Collective::all_reduce, "ring", 3, {3077}, 8, 9},
      {Collective::all_reduce, "tree", 2, {2051}, 8, 2},
      {Collective::all_reduce, "halving_doubling", 2, {2051}, 8, 2},
      {Collective::reduce_scatter, "direct", 2, {3, 5}, 8, 1},
      {Collective::reduce_scatter, "direct", 2, {1030, 1027}, 1, 3},
      {Collective::reduce_scatter, "ring", 3, {3, 5, 4}, 8, 2},
      {Collective::reduce_scatter, "recursive_halving", 3, {3, 5, 4}, 8, 2},
      {Collective::all_gather, "direct", 2, {3, 5}, 8, 1},
      {Collective::all_gather, "direct", 2, {1030, 5}, 1, 3},
      {Collective::all_gather, "ring", 3, {3, 5, 4}, 8, 2},
      {Collective::all_gather, "recursive_doubling", 3, {3, 5, 4}, 8, 2},
      {Collective::all_reduce, "two_shot", 2, {2051}, 8, 2, {0, 1}},
      {Collective::all_reduce, "two_shot", 3, {3077}, 8, 9, {0, 1, 0}},
      {Collective::all_reduce, "one_shot", 2, {1030}, 1, 3, {0, 1}},
      {Collective::reduce_scatter, "ring", 3, {3, 5, 4}, 8, 3, {0, 0, 1}},
      {Collective::all_gather, "direct", 2, {1030, 5}, 1, 3, {0, 1}},
      {Collective::all_reduce, "hierarchical", 3, {3077}, 8, 9, {0, 0, 1}},
      {Collective::all_reduce, "hierarchical", 2, {2051}, 8, 2, {0, 1}, Links::wire},
      {Collective::all_reduce, "hierarchical", 3, {4 * 1024 + 5}, 8, 9, {0, 0, 1}, Links::wire},
      {Collective::all_reduce, "two_shot", 3, {3077}, 8, 9, {0, 1, 0}, Links::wire},
      {Collective::reduce_scatter, "hierarchical", 3, {3, 5, 4}, 8, 3, {0, 0, 1}, Links::wire},
      {Collective::reduce_scatter, "direct", 2, {1030, 5}, 1, 3, {0, 1}, Links::wire},
      {Collective::reduce_scatter, "ring", 3, {3, 5, 4}, 8, 3, {0, 0, 1}, Links::wire},
      {Collective::all_gather, "hierarchical", 3, {3, 5, 4}, 8, 3, {0, 0, 1}, Links::wire},
      {Collective::all_gather, "direct", 3, {3, 1030, 4}, 8, 3, {0, 1, 0}, Links::wire},
  };
  for (const auto& trial : trials) {
    Call call{.world = {.collective = trial.collective, .size = trial.n, .nodes = trial.nodes},
              .dtype = DType::float16};
    call.op = trial.collective == Collective::all_gather ? Op::sum : Op::avg;
    call.counts = trial.counts;
    call.codec.kind = CodecKind::sign;
    call.codec.links = trial.links;
    Geometry geometry;
    geometry.bank_bytes = 64 << 10;
    const int64_t blocks = static_cast<int64_t>(trial.counts.size());
    geometry.trip_bytes = trial.trip_tiles * tile_bytes(call.codec.kind) * blocks;
    const Plan plan = make_plan(trial.algorithm, call, geometry);
    const bool balanced = find_algorithm(trial.collective, trial.algorithm).balanced;
    const long wrong = tally.wrong;
    try_mutants({&plan}, 0, balanced, trial.every, tally);
    CHECK(tally.wrong > wrong + 20);
  }
  // Between plain calls on the same windows; both ways.
  Geometry geometry;
  geometry.bank_bytes = 64 << 10;
  Call gather{
      .world = {.collective = Collective::all_gather, .size = 2}, .dtype = DType::float16, .counts = {3, 5}};
  gather.codec.kind = CodecKind::sign;
  const Call broadcast{
      .world = {.collective = Collective::broadcast, .size = 2}, .dtype = DType::float16, .counts = {40}};
  const Plan coded = make_plan("direct", gather, geometry), plain = make_plan("direct", broadcast, geometry);
  for (size_t target : {0, 1}) {
    try_mutants({&coded, &plain, &coded}, target, true, 2, tally);
    try_mutants({&plain, &coded, &plain}, target, true, 2, tally);
  }
  tally.print("codecs");
  CHECK(tally.wrong > 1500);
  CHECK_EQ(tally.rejected, tally.wrong);
  CHECK_EQ(tally.unknown, 0);
}

// Calls of different kinds follow each other through the two banks; each is broken in turn.
TEST(every_wrong_mutant_of_a_sequence_is_rejected) {
  Tally tally;
  struct Named {
    Collective collective;
    const char* algorithm;
    Placement in = Placement::plain;
  };
  const std::vector<Named> sequences[] = {
      {{Collective::all_reduce, "two_shot"},
       {Collective::broadcast, "binomial"},
       {Collective::all_reduce, "two_shot"}},
      {{Collective::broadcast, "direct"},
       {Collective::reduce, "binomial"},
       {Collective::broadcast, "direct"}},
      {{Collective::send_recv, "direct"}, {Collective::all_gather, "ring"}, {Collective::reduce, "direct"}},
      {{Collective::barrier, "dissemination"},
       {Collective::scatter, "direct"},
       {Collective::barrier, "dissemination"},
       {Collective::gather, "direct"}},
      {{Collective::all_reduce, "one_shot"},
       {Collective::all_reduce, "one_shot"},
       {Collective::all_reduce, "one_shot"}},
      {{Collective::all_gather, "direct", Placement::reachable},
       {Collective::broadcast, "direct"},
       {Collective::broadcast, "direct", Placement::reachable}},
  };
  Geometry geometry;
  geometry.bank_bytes = 4 << 10;
  const struct {
    int n;
    int64_t count;
    std::vector<int> nodes;
    int every;
  } worlds[] = {{2, 3, {}, 1},     {2, 6, {}, 1},
                {3, 3, {}, 3},     {3, 6, {}, 3},  // three elements travel in cells
                {2, 6, {0, 1}, 3}, {3, 6, {0, 1, 0}, 9}};
  geometry.payload_bytes = kPayloadBytes;
  for (const auto& [n, count, nodes, every] : worlds) {
    geometry.trip_bytes = 64 * n;
    for (const auto& sequence : sequences) {
      std::vector<Plan> plans;
      bool balanced = true;
      for (const Named& named : sequence) {
        const Call call = make_call({named.collective, n, 0, 1, nodes}, count, named.in, Placement::plain,
                                    false, DType::complex128);
        plans.push_back(make_plan(named.algorithm, call, geometry));
        balanced = balanced && find_algorithm(named.collective, named.algorithm).balanced;
      }
      std::vector<const Plan*> calls;
      for (const Plan& plan : plans) calls.push_back(&plan);
      for (size_t target = 0; target < calls.size(); ++target) {
        try_mutants(calls, target, balanced, every, tally);
      }
    }
  }
  tally.print("sequences");
  CHECK(tally.wrong > 500);
  CHECK_EQ(tally.rejected, tally.wrong);
  CHECK_EQ(tally.unknown, 0);
}
