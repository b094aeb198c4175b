// Never a hang, never a wrong answer: a failure between ranks ends in the right error, on every rank, in
// time.
//
// Tests: runtime/call_record.cc, runtime/domain.cc, runtime/waiter.cc.
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "runtime/bootstrap.h"
#include "schedule/lower/layout.h"

using namespace pycomm;
using namespace pycomm::runtime;

namespace {

// What became of a rank: the error's class and words ("ok": none), and when.
struct Report {
  std::string error = "ok", text;
  double at = 0;
};

Report attempt(const std::function<void()>& call) {
  Report report;
  try {
    call();
  } catch (const PeerLostError& error) {
    report = {"PeerLostError", error.what()};
  } catch (const MismatchError& error) {
    report = {"MismatchError", error.what()};
  } catch (const CommTimeoutError& error) {
    report = {"CommTimeoutError", error.what()};
  } catch (const AbortedError& error) {
    report = {"AbortedError", error.what()};
  } catch (const CommError& error) {
    report = {"CommError", error.what()};
  } catch (const std::exception& error) {
    report = {"another error", error.what()};
  }
  report.at = now_s();
  return report;
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

#define CHECK_HAS(text, part)                                                                \
  do {                                                                                       \
    if (!has(text, part))                                                                    \
      check::fail(__FILE__, __LINE__, "\"" + std::string(part) + "\" is not in: " + (text)); \
  } while (false)

// Words and times that processes share.
struct Board {
  std::atomic<int> word[16];
  std::atomic<pid_t> pid[8];
  double time[8];
  struct Slot {
    char error[32], text[1000];
    double at;
  } slots[16];

  void put(int i, const Report& report) {
    std::strncpy(slots[i].error, report.error.c_str(), sizeof slots[i].error - 1);
    std::strncpy(slots[i].text, report.text.c_str(), sizeof slots[i].text - 1);
    slots[i].at = report.at;
  }
  Report get(int i) const { return {slots[i].error, slots[i].text, slots[i].at}; }
};

struct SharedBoard {
  Board* board = static_cast<Board*>(
      mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  ~SharedBoard() { munmap(board, sizeof(Board)); }
  Board* operator->() const { return board; }
};

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }
void await(const std::atomic<int>& word, int value = 1) {
  while (word.load() < value) sleep_ms(1);
}

using Body = std::function<void(Communicator&)>;

// Forks the ranks; each ends with 1 if a check failed. The statuses are for the caller to judge.
std::vector<int> run_processes(int size, const Body& body, double timeout_s = 20,
                               const std::function<void(int rank)>& before = {}) {
  static int serial = 0;
  const std::string address = "failures-" + std::to_string(getpid()) + "-" + std::to_string(serial++);
  std::vector<pid_t> pids;
  for (int rank = 0; rank < size; ++rank) {
    const pid_t pid = fork();
    if (pid == 0) {
      alarm(30);
      check::failures = 0;
      if (before) before(rank);
      try {
        const auto comm =
            runtime::join({.rank = rank, .size = size, .address = address, .timeout_s = timeout_s});
        body(*comm);
      } catch (const std::exception& error) {
        check::fail("rank", rank, error.what());
      }
      _exit(check::failures != 0);
    }
    pids.push_back(pid);
  }
  std::vector<int> statuses;
  for (const pid_t pid : pids) {
    int status = -1;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) continue;
    statuses.push_back(status);
  }
  return statuses;
}

std::vector<Report> run_threads(int size, const std::function<Report(Communicator&)>& body,
                                double timeout_s = 20) {
  auto comms = runtime::join_threads(size, timeout_s);
  std::vector<Report> reports(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] { reports[rank] = body(*comms[rank]); });
  }
  for (std::thread& thread : threads) thread.join();
  return reports;
}

// A call over buffers that live as long as it.
struct Call {
  Request request;
  std::vector<char> in, out;
  Call(Communicator& comm, Collective kind, int64_t count, DType dtype = DType::float32, Op op = Op::sum,
       int root = 0, const std::string& algorithm = "", const std::string& tag = "") {
    const int n = comm.size();
    schedule::Call& call = request.call;
    call.world = {.collective = kind, .size = n, .root = root};
    call.dtype = dtype;
    call.op = op;
    call.counts = schedule::uniform_counts(call.world, count);
    in.resize(static_cast<size_t>(count * n) * size_of(dtype) + 1);
    out.resize(in.size());
    request.in = in.data();
    request.out = out.data();
    request.algorithm = algorithm;
    request.tag = tag;
  }
};

void all_reduce(Communicator& comm, int64_t count = 100, const std::string& algorithm = "",
                double timeout_s = -1) {
  Patience patience;
  Call call(comm, Collective::all_reduce, count, DType::float32, Op::sum, 0, algorithm);
  call.request.timeout_s = timeout_s;
  comm.execute(call.request, patience);
}

// Rank 1 and the others make different calls. Whoever is not caught in this call is caught in the next, since
// a rank that only gives may have gone on, or in the one before, if it has not left that yet.
void check_mismatch(int size, const std::function<Call(Communicator&, bool odd)>& make,
                    const std::string& value, const std::string& odd_value) {
  const auto reports = run_threads(size, [&](Communicator& comm) {
    Patience patience;
    Call call = make(comm, comm.rank() == 1);
    Report report = attempt([&] { all_reduce(comm); });
    if (report.error == "ok") report = attempt([&] { comm.execute(call.request, patience); });
    if (report.error == "ok") report = attempt([&] { all_reduce(comm); });
    CHECK_EQ(attempt([&] { all_reduce(comm); }).error, "AbortedError");
    return report;
  });
  for (const Report& report : reports) {
    CHECK_EQ(report.error, "MismatchError");
    CHECK_EQ(report.text, reports[0].text);
    CHECK_HAS(report.text, "rank 1 called");
    CHECK_HAS(report.text, value);
    CHECK_HAS(report.text, odd_value);
  }
}

}  // namespace

TEST(mismatch_of_collective) {
  for (const int size : {2, 3}) {
    check_mismatch(
        size,
        [](Communicator& comm, bool odd) {
          return Call(comm, odd ? Collective::all_gather : Collective::all_reduce, 50);
        },
        "all_reduce(count=50", "all_gather(count=50");
    check_mismatch(
        size,
        [](Communicator& comm, bool odd) {
          return Call(comm, odd ? Collective::barrier : Collective::all_reduce, 50);
        },
        "all_reduce(count=50", "called barrier");
    check_mismatch(
        size,
        [](Communicator& comm, bool odd) {
          return Call(comm, odd ? Collective::all_to_all : Collective::broadcast, 50);
        },
        "broadcast(count=50", "all_to_all(count=");
  }
}

TEST(mismatch_of_dtype) {
  for (const int size : {2, 3, 4}) {
    check_mismatch(
        size,
        [](Communicator& comm, bool odd) {
          return Call(comm, Collective::all_reduce, 50, odd ? DType::float64 : DType::float32);
        },
        "dtype=float32", "dtype=float64");
  }
}

TEST(mismatch_of_count) {
  for (const std::string algorithm :
       {"one_shot", "two_shot", "ring", "tree", "recursive_doubling", "halving_doubling"}) {
    for (const int size : {2, 3}) {
      check_mismatch(
          size,
          [&](Communicator& comm, bool odd) {
            return Call(comm, Collective::all_reduce, odd ? 400000 : 50, DType::float32, Op::sum, 0,
                        algorithm);
          },
          "count=50,", "count=400000,");
    }
  }
}

TEST(mismatch_of_op) {
  check_mismatch(
      2,
      [](Communicator& comm, bool odd) {
        return Call(comm, Collective::all_reduce, 50, DType::float32, odd ? Op::max : Op::avg);
      },
      "op=avg", "op=max");
}

TEST(mismatch_of_root) {
  for (const Collective kind :
       {Collective::broadcast, Collective::reduce, Collective::gather, Collective::scatter}) {
    for (const int size : {2, 3}) {
      check_mismatch(
          size,
          [&](Communicator& comm, bool odd) {
            return Call(comm, kind, 50, DType::float32, Op::sum, odd ? 1 : 0);
          },
          "root=0", "root=1");
    }
  }
}

TEST(mismatch_of_algorithm) {
  check_mismatch(
      3,
      [](Communicator& comm, bool odd) {
        return Call(comm, Collective::all_reduce, 5000, DType::float32, Op::sum, 0,
                    odd ? "ring" : "two_shot");
      },
      "algorithm=two_shot", "algorithm=ring");
}

TEST(mismatch_of_tag) {
  check_mismatch(
      2,
      [](Communicator& comm, bool odd) {
        return Call(comm, Collective::all_reduce, 50, DType::float32, Op::sum, 0, "",
                    odd ? "layer1" : "layer2");
      },
      "\"layer2\"", "\"layer1\"");
}

TEST(mismatch_of_factor) {
  const auto reports = run_threads(2, [](Communicator& comm) {
    Patience patience;
    Call call(comm, Collective::all_reduce, 50);
    call.request.call.prescale = comm.rank() ? 0.5 : 0.25;
    return attempt([&] { comm.execute(call.request, patience); });
  });
  for (const Report& report : reports) {
    CHECK_EQ(report.error, "MismatchError");
    CHECK_HAS(report.text, "0.25");
    CHECK_HAS(report.text, "0.5");
  }
}

TEST(bad_arguments_cost_nothing) {
  run_threads(2, [](Communicator& comm) {
    Patience patience;
    Call odd(comm, Collective::all_reduce, 50, DType::float32, Op::bxor);
    CHECK_THROWS(TypeError, comm.execute(odd.request, patience));
    Call unknown(comm, Collective::all_reduce, 50, DType::float32, Op::sum, 0, "quadratic");
    CHECK_THROWS(ValueError, comm.execute(unknown.request, patience));
    Call unordered(comm, Collective::all_reduce, 50, DType::float32, Op::sum, 0, "ring");
    unordered.request.call.deterministic = true;
    CHECK_THROWS(ValueError, comm.execute(unordered.request, patience));
    all_reduce(comm);
    return Report{};
  });
}

// ---- deaths ----

TEST(killed_rank_is_named) {
  SharedBoard board;
  const auto statuses = run_processes(3, [&](Communicator& comm) {
    all_reduce(comm);
    if (comm.rank() == 1) {
      sleep_ms(50);
      board->time[0] = now_s();
      raise(SIGKILL);
    }
    const Report report = attempt([&] { all_reduce(comm); });
    CHECK_EQ(report.error, "PeerLostError");
    CHECK_HAS(report.text, "rank 1 (pid ");
    CHECK(report.at - board->time[0] < 1);
    board->put(comm.rank(), report);
    CHECK_EQ(attempt([&] { all_reduce(comm); }).error, "AbortedError");
  });
  CHECK_EQ(statuses[0], 0);
  CHECK_EQ(statuses[2], 0);
  CHECK_EQ(board->get(0).text, board->get(2).text);
}

TEST(clean_exit_after_the_last_call_is_no_loss) {
  for (int i = 0; i < 20; ++i) {
    const auto statuses = run_processes(3, [](Communicator& comm) {
      all_reduce(comm, 70000);
      Patience patience;
      Call call(comm, Collective::broadcast, 300000);
      comm.execute(call.request, patience);
      _exit(check::failures != 0);  // at once, while others may still read
    });
    for (const int status : statuses) CHECK_EQ(status, 0);
  }
}

TEST(exit_before_the_others_are_done_is_a_loss) {
  const auto statuses = run_processes(2, [](Communicator& comm) {
    all_reduce(comm);
    if (comm.rank() == 1) _exit(0);
    const Report report = attempt([&] { all_reduce(comm); });
    CHECK_EQ(report.error, "PeerLostError");
    CHECK_HAS(report.text, "rank 1 ");
  });
  for (const int status : statuses) CHECK_EQ(status, 0);
}

TEST(closed_peer_is_named) {
  const auto reports = run_threads(3, [](Communicator& comm) {
    all_reduce(comm);
    if (comm.rank() == 2) {
      sleep_ms(200);
      comm.close();
      return attempt([&] { all_reduce(comm); });
    }
    return attempt([&] { all_reduce(comm); });
  });
  for (const int rank : {0, 1}) {
    CHECK_EQ(reports[rank].error, "PeerLostError");
    CHECK_HAS(reports[rank].text, "rank 2 closed its communicator");
  }
  CHECK_EQ(reports[2].error, "AbortedError");  // use after close
}

TEST(sending_to_a_closed_peer_fails) {
  const auto reports = run_threads(
      3,
      [](Communicator& comm) {
        all_reduce(comm);
        if (comm.rank() == 0) comm.close();
        if (comm.rank() != 1) return Report{};
        Call call(comm, Collective::send_recv, 1 << 20);
        call.request.call.world.root = 1;
        call.request.call.world.peer = 0;
        Patience patience;
        return attempt([&] { comm.execute(call.request, patience); });
      },
      5);
  CHECK_EQ(reports[1].error, "PeerLostError");
  CHECK_HAS(reports[1].text, "rank 0 closed");
}

TEST(abandoned_rank_thread_is_named) {
  const auto reports = run_threads(2, [](Communicator& comm) {
    all_reduce(comm);
    if (comm.rank() == 1) {
      sleep_ms(200);
      comm.abandon();
      return Report{};
    }
    return attempt([&] { all_reduce(comm); });
  });
  CHECK_EQ(reports[0].error, "PeerLostError");
  CHECK_HAS(reports[0].text, "rank 1 ");
}

// ---- lateness ----

TEST(late_rank_is_waited_for) {
  const auto reports = run_threads(3, [](Communicator& comm) {
    if (comm.rank() == 1) sleep_ms(400);
    return attempt([&] { all_reduce(comm, 300000); });
  });
  for (const Report& report : reports) CHECK_EQ(report.error, "ok");
}

// Where one rank may not read the others' memory, as under Yama or in a sandbox, none does.
TEST(one_rank_that_may_not_read_others_decides_for_all) {
  const auto forbid = [](int rank) {
    if (rank != 1) return;
    sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_vm_readv, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    sock_fprog program{static_cast<unsigned short>(std::size(filter)), filter};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    CHECK_EQ(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), 0);
  };
  for (const bool forbidden : {false, true}) {
    const auto statuses = run_processes(
        3,
        [&](Communicator& comm) {
          Patience patience;
          Call call(comm, Collective::all_gather, 1 << 20);
          Bound bound = comm.bind(call.request);
          CHECK_EQ(bound.preludes.size(), 1U);
          // Then it is about shared arrays alone, of which there are none.
          CHECK_EQ(bound.preludes[0].wanted != nullptr, forbidden);
          comm.run(bound, patience);
        },
        20, forbidden ? forbid : std::function<void(int)>{});
    for (const int status : statuses) CHECK_EQ(status, 0);
  }
}

TEST(rank_that_does_not_come_is_named_at_the_deadline) {
  const auto reports = run_threads(3, [](Communicator& comm) {
    all_reduce(comm);
    if (comm.rank() == 1) {
      sleep_ms(1000);
      return attempt([&] { all_reduce(comm); });
    }
    const double started = now_s();
    Report report = attempt([&] { all_reduce(comm, 100, "ring", 0.3); });
    CHECK(report.at - started > 0.29);
    CHECK(report.at - started < 0.9);
    return report;
  });
  for (const int rank : {0, 2}) {
    CHECK_EQ(reports[rank].error, "CommTimeoutError");
    CHECK_HAS(reports[rank].text, "for rank 1, which has not called it");
  }
  CHECK(reports[1].error != "ok");
}

// After broadcasts, which not everybody hears everybody in, ranks wait to enter: the late one is still the
// one named.
TEST(rank_late_by_two_calls_is_named) {
  const auto reports = run_threads(3, [](Communicator& comm) {
    all_reduce(comm);
    if (comm.rank() == 2) {
      sleep_ms(1200);
      return attempt([&] { all_reduce(comm); });
    }
    return attempt([&] {
      Patience patience;
      for (int i = 0; i < 3; ++i) {
        Call call(comm, Collective::broadcast, 10);
        call.request.timeout_s = 0.3;
        comm.execute(call.request, patience);
      }
    });
  });
  for (const int rank : {0, 1}) {
    CHECK_EQ(reports[rank].error, "CommTimeoutError");
    CHECK_HAS(reports[rank].text, "for rank 2, which has not called");
  }
}

// The others wait on each other in a ring; the error names the one that does not move.
TEST(stopped_rank_is_named) {
  for (const int size : {2, 3, 4}) {
    const int victim = size - 2;
    SharedBoard board;
    const auto watcher = [&] {
      await(board->word[0]);
      sleep_ms(30);
      kill(board->pid[0].load(), SIGSTOP);
      sleep_ms(1500);
      kill(board->pid[0].load(), SIGCONT);
    };
    std::thread thread(watcher);
    const auto statuses = run_processes(size, [&](Communicator& comm) {
      all_reduce(comm, 100, "ring");
      if (comm.rank() == victim) board->pid[0] = getpid(), board->word[0] = 1;
      const Report report = attempt([&] {
        for (int i = 0; i < 100000; ++i) all_reduce(comm, 1 << 20, "ring", 0.4);
      });
      board->put(comm.rank(), report);
    });
    thread.join();
    for (int rank = 0; rank < size; ++rank) {
      const Report report = board->get(rank);
      CHECK_EQ(statuses[rank], 0);
      CHECK_EQ(report.error, "CommTimeoutError");
      CHECK_HAS(report.text, " for rank " + std::to_string(victim) + ", which");
      CHECK_EQ(report.text, board->get(0).text);
    }
  }
}

// ---- fork ----

TEST(child_of_a_rank_cannot_use_its_group) {
  SharedBoard board;
  const auto statuses = run_processes(2, [&](Communicator& comm) {
    all_reduce(comm);
    const pid_t pid = fork();
    if (pid == 0) {
      board->put(comm.rank(), attempt([&] { all_reduce(comm); }));
      comm.close();  // the parent's group lives on
      _exit(0);
    }
    int status = -1;
    waitpid(pid, &status, 0);
    CHECK_EQ(status, 0);
    for (int i = 0; i < 10; ++i) all_reduce(comm);
  });
  for (const int rank : {0, 1}) {
    CHECK_EQ(statuses[rank], 0);
    CHECK_EQ(board->get(rank).error, "CommError");
    CHECK_HAS(board->get(rank).text, "fork");
  }
}

// The child drops the communicator of a parent whose progress thread sleeps: threads do not survive a fork.
TEST(child_of_a_rank_can_drop_its_group) {
  const auto statuses = run_processes(1, [&](Communicator&) {
    auto comms = runtime::join_threads(1, 5);
    Patience patience;
    Call call(*comms[0], Collective::all_reduce, 10);
    comms[0]->submit(comms[0]->bind(call.request))->wait(INFINITY, patience);
    sleep_ms(20);
    const pid_t pid = fork();
    if (pid == 0) {
      alarm(3);
      comms.clear();
      _exit(0);
    }
    int status = -1;
    waitpid(pid, &status, 0);
    CHECK_EQ(status, 0);
    comms[0]->execute(call.request, patience);
  });
  CHECK_EQ(statuses[0], 0);
}

// Data-loader workers inherit every descriptor of a rank and outlive it.
TEST(forked_worker_does_not_mask_a_death) {
  SharedBoard board;
  const auto statuses = run_processes(2, [&](Communicator& comm) {
    all_reduce(comm);
    if (comm.rank() == 1) {
      const pid_t worker = fork();
      if (worker == 0) {
        sleep_ms(4000);
        _exit(0);
      }
      board->pid[1] = worker;
      board->time[0] = now_s();
      raise(SIGKILL);
    }
    const Report report = attempt([&] { all_reduce(comm); });
    CHECK_EQ(report.error, "PeerLostError");
    CHECK_HAS(report.text, "rank 1 ");
    CHECK(report.at - board->time[0] < 1);
  });
  CHECK_EQ(statuses[0], 0);
  CHECK(WIFSIGNALED(statuses[1]));
  kill(board->pid[1].load(), SIGKILL);
}

// ---- interrupts and asynchronous calls ----

TEST(interrupt_ends_the_wait_on_all_ranks) {
  struct Interrupt : std::runtime_error {
    using std::runtime_error::runtime_error;
  };
  struct Impatient : Patience {
    int ticks = 0;
    void on_tick() override {
      if (++ticks == 3) throw Interrupt("Ctrl-C");
    }
  };
  const auto reports = run_threads(3, [](Communicator& comm) {
    all_reduce(comm);
    if (comm.rank() == 2) sleep_ms(500);
    Impatient impatient;
    Patience patience;
    Call call(comm, Collective::all_reduce, 10);
    if (comm.rank() == 0) {
      CHECK_THROWS(Interrupt, comm.execute(call.request, impatient));
      return Report{};
    }
    return attempt([&] { comm.execute(call.request, patience); });
  });
  for (const int rank : {1, 2}) {
    CHECK_EQ(reports[rank].error, "AbortedError");
    CHECK_HAS(reports[rank].text, "rank 0 was interrupted");
  }
}

TEST(asynchronous_calls_carry_the_error) {
  const auto reports = run_threads(2, [](Communicator& comm) {
    all_reduce(comm);
    if (comm.rank() == 1) {
      comm.close();
      return Report{};
    }
    Call first(comm, Collective::all_reduce, 10), second(comm, Collective::all_reduce, 10);
    Patience patience;
    auto a = comm.submit(comm.bind(first.request));
    Report refused = attempt([&] {
      auto b = comm.submit(comm.bind(second.request));
      b->wait(INFINITY, patience);
    });
    CHECK(refused.error != "ok");
    Report report = attempt([&] { a->wait(INFINITY, patience); });
    CHECK(a->is_completed());
    CHECK(a->exception() != nullptr);
    return report;
  });
  CHECK_EQ(reports[0].error, "PeerLostError");
}
