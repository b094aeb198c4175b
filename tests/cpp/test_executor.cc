// Rank threads and processes execute plans; the results are compared with the meaning of the collective.
// Values are small integers, so that every sum is exact in every dtype and order, and in the codecs used
// here.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <thread>

#include "check.h"
#include "common/error.h"
#include "meeting.h"
#include "runtime/heap.h"
#include "runtime/sequence.h"
#include "schedule/lower/layout.h"
#include "schedule/lower/lower.h"

using namespace pycomm;
using namespace pycomm::runtime;
using schedule::Call;
using schedule::Placement;

namespace {

// Small windows, so that small counts make several trips.
constexpr schedule::Geometry kGeometry = {.bank_bytes = 64 << 10,
                                          .trip_bytes = 4 << 10,
                                          .stream_bytes = 20 << 10,
                                          .max_cells = kCellsPerPair,
                                          .payload_bytes = schedule::kPayloadBytes};
// Trips of a few tiles.
constexpr schedule::Geometry kCodecGeometry = {
    .bank_bytes = 64 << 10, .trip_bytes = 16 << 10, .stream_bytes = 40 << 10, .max_cells = kCellsPerPair};
constexpr int64_t kGuard = 64, kLine = 64;
constexpr char kUntouched = 0x5a;

double value(int rank, int64_t i, int salt) { return static_cast<double>((rank * 7 + i * 3 + salt) % 29); }

template <class Use>
void as(DType dtype, Use&& use) {
  switch (dtype) {
    case DType::float32:
      return use(float{});
    case DType::float64:
      return use(double{});
    case DType::int64:
      return use(int64_t{});
    case DType::uint8:
      return use(uint8_t{});
    default:
      check::fail(__FILE__, __LINE__, std::string("the tests do not know ") + name(dtype));
  }
}

void put(DType dtype, char* base, int64_t i, double v) {
  as(dtype, [&]<class T>(T) {
    const T element = static_cast<T>(v);
    std::memcpy(base + i * static_cast<int64_t>(sizeof(T)), &element, sizeof(T));
  });
}

double get(DType dtype, const char* base, int64_t i) {
  double v = 0;
  as(dtype, [&]<class T>(T) {
    T element;
    std::memcpy(&element, base + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    v = static_cast<double>(element);
  });
  return v;
}

// What rank's output element i must be.
double expected(const Call& call, int rank, int64_t i, int salt) {
  const int n = call.world.size;
  const auto in = [&](int r, int64_t at) { return value(r, at, salt); };
  const auto reduced = [&](int64_t at) {
    double all = in(0, at);
    for (int r = 1; r < n; ++r) all = call.op == Op::max ? std::max(all, in(r, at)) : all + in(r, at);
    if (call.op != Op::avg) return all;
    return call.dtype == DType::float32 ? static_cast<double>(static_cast<float>(all) / static_cast<float>(n))
                                        : all / n;
  };
  // The block that element i of a row of blocks lies in, and where in it.
  const auto find = [&](const std::function<int64_t(int)>& length) {
    int block = 0;
    while (i >= length(block)) i -= length(block++);
    return block;
  };
  const auto before = [&](int block, const std::function<int64_t(int)>& length) {
    int64_t sum = 0;
    for (int b = 0; b < block; ++b) sum += length(b);
    return sum;
  };
  const auto count = [&](int b) { return call.counts[b]; };
  switch (call.world.collective) {
    case Collective::all_reduce:
    case Collective::reduce:
      return reduced(i);
    case Collective::reduce_scatter:
      return reduced(before(rank, count) + i);
    case Collective::all_gather:
    case Collective::gather: {
      const int from = find(count);
      return in(from, i);
    }
    case Collective::broadcast:
    case Collective::send_recv:
      return in(call.world.root, i);
    case Collective::scatter:
      return in(call.world.root, before(rank, count) + i);
    case Collective::all_to_all: {
      const int from = find([&](int b) { return call.counts[b * n + rank]; });
      return in(from, before(rank, [&](int b) { return call.counts[from * n + b]; }) + i);
    }
    case Collective::barrier:
      break;
  }
  return 0;
}

bool own_slot_in(Collective c) { return c == Collective::all_gather || c == Collective::gather; }
bool own_slot_out(Collective c) { return c == Collective::reduce_scatter || c == Collective::scatter; }

// A call on all ranks: its plans, and for symmetric buffers where they lie. Made by one thread before the
// ranks start.
struct Scenario {
  Call call;
  std::string algorithm;
  int salt;
  Coding coding;
  std::vector<std::shared_ptr<Prepared>> plans, meetings;
  int64_t in_extent = 0, out_extent = 0;  // offsets in the node's file

  Scenario(Call c, std::string name, int salt) : call(std::move(c)), algorithm(std::move(name)), salt(salt) {
    // In place, a rank's own slot of a symmetric buffer lies elsewhere on every rank: the plan takes it for
    // plain.
    if (call.in_place && own_slot_in(call.world.collective) && schedule::in_reach(call.in))
      call.in = Placement::plain;
    if (call.in_place && own_slot_out(call.world.collective)) call.out = Placement::plain;
    coding.codec = call.codec;
    const schedule::Geometry& geometry = call.coded() ? kCodecGeometry : kGeometry;
    for (int rank = 0; rank < call.world.size; ++rank) {
      plans.push_back(std::make_shared<Prepared>(schedule::make_plan(algorithm, call, geometry, rank), rank));
      if (call.told())
        meetings.push_back(std::make_shared<Prepared>(meeting(call.world.size, rank, geometry)));
    }
  }
  int64_t item() const { return static_cast<int64_t>(size_of(call.dtype)); }
  // The largest of any rank: symmetric slices have one size. Told buffers lie in such, a line further on each
  // rank.
  int64_t bytes(int64_t (*elements)(const Call&, int)) const {
    int64_t most = 0;
    for (int rank = 0; rank < call.world.size; ++rank) most = std::max(most, elements(call, rank));
    return most * item() + call.world.size * kLine;
  }
  std::string title() const {
    std::string counts;
    for (size_t i = 0; i < std::min<size_t>(call.counts.size(), 9); ++i) {
      counts += (i ? "," : "") + std::to_string(call.counts[i]);
    }
    const auto placed = [](Placement p) {
      return p == Placement::plain       ? "plain"
             : p == Placement::symmetric ? "symmetric"
             : p == Placement::told      ? "told"
                                         : "reachable";
    };
    return algorithm + " " + name(call.world.collective) + ", " + std::to_string(call.world.size) +
           " ranks, counts " + counts + ", " + name(call.dtype) + " " + name(call.op) + ", root " +
           std::to_string(call.world.root) + ", peer " + std::to_string(call.world.peer) + ", in " +
           placed(call.in) + ", out " + placed(call.out) + (call.in_place ? ", in place" : "") +
           (call.coded() ? std::string(", ") + pycomm::name(call.codec.kind) : "");
  }
};

// One rank: runs scenarios one after the other on its domain.
class Rank {
 public:
  Rank(std::shared_ptr<transport::Node> node, int size, int rank, int64_t offset)
      : node_(std::move(node)), heap_(std::make_shared<Heap>(node_)), rank_(rank) {
    std::vector<int> ranks(size);
    std::iota(ranks.begin(), ranks.end(), 0);
    domain_ = std::make_unique<Domain>(node_, ranks, rank, offset, kGeometry.bank_bytes);
    calls_.emplace(*domain_);
    policy_ = wait_policy(size, 2);
    transport::register_for_fences();
  }

  void operator()(const Scenario& s) {
    const Call& call = s.call;
    const Collective kind = call.world.collective;
    const int64_t item = s.item();
    const int64_t ins = schedule::in_elements(call, rank_), outs = schedule::out_elements(call, rank_);
    Memory in_memory, out_memory;
    in_memory.make(*this, call.in, s.in_extent, s.bytes(schedule::in_elements), ins * item, call.world.size);
    Bases bases;
    char *in = in_memory.data, *out = nullptr;
    const bool in_inside = call.in_place && own_slot_in(kind) && outs > 0;
    const bool out_inside = call.in_place && !own_slot_in(kind) && ins > 0;
    if (out_inside) {
      out = in + (own_slot_out(kind) ? before(call, rank_) * item : 0);
      bases.out_distance = call.out == Placement::symmetric ? in_memory.distance : 0;
    } else {
      out_memory.make(*this, call.out, s.out_extent, s.bytes(schedule::out_elements), outs * item,
                      call.world.size);
      out = out_memory.data;
      bases.out_distance = out_memory.distance;
      if (in_inside) in = out + before(call, rank_) * item;
    }
    if (!out_inside) std::memset(out, kUntouched, static_cast<size_t>(outs * item));
    for (int64_t i = 0; i < ins; ++i) put(call.dtype, in, i, value(rank_, i, s.salt));
    bases.in = in;
    bases.out = out;
    bases.in_distance = in_memory.distance;
    Coding coding = s.coding;
    bases.coding = &coding;
    std::vector<char*> told;
    for (int r = 0; r < call.world.size; ++r) told.push_back(r == rank_ ? in : in_memory.base_of(r));
    for (int r = 0; r < call.world.size; ++r) {
      told.push_back(r == rank_ ? out : (out_inside ? in_memory : out_memory).base_of(r));
    }
    if (call.told()) {
      bases.told = told.data();
      calls_->complete(*s.meetings[rank_], {}, policy_, 60, patience_);
    }

    const Prepared& prepared = *s.plans[rank_];
    calls_->complete(prepared, bases, policy_, 60, patience_);
    // What is its caller's again may be used at once.
    if (call.in == Placement::reachable && !call.in_place) {
      for (int64_t i = 0; i < ins; ++i) put(call.dtype, in, i, 28 - value(rank_, i, s.salt));
    }

    std::string wrong;
    for (int64_t i = 0; i < outs && wrong.empty(); ++i) {
      const double there = get(call.dtype, out, i), should = expected(call, rank_, i, s.salt);
      if (there != should) {
        wrong = "element " + std::to_string(i) + " is " + std::to_string(there) + ", should be " +
                std::to_string(should);
      }
    }
    for (int64_t i = 0; i < ins && wrong.empty() && !call.in_place && call.in != Placement::reachable; ++i) {
      if (get(call.dtype, in, i) != value(rank_, i, s.salt)) wrong = "its input has changed";
    }
    if (!in_memory.sound() || !out_memory.sound()) wrong = "memory around its buffers has changed";
    if (!wrong.empty())
      check::fail(__FILE__, __LINE__, s.title() + ": rank " + std::to_string(rank_) + ": " + wrong);
  }

  void meet() {  // symmetric buffers may be freed when all have finished
    const uint64_t calls = calls_->calls();
    for (int r = 0; r < domain_->size(); ++r) {
      while (domain_->board().member(r).finished.load(std::memory_order_acquire) < calls)
        std::this_thread::yield();
    }
  }

 private:
  static int64_t before(const Call& call, int block) {
    return std::accumulate(call.counts.begin(), call.counts.begin() + block, int64_t{0});
  }

  // A plain buffer between guards, not aligned to anything but its elements; or a slice of symmetric memory.
  struct Memory {
    std::vector<char> plain;
    std::shared_ptr<Allocation> allocation;
    char* data = nullptr;
    int64_t distance = 0, size = 0, apart = 0;
    char* base_of(int rank) const { return allocation ? data + (rank - me) * apart : nullptr; }
    int me = 0;
    void make(Rank& rank, Placement placement, int64_t extent, int64_t most, int64_t bytes, int ranks) {
      if (schedule::in_reach(placement)) {
        std::vector<int> all(ranks);
        std::iota(all.begin(), all.end(), 0);
        allocation = rank.heap_->open(extent, most, all, rank.rank_);
        const bool told = placement == Placement::told;
        me = rank.rank_;
        data = allocation->data() + (told ? me * kLine : 0);
        const int64_t found = rank.heap_->find(data, bytes).distance;
        (told ? apart : distance) = found + (told ? kLine : 0);
        return;
      }
      plain.assign(static_cast<size_t>(bytes + 2 * kGuard), kUntouched);
      data = plain.data() + kGuard;
      size = bytes;
    }
    bool sound() const {
      if (!plain.size()) return true;
      const auto untouched = [](char c) { return c == kUntouched; };
      return std::all_of(plain.begin(), plain.begin() + kGuard, untouched) &&
             std::all_of(plain.end() - kGuard, plain.end(), untouched);
    }
  };

  std::shared_ptr<transport::Node> node_;
  std::shared_ptr<Heap> heap_;
  std::unique_ptr<Domain> domain_;
  int rank_;
  std::optional<Sequence> calls_;
  WaitPolicy policy_;
  Patience patience_;
};

void reserve(transport::Node& node, Scenario& s) {
  const int n = s.call.world.size;
  const auto extent = [&](int64_t bytes) { return node.reserve(Heap::extent_bytes(bytes, n)); };
  if (schedule::in_reach(s.call.in)) s.in_extent = extent(s.bytes(schedule::in_elements));
  if (schedule::in_reach(s.call.out)) s.out_extent = extent(s.bytes(schedule::out_elements));
}

void play(Rank& rank, const std::vector<Scenario>& scenarios) {
  for (const Scenario& s : scenarios) {
    rank(s);
    if (s.in_extent || s.out_extent) rank.meet();
  }
}

void run_threads(int n, std::vector<Scenario>& scenarios) {
  const auto nodes = transport::Node::local(n);
  const int64_t offset = nodes[0]->reserve(Domain::bytes(n, n, kGeometry.bank_bytes));
  for (Scenario& s : scenarios) reserve(*nodes[0], s);
  std::vector<std::thread> threads;
  for (int r = 0; r < n; ++r) {
    threads.emplace_back([&, r] {
      try {
        Rank rank(nodes[r], n, r, offset);
        play(rank, scenarios);
      } catch (const std::exception& error) {
        check::fail(__FILE__, __LINE__, "rank " + std::to_string(r) + ": " + error.what());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void run_processes(int n, std::vector<Scenario>& scenarios) {
  static int serial = 0;
  const std::string address = "executor-" + std::to_string(getpid()) + "-" + std::to_string(serial++);
  std::vector<pid_t> pids;
  for (int r = 0; r < n; ++r) {
    const pid_t pid = fork();
    if (pid) {
      pids.push_back(pid);
      continue;
    }
    check::failures = 0;
    try {
      auto node = transport::Node::join({.rank = r, .size = n, .address = address, .timeout_s = 30});
      // Rank 0 takes the memory and says where it is; the first word comes last.
      auto* extents = reinterpret_cast<std::atomic<int64_t>*>(node->root_page() + 64);
      if (r == 0) {
        size_t next = 1;
        for (Scenario& s : scenarios) {
          reserve(*node, s);
          extents[next++] = s.in_extent;
          extents[next++] = s.out_extent;
        }
        extents[0] = node->reserve(Domain::bytes(n, n, kGeometry.bank_bytes));
      }
      while (extents[0] == 0) usleep(100);
      for (size_t i = 0; i < scenarios.size(); ++i) {
        scenarios[i].in_extent = extents[1 + 2 * i];
        scenarios[i].out_extent = extents[2 + 2 * i];
      }
      Rank rank(node, n, r, extents[0]);
      play(rank, scenarios);
    } catch (const std::exception& error) {
      check::fail(__FILE__, __LINE__, "rank " + std::to_string(r) + ": " + error.what());
    }
    _exit(check::failures != 0);
  }
  for (const pid_t pid : pids) {
    int status = -1;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) continue;
    CHECK_EQ(status, 0);
  }
}

bool rooted(Collective c) {
  return c == Collective::broadcast || c == Collective::reduce || c == Collective::gather ||
         c == Collective::scatter || c == Collective::send_recv;
}

// Counts that do not divide; of unequal blocks where `uneven`.
std::vector<int64_t> counts_of(const schedule::World& world, int64_t count, bool uneven) {
  std::vector<int64_t> counts = schedule::uniform_counts(world, count);
  if (uneven && counts.size() > 1) {
    for (size_t i = 0; i < counts.size(); ++i) counts[i] = (count * static_cast<int64_t>(i % 5) + 1) / 3;
  }
  return counts;
}

// Everything that a plan can depend on, for one algorithm and size.
void add_scenarios(std::vector<Scenario>& all, const schedule::Algorithm& algorithm, int n) {
  const Collective kind = algorithm.collective;
  const std::vector<int> roots = rooted(kind) && n > 1 ? std::vector{0, n - 1} : std::vector{0};
  for (const int root : roots) {
    const schedule::World world{kind, n, root, kind == Collective::send_recv && n > 1 ? (root + 1) % n : 0};
    const std::vector<int64_t> sizes =
        kind == Collective::barrier ? std::vector<int64_t>{0} : std::vector<int64_t>{0, 1, 7, 517, 9001};
    for (const int64_t count : sizes) {
      for (const Placement placement :
           {Placement::plain, Placement::symmetric, Placement::reachable, Placement::told}) {
        if (placement == Placement::reachable && std::string(algorithm.name) != "direct") continue;
        for (const bool in_place : {false, true}) {
          for (const bool uneven : {false, true}) {
            if (uneven && (schedule::num_blocks(world) == 1 || !algorithm.ragged)) continue;
            if (uneven && in_place && kind == Collective::all_to_all) continue;
            const int salt = static_cast<int>(all.size() % 13);
            const DType dtypes[] = {DType::float32, DType::uint8, DType::int64, DType::float64};
            Call call{.world = world,
                      .dtype = dtypes[all.size() % 4],
                      .counts = counts_of(world, count, uneven),
                      .in = placement,
                      .out = placement == Placement::reachable ? Placement::plain : placement,
                      .in_place = in_place};
            if (schedule::traits(kind).reduces) {
              const bool real = call.dtype == DType::float32 || call.dtype == DType::float64;
              call.op = all.size() % 3 == 0 ? Op::max : all.size() % 3 == 1 && real ? Op::avg : Op::sum;
            }
            all.emplace_back(std::move(call), algorithm.name, salt);
          }
        }
      }
    }
  }
}

// Codecs that leave integers below 256 as they are.
void add_codec_scenarios(std::vector<Scenario>& all, const schedule::Algorithm& algorithm, int n) {
  if (algorithm.codecs == schedule::Algorithm::Codecs::none) return;
  const schedule::World world{.collective = algorithm.collective, .size = n};
  for (const int64_t count : {0, 1, 1000, 3072, 20011}) {
    for (const bool in_place : {false, true}) {
      for (const bool uneven : {false, true}) {
        if (uneven && schedule::num_blocks(world) == 1) continue;
        const bool averages = (n & (n - 1)) == 0 && all.size() % 2 == 0;
        Call call{.world = world, .counts = counts_of(world, count, uneven), .in_place = in_place};
        if (world.traits().reduces && averages) call.op = Op::avg;
        call.codec.kind = all.size() % 3 == 0 ? CodecKind::fp16 : CodecKind::bf16;
        all.emplace_back(std::move(call), algorithm.name, static_cast<int>(all.size() % 13));
      }
    }
  }
}

void every_algorithm(int n, const std::function<void(int, std::vector<Scenario>&)>& run) {
  for (const schedule::Algorithm& algorithm : schedule::algorithms()) {
    std::vector<Scenario> scenarios;
    add_scenarios(scenarios, algorithm, n);
    add_codec_scenarios(scenarios, algorithm, n);
    run(n, scenarios);
  }
}

// Calls drawn at random, of all kinds, one right after the other.
std::vector<Scenario> random_calls(int n, int how_many, unsigned seed, bool symmetric) {
  std::mt19937 random(seed);
  const auto draw = [&](int64_t below) {
    return static_cast<int64_t>(random() % static_cast<unsigned>(below));
  };
  std::vector<Scenario> all;
  const auto algorithms = schedule::algorithms();
  while (static_cast<int>(all.size()) < how_many) {
    const schedule::Algorithm& algorithm =
        algorithms[static_cast<size_t>(draw(static_cast<int64_t>(algorithms.size())))];
    schedule::World world{algorithm.collective, n,
                          rooted(algorithm.collective) ? static_cast<int>(draw(n)) : 0};
    if (world.collective == Collective::send_recv)
      world.peer = static_cast<int>((world.root + 1 + draw(n - 1)) % n);
    const int64_t count = draw(4) == 0 ? draw(12000) : draw(200);
    const DType dtypes[] = {DType::float32, DType::uint8, DType::int64, DType::float64};
    const Placement placements[] = {Placement::plain, symmetric && draw(4) == 0   ? Placement::symmetric
                                                      : symmetric && draw(4) == 0 ? Placement::told
                                                                                  : Placement::plain};
    const bool in_place = draw(2) == 0;
    const bool uneven =
        draw(2) == 0 && algorithm.ragged && !(in_place && world.collective == Collective::all_to_all);
    Call call{.world = world,
              .dtype = dtypes[draw(4)],
              .counts = counts_of(world, count, uneven),
              .in = draw(3) == 0 ? Placement::reachable : placements[draw(2)],
              .out = placements[draw(2)],
              .in_place = in_place};
    if (in_place && !own_slot_in(world.collective) && !own_slot_out(world.collective))
      call.out = call.in == Placement::reachable ? Placement::plain : call.in;
    if (algorithm.codecs != schedule::Algorithm::Codecs::none && draw(2) == 0) {
      call.codec.kind = CodecKind::bf16;
      call.dtype = DType::float32;
      call.in = call.out = Placement::plain;
    }
    all.emplace_back(std::move(call), algorithm.name, static_cast<int>(draw(13)));
  }
  return all;
}

}  // namespace

// Sanitizers look at the executor, and would take minutes for eight ranks on two cores.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr std::array kWorlds = {1, 2, 3, 4};
#else
constexpr std::array kWorlds = {1, 2, 3, 4, 5, 8};
#endif

TEST(every_algorithm_by_threads) {
  for (const int n : kWorlds) every_algorithm(n, run_threads);
}

TEST(every_algorithm_by_processes) {
  for (const int n : {2, 3}) every_algorithm(n, run_processes);
}

TEST(sequences_by_threads) {
  for (const int n : {2, 3, 4, 5}) {
    std::vector<Scenario> scenarios = random_calls(n, 300, 17u + static_cast<unsigned>(n), true);
    run_threads(n, scenarios);
  }
}

// Without symmetric buffers nobody meets between calls: a fast rank is a call ahead of a slow one.
TEST(sequences_by_processes) {
  for (const int n : {2, 3}) {
    std::vector<Scenario> scenarios = random_calls(n, 200, 5u + static_cast<unsigned>(n), false);
    run_processes(n, scenarios);
  }
}

// advance() never blocks: alone, a rank comes back at its first wait and says what for.
TEST(advance_does_not_block) {
  const auto nodes = transport::Node::local(2);
  const int64_t offset = nodes[0]->reserve(Domain::bytes(2, 2, kGeometry.bank_bytes));
  Domain first(nodes[0], {0, 1}, 0, offset, kGeometry.bank_bytes),
      second(nodes[1], {0, 1}, 1, offset, kGeometry.bank_bytes);
  const Call call{.world = {.size = 2}, .dtype = DType::float32, .counts = {5}, .in_place = true};
  float a[5] = {1, 2, 3, 4, 5}, b[5] = {10, 20, 30, 40, 50};
  const Prepared plan_a(schedule::make_plan("two_shot", call, kGeometry, 0), 0);
  const Prepared plan_b(schedule::make_plan("two_shot", call, kGeometry, 1), 1);
  Run run_a, run_b;
  const auto bytes = [](float* p) { return reinterpret_cast<char*>(p); };
  run_a.start(first, plan_a, {bytes(a), bytes(a)}, 1, plan_a.record, false);
  CHECK(!run_a.advance());
  CHECK(!run_a.advance());
  CHECK_EQ(run_a.blocked_on().peer, 1);
  CHECK(!run_a.blocked_on().met());
  run_b.start(second, plan_b, {bytes(b), bytes(b)}, 1, plan_b.record, false);
  int observed = 0;
  bool done_a = false, done_b = false;
  for (int i = 0; i < 100 && !(done_a && done_b); ++i) {
    if (!done_b) done_b = run_b.advance(1, [&](int) { ++observed; });
    if (!done_a) done_a = run_a.advance();
  }
  CHECK(done_a && done_b);
  CHECK(observed >= static_cast<int>(plan_b.program(1).steps.size()));
  for (int i = 0; i < 5; ++i) {
    CHECK_EQ(a[i], static_cast<float>(11 * (i + 1)));
    CHECK_EQ(b[i], static_cast<float>(11 * (i + 1)));
  }
}

// A peer that calls something else stops the run at its first signal.
TEST(another_fingerprint_stops_the_run) {
  const auto nodes = transport::Node::local(2);
  const int64_t offset = nodes[0]->reserve(Domain::bytes(2, 2, kGeometry.bank_bytes));
  Domain first(nodes[0], {0, 1}, 0, offset, kGeometry.bank_bytes),
      second(nodes[1], {0, 1}, 1, offset, kGeometry.bank_bytes);
  const Call call{.world = {.size = 2}, .counts = {5}, .in_place = true};
  Call other = call;
  other.counts = {6};
  float a[6] = {}, b[6] = {};
  const Prepared plan_a(schedule::make_plan("two_shot", call, kGeometry, 0), 0);
  const Prepared plan_b(schedule::make_plan("two_shot", other, kGeometry, 1), 1);
  Run run_a, run_b;
  run_b.start(second, plan_b, {reinterpret_cast<char*>(b), reinterpret_cast<char*>(b)}, 1, plan_b.record,
              false);
  CHECK(!run_b.advance());
  CHECK_EQ(run_b.mismatched(), -1);
  run_a.start(first, plan_a, {reinterpret_cast<char*>(a), reinterpret_cast<char*>(a)}, 1, plan_a.record,
              false);
  CHECK(!run_a.advance());
  CHECK_EQ(run_a.mismatched(), 1);
}

namespace {

// all_gather between two domains of this process, each with its own end of a plan that reads `in`.
struct Reading {
  std::vector<std::shared_ptr<transport::Node>> nodes = transport::Node::local(2);
  int64_t offset = nodes[0]->reserve(Domain::bytes(2, 2, kGeometry.bank_bytes));
  Domain a{nodes[0], {0, 1}, 0, offset, kGeometry.bank_bytes};
  Domain b{nodes[1], {0, 1}, 1, offset, kGeometry.bank_bytes};
  Call call{.world = {.collective = Collective::all_gather, .size = 2},
            .dtype = DType::uint8,
            .counts = {4096, 4096},
            .in = Placement::reachable};
  Prepared plan_a{schedule::make_plan("direct", call, kGeometry, 0), 0};
  Prepared plan_b{schedule::make_plan("direct", call, kGeometry, 1), 1};
  std::vector<char> in_a = std::vector<char>(4096, 1), out_a = std::vector<char>(8192),
                    out_b = std::vector<char>(8192);
  Run run_a, run_b;

  explicit Reading(const char* in_b) {
    run_b.start(b, plan_b, {in_b, out_b.data()}, 1, plan_b.record, false);
    CHECK(!run_b.advance());
    run_a.start(a, plan_a, {in_a.data(), out_a.data()}, 1, plan_a.record, false);
  }
  std::string failure(Domain& domain) {
    try {
      domain.board().raise_failure(transport::Board::Caller::under_way);
    } catch (const CommError& error) {
      return error.what();
    }
  }
};

}  // namespace

// The kernel's word is told, and nobody goes on with half of the data.
TEST(what_cannot_be_read_fails_the_group) {
  auto* in =
      static_cast<char*>(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  Reading reading(in);
  munmap(in, 4096);
  CHECK(!reading.run_a.advance());
  CHECK(!reading.run_a.blocked_on().met());
  CHECK_EQ(reading.run_a.blocked_on().peer, 1);
  CHECK(reading.b.board().failed());
  const std::string text = reading.failure(reading.b);
  for (const char* part :
       {"rank 0 could not read 4096 bytes of rank 1's memory", "Bad address", "PYCOMM_SINGLE_COPY=0"}) {
    if (text.find(part) == std::string::npos) check::fail(__FILE__, __LINE__, text);
  }
}

// A rank that leaves a failed call may use its input again: what is read after that is not believed.
TEST(a_read_of_a_failed_call_does_not_complete) {
  std::vector<char> in(4096, 2);
  Reading reading(in.data());
  reading.b.board().fail(FailureKind::timeout, "rank 1 waited in vain");
  std::fill(in.begin(), in.end(), 3);
  CHECK(!reading.run_a.advance());
  CHECK(!reading.run_a.blocked_on().met());
}
