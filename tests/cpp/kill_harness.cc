// The kill suite: a rank is killed at every step of every all_reduce plan, and of an all_gather whose ranks
// read each other's inputs through the kernel. The others must notice it.
//
//   kill_harness          every 5th of the runs, in a fixed choice
//   kill_harness --all    all of them
//
// A run forks the ranks, lets them make one call together, and kills one of them with SIGKILL in the second
// call: before it enters, at a step (in the first, a middle and the last trip that reaches it), after its
// last step, or when it has finished. Each survivor must raise PeerLostError naming that rank within a
// second; or, if the dead rank had done its part, complete the call with the right result and raise the error
// in the third. If the rank dies after it has finished, the others must complete. At the end no process,
// socket, file or shared memory may be left.
#include <dirent.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "common/error.h"
#include "meeting.h"
#include "runtime/heap.h"
#include "runtime/sequence.h"
#include "schedule/lower/lower.h"

using namespace pycomm;
using namespace pycomm::runtime;
using schedule::Placement;

namespace {

constexpr int kMaxRanks = 4, kMaxSteps = 8192, kStride = 5;
constexpr int64_t kBank = 64 << 10;  // small: several trips are cheap
constexpr double kDeadline = 1.0;    // seconds from a death to the last survivor's error

// When the victim dies: at its k-th executed step, or one of these.
constexpr int kNever = -3, kBeforeEntry = -2, kAfterLastStep = -1, kFinished = INT32_MAX;

enum class Outcome : int { none, lost_in_call, completed, wrong };

// What the ranks of a run tell the parent; shared, anonymous.
struct Board {
  std::atomic<int64_t> domain, symmetric;  // offsets in the node's file
  std::atomic<int> through;                // survivors that have left the second call
  double killed_at;
  struct Report {
    std::atomic<Outcome> outcome;
    double learned_at;
    char text[400];
    int num_steps;
    int steps[kMaxSteps];  // program indices of the steps executed in the second call
  } reports[kMaxRanks];
};

struct Case {
  std::string algorithm;
  int size;
  Placement placement;  // reachable: an all_gather
  int64_t count;
  std::vector<std::unique_ptr<Prepared>> plans, meetings;  // by rank

  bool gathers() const { return placement == Placement::reachable; }
  int64_t elements() const { return gathers() ? size * count : count; }

  std::string title() const {
    return algorithm + ", " + std::to_string(size) + " ranks, " + std::to_string(count) + " elements, " +
           (placement == Placement::symmetric ? "symmetric"
            : placement == Placement::told    ? "told"
            : gathers()                       ? "reachable"
                                              : "plain");
  }
};

struct Death {
  int victim;
  int at;
  std::string title(const Board& dry) const {
    const std::string who = "rank " + std::to_string(victim) + " killed ";
    if (at == kBeforeEntry) return who + "before the call";
    if (at == kAfterLastStep) return who + "after its last step";
    if (at == kFinished) return who + "when it had finished";
    return who + "at its step " + std::to_string(dry.reports[victim].steps[at]) + " (execution " +
           std::to_string(at) + ")";
  }
};

float input(int rank, int64_t i, int call) { return static_cast<float>((rank + 1) * (i % 97 + 1) + call); }

[[noreturn]] void die(Board& board) {
  board.killed_at = now_s();
  raise(SIGKILL);
  std::abort();
}

// Ends the process at its target step; counts executed steps. A wait that blocked is announced again.
struct Killer {
  Board* board;
  Board::Report* report;
  bool* again;
  int target;
  void operator()(int step) const {
    if (*again) {
      *again = false;
      return;
    }
    if (report->num_steps == target) die(*board);
    if (report->num_steps < kMaxSteps) report->steps[report->num_steps] = step;
    ++report->num_steps;
  }
};

class Rank {
 public:
  Rank(const Case& c, int rank, const std::string& address, Board& board)
      : case_(c), rank_(rank), board_(board), report_(board.reports[rank]) {
    node_ = transport::Node::join({.rank = rank, .size = c.size, .address = address, .timeout_s = 10});
    const int64_t bytes = c.count * static_cast<int64_t>(sizeof(float));
    if (rank == 0) {
      board.symmetric.store(node_->reserve(Heap::extent_bytes(bytes, c.size)));
      board.domain.store(node_->reserve(Domain::bytes(c.size, c.size, kBank)));
    }
    while (board.domain.load() == 0) usleep(100);
    std::vector<int> ranks(c.size);
    std::iota(ranks.begin(), ranks.end(), 0);
    domain_ = std::make_unique<Domain>(node_, ranks, rank, board.domain.load(), kBank);
    calls_.emplace(*domain_);
    transport::register_for_fences();
    policy_ = wait_policy(c.size, static_cast<int>(std::thread::hardware_concurrency()));
    if (schedule::in_reach(c.placement)) {
      allocation_ = std::make_shared<Heap>(node_)->open(board.symmetric.load(), bytes, ranks, rank);
      data_ = reinterpret_cast<float*>(allocation_->data());
      const int64_t distance = Heap::extent_bytes(bytes, 2) - Heap::extent_bytes(bytes, 1);
      if (c.placement == Placement::told) {
        for (int r = 0; r < 2 * c.size; ++r) {
          told_.push_back(allocation_->data() + (r % c.size - rank) * distance);
        }
        bases_.told = told_.data();
      } else {
        bases_.in_distance = bases_.out_distance = distance;
      }
    } else {
      plain_.resize(c.elements());
      data_ = plain_.data();
    }
    in_ = c.gathers() ? data_ + rank * c.count : data_;
    bases_.in = reinterpret_cast<char*>(in_);
    bases_.out = reinterpret_cast<char*>(data_);
  }

  void play(const Death& death) {
    const int at = death.victim == rank_ ? death.at : kNever;
    try {  // a rank may be late and learn in the first call of a death in the second
      call(1, kNever);
      if (!right(1)) return tell(Outcome::wrong, "the first call's result is wrong");
      if (at == kBeforeEntry) die(board_);
      report_.num_steps = 0;
      call(2, at);
    } catch (const PeerLostError& error) {
      ++board_.through;
      return tell(Outcome::lost_in_call, error.what());
    }
    if (at == kFinished) die(board_);
    ++board_.through;
    if (!right(2)) return tell(Outcome::wrong, "the second call's result is wrong");
    if (death.victim < 0) return tell(Outcome::completed, "");
    while (board_.through.load() < case_.size - 1)
      usleep(100);  // the third call's failure may not reach into the second
    try {
      call(3, kNever);
    } catch (const PeerLostError& error) {
      return tell(Outcome::completed, error.what());
    }
    tell(Outcome::wrong, "the call after the death succeeded");
  }

  void tell(Outcome outcome, const std::string& text) {
    report_.learned_at = now_s();
    std::strncpy(report_.text, text.c_str(), sizeof report_.text - 1);
    report_.outcome.store(outcome);
  }

 private:
  void call(int number, int kill_at) {
    for (int64_t i = 0; i < case_.count; ++i) in_[i] = input(rank_, i, number);
    bool again = false;
    Board::Report uncounted = {};
    const Killer killer{&board_, number == 2 ? &report_ : &uncounted, &again, kill_at};
    const Prepared& prepared = *case_.plans[rank_];
    if (bases_.told) {
      Patience patience;
      calls_->complete(*case_.meetings[rank_], {}, policy_, 30, patience);
    }
    calls_->start(prepared, bases_, prepared.record);
    Patience patience;
    Pending pending = calls_->pending(30);
    Pending* const one = &pending;
    while (!calls_->run().advance(1, killer)) {
      again = domain_->board().self().entered.load() == calls_->calls();  // else it waited to enter
      wait({&one, 1}, policy_, patience);
    }
    if (kill_at == kAfterLastStep) die(board_);
    calls_->finish();
  }

  bool right(int number) const {
    for (int64_t i = 0; i < case_.elements(); ++i) {
      if (case_.gathers()) {
        if (data_[i] != input(static_cast<int>(i / case_.count), i % case_.count, number)) return false;
        continue;
      }
      float sum = 0;
      for (int r = 0; r < case_.size; ++r) sum += input(r, i, number);
      if (data_[i] != sum) return false;
    }
    return true;
  }

  const Case& case_;
  int rank_;
  Board& board_;
  Board::Report& report_;
  std::shared_ptr<transport::Node> node_;
  std::unique_ptr<Domain> domain_;
  std::shared_ptr<Allocation> allocation_;
  std::vector<float> plain_;
  float *data_ = nullptr, *in_ = nullptr;
  std::vector<char*> told_;
  Bases bases_;
  WaitPolicy policy_;
  std::optional<Sequence> calls_;
};

struct Totals {
  int runs = 0, of = 0, survivors = 0, lost_in_call = 0, completed = 0, failures = 0;
  double slowest = 0;
};

void fail(Totals& totals, const std::string& what) {
  if (++totals.failures <= 20) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// Runs the ranks once. Statuses by rank.
std::vector<int> run_once(const Case& c, const Death& death, Board& board) {
  static int serial = 0;
  const std::string address = "kill-" + std::to_string(getpid()) + "-" + std::to_string(serial++);
  board.domain.store(0);
  board.through.store(0);
  board.killed_at = 0;
  for (auto& report : board.reports)
    report.outcome.store(Outcome::none), report.text[0] = '\0', report.num_steps = 0;
  std::vector<pid_t> pids;
  for (int rank = 0; rank < c.size; ++rank) {
    const pid_t pid = fork();
    if (pid == 0) {
      alarm(20);  // a hang becomes a death by SIGALRM
      int code = 0;
      try {
        Rank(c, rank, address, board).play(death);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d: %s\n", rank, error.what());
        code = 3;
      }
      _exit(code);
    }
    pids.push_back(pid);
  }
  std::vector<int> statuses(c.size, -1);
  for (int rank = 0; rank < c.size; ++rank) {
    while (waitpid(pids[rank], &statuses[rank], 0) < 0 && errno == EINTR) continue;
  }
  return statuses;
}

void judge(const Case& c, const Death& death, const Board& board, const Board& dry,
           const std::vector<int>& statuses, Totals& totals) {
  const std::string title = c.title() + ", " + death.title(dry) + ": ";
  const std::string name = "rank " + std::to_string(death.victim) + " ";
  for (int rank = 0; rank < c.size; ++rank) {
    const std::string who = title + "rank " + std::to_string(rank) + " ";
    if (rank == death.victim) {
      if (!WIFSIGNALED(statuses[rank]) || WTERMSIG(statuses[rank]) != SIGKILL)
        fail(totals, who + "was not killed");
      continue;
    }
    ++totals.survivors;
    const Board::Report& report = board.reports[rank];
    if (statuses[rank] != 0) {
      fail(totals, who + "ended with status " + std::to_string(statuses[rank]));
      continue;
    }
    const Outcome outcome = report.outcome.load();
    (outcome == Outcome::lost_in_call ? totals.lost_in_call : totals.completed) += 1;
    if (outcome == Outcome::none || outcome == Outcome::wrong) {
      fail(totals, who + report.text);
    } else if (outcome == Outcome::lost_in_call && death.at == kFinished) {
      fail(totals, who + "lost a call that the dead rank had finished: " + report.text);
    } else if (outcome == Outcome::completed && death.at == kBeforeEntry) {
      fail(totals, who + "completed a call that the dead rank never made");
    } else if (std::strncmp(report.text, name.c_str(), name.size()) != 0) {
      fail(totals, who + "does not name the dead rank: " + report.text);
    } else if (report.learned_at - board.killed_at > kDeadline) {
      fail(totals, who + "learned of it after " + std::to_string(report.learned_at - board.killed_at) + " s");
    }
    totals.slowest = std::max(totals.slowest, report.learned_at - board.killed_at);
  }
}

// Every step index of every rank, at its first, a middle and its last execution, and the moments around the
// call.
std::vector<Death> deaths(const Case& c, const Board& dry) {
  std::vector<Death> all;
  for (int rank = 0; rank < c.size; ++rank) {
    const Board::Report& report = dry.reports[rank];
    std::map<int, std::vector<int>> executions;
    for (int k = 0; k < report.num_steps; ++k) executions[report.steps[k]].push_back(k);
    std::set<int> at = {kBeforeEntry, kAfterLastStep, kFinished};
    for (const auto& [step, when] : executions) at.insert({when.front(), when[when.size() / 2], when.back()});
    for (const int moment : at) all.push_back({rank, moment});
  }
  return all;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const schedule::Geometry geometry = {.bank_bytes = kBank,
                                       .trip_bytes = 8 << 10,
                                       .stream_bytes = INT64_MAX,
                                       .max_cells = kCellsPerPair,
                                       .payload_bytes = schedule::kPayloadBytes};
  for (const std::string& algorithm : schedule::algorithm_names(Collective::all_reduce)) {
    for (int size = 2; size <= kMaxRanks; ++size) {
      for (const Placement placement : {Placement::plain, Placement::symmetric, Placement::told}) {
        for (const int64_t count : {1001, 12345}) {
          Case c{algorithm, size, placement, count, {}, {}};
          for (int rank = 0; rank < size; ++rank) {
            const schedule::Call call{.world = {.size = size},
                                      .counts = {count},
                                      .in = placement,
                                      .out = placement,
                                      .in_place = true};
            c.plans.push_back(
                std::make_unique<Prepared>(schedule::make_plan(algorithm, call, geometry, rank), rank));
            c.meetings.push_back(std::make_unique<Prepared>(meeting(size, rank, geometry)));
          }
          all.push_back(std::move(c));
        }
      }
    }
  }
  for (int size = 2; size <= kMaxRanks; ++size) {
    for (const int64_t count : {1001, 1 << 19}) {  // the larger takes its readers some time
      Case c{"direct", size, Placement::reachable, count, {}, {}};
      for (int rank = 0; rank < size; ++rank) {
        const schedule::Call call{.world = {.collective = Collective::all_gather, .size = size},
                                  .counts = std::vector<int64_t>(size, count),
                                  .in = Placement::reachable,
                                  .in_place = true};
        c.plans.push_back(
            std::make_unique<Prepared>(schedule::make_plan(c.algorithm, call, geometry, rank), rank));
      }
      all.push_back(std::move(c));
    }
  }
  return all;
}

// ---- what may not be left ----

std::set<std::string> entries(const char* directory, const std::string& with, bool links) {
  std::set<std::string> found;
  DIR* dir = opendir(directory);
  if (!dir) return found;
  while (const dirent* entry = readdir(dir)) {
    std::string text = entry->d_name;
    if (links) {
      char target[256] = {};
      if (readlinkat(dirfd(dir), entry->d_name, target, sizeof target - 1) < 0) continue;
      text += " -> " + std::string(target);
    }
    if (text.find(with) != std::string::npos) found.insert(text);
  }
  closedir(dir);
  return found;
}

std::set<std::string> sockets() {
  std::set<std::string> found;
  std::ifstream file("/proc/net/unix");
  for (std::string line; std::getline(file, line);) {
    if (line.find("@pycomm-") != std::string::npos) found.insert(line.substr(line.find_last_of(' ') + 1));
  }
  return found;
}

struct Surroundings {
  std::set<std::string> sockets = ::sockets(), shared = entries("/dev/shm", "pycomm", false),
                        memory = entries("/proc/self/fd", "memfd:", true);
};

void look_around(const Surroundings& before, Totals& totals) {
  if (waitpid(-1, nullptr, WNOHANG) != -1 || errno != ECHILD) fail(totals, "a process is left");
  std::vector<std::string> left;
  for (int tries = 0; tries < 100; ++tries) {  // sockets of other programs that meet meanwhile go away
    left.clear();
    const std::set<std::string> now = sockets();
    std::set_difference(now.begin(), now.end(), before.sockets.begin(), before.sockets.end(),
                        std::back_inserter(left));
    if (left.empty()) break;
    usleep(100000);
  }
  for (const std::string& name : left) fail(totals, "a socket is left: " + name);
  if (entries("/dev/shm", "pycomm", false) != before.shared)
    fail(totals, "shared memory is left in /dev/shm");
  if (entries("/proc/self/fd", "memfd:", true) != before.memory) fail(totals, "a memory file is left open");
}

}  // namespace

int main(int argc, char** argv) {
  const bool everything = argc == 2 && std::string(argv[1]) == "--all";
  if (argc > 1 && !everything) return std::fprintf(stderr, "usage: %s [--all]\n", argv[0]), 2;
  const int stride = everything ? 1 : kStride;
  prctl(PR_SET_CHILD_SUBREAPER, 1);  // whoever a rank might leave behind comes here
  const Surroundings before;
  void* memory = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return std::perror("mmap"), 1;
  Board& board = *static_cast<Board*>(memory);
  const auto dry = std::make_unique<Board>();

  Totals totals;
  const double started = now_s();
  const std::vector<Case> all = cases();
  for (const Case& c : all) {
    const std::vector<int> statuses = run_once(c, {-1, kNever}, board);
    for (int rank = 0; rank < c.size; ++rank) {
      Board::Report& report = dry->reports[rank];
      report.num_steps = board.reports[rank].num_steps;
      std::memcpy(report.steps, board.reports[rank].steps, sizeof report.steps);
      if (statuses[rank] != 0 || board.reports[rank].outcome.load() != Outcome::completed ||
          report.num_steps == 0 || report.num_steps > kMaxSteps) {
        fail(totals, c.title() + ": rank " + std::to_string(rank) + " fails without a death");
      }
    }
    for (const Death& death : deaths(c, *dry)) {
      if (totals.of++ % stride != 0) continue;
      ++totals.runs;
      judge(c, death, board, *dry, run_once(c, death, board), totals);
    }
  }
  munmap(memory, sizeof(Board));
  look_around(before, totals);
  std::printf("kill suite: %zu plans, %d of %d deaths, %.0f s\n", all.size(), totals.runs, totals.of,
              now_s() - started);
  std::printf(
      "survivors: %d, of which %d raised PeerLostError in the call and %d completed it and raised in the "
      "next\n",
      totals.survivors, totals.lost_in_call, totals.completed);
  std::printf("slowest detection: %.1f ms\n", totals.slowest * 1e3);
  std::printf("failures: %d\n", totals.failures);
  return totals.failures != 0 || totals.runs == 0;
}
