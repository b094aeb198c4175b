// Messages between pairs of ranks: their order, and what runs concurrently with them.
#include <cmath>
#include <functional>
#include <latch>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "group_calls.h"

using namespace group_calls;

TEST(messages_arrive_in_order) {
  run_threads(3, [](Communicator& comm) {
    for (const int64_t count : {1, 1000, 300000}) {
      for (int i = 0; i < 5; ++i) {
        std::vector<int64_t> data(count);
        if (comm.rank() == 0) std::iota(data.begin(), data.end(), i);
        if (comm.rank() < 2) pass(comm, 0, 1, data);
        if (comm.rank() > 0) pass(comm, 1, 2, data);
        CHECK_EQ(data[0], i);
        CHECK_EQ(data[count - 1], i + count - 1);
      }
    }
    std::vector<int64_t> data(10, comm.rank() + 1);
    all_reduce(comm, data);  // the group's own calls are not disturbed
    CHECK_EQ(data[9], total(3));
  });
}

// Threads of each rank, with collectives, blocking messages and queued ones: each of these blocks now and
// then for something that another thread's call must bring first.
TEST(sequences_run_beside_each_other) {
  run_threads(3, [](Communicator& comm) {
    const int n = comm.size(), next = (comm.rank() + 1) % n, before = (comm.rank() + n - 1) % n;
    constexpr int kRounds = 12;
    const auto count_of = [](int i) { return int64_t{i % 3 == 0 ? 70000 : 10 + i}; };
    std::thread collectives([&] {
      for (int i = 0; i < 8 * kRounds; ++i) {
        std::vector<int64_t> data(i % 5 == 0 ? 90000 : 100, comm.rank() + 1);
        all_reduce(comm, data);
        CHECK_EQ(data.back(), total(n));
      }
    });
    std::thread ring([&] {  // a token that goes round: to receive comes first on all ranks but one
      for (int i = 0; i < kRounds; ++i) {
        std::vector<int64_t> token(count_of(i), 0);
        if (comm.rank() != 0) pass(comm, before, comm.rank(), token);
        for (int64_t& t : token) ++t;
        pass(comm, comm.rank(), next, token);
        if (comm.rank() == 0) {
          pass(comm, before, comm.rank(), token);
          CHECK_EQ(token.back(), n);
        }
      }
    });
    Patience patience;
    for (int i = 0; i < kRounds; ++i) {  // backwards, all at once
      std::vector<int64_t> out(count_of(i + 1), comm.rank() * 100 + i), in(out.size());
      const auto submit = [&](int src, int dst, std::vector<int64_t>& data) {
        Request r =
            request(comm, Collective::send_recv, static_cast<int64_t>(data.size()), data.data(), data.data());
        r.call.world.root = src;
        r.call.world.peer = dst;
        return comm.submit(comm.bind(r));
      };
      const auto received = submit(next, comm.rank(), in), sent = submit(comm.rank(), before, out);
      received->wait(INFINITY, patience);
      sent->wait(INFINITY, patience);
      CHECK_EQ(in.back(), next * 100 + i);
    }
    collectives.join();
    ring.join();
  });
}

// A rank that is no part of a pair never hears of it.
// Around a ring, while another thread of each rank reduces: an exchange that began alone joins the queue.
TEST(exchanges_beside_other_threads) {
  run_threads(3, [](Communicator& comm) {
    const int n = comm.size(), me = comm.rank(), next = (me + 1) % n, before = (me + n - 1) % n;
    std::thread other([&] {
      for (int i = 0; i < 50; ++i) {
        std::vector<int64_t> data(10, me + 1);
        all_reduce(comm, data);
        CHECK(data[9] == total(n));
      }
    });
    for (const int64_t count : {1, 1000, 200000}) {
      for (int i = 0; i < 20; ++i) {
        std::vector<int64_t> out(count, 100 * me + i), in(count, -1);
        const auto message = [&](int src, int dst, std::vector<int64_t>& data) {
          Request r = request(comm, Collective::send_recv, count, data.data(), data.data());
          r.call.in_place = false;
          r.call.world.root = src;
          r.call.world.peer = dst;
          return comm.bind(r);
        };
        Patience patience;
        comm.run_both(message(me, next, out), message(before, me, in), patience);
        CHECK(in.front() == 100 * before + i && in.back() == in.front());
      }
    }
    other.join();
  });
}

TEST(pairs_run_beside_the_rest) {
  run_threads(4, [](Communicator& comm) {
    const int peer = comm.rank() ^ 1;
    for (int i = 0; i < 30; ++i) {
      std::vector<int64_t> out(500, comm.rank() * 100 + i), in(500);
      if (comm.rank() < peer) {
        pass(comm, comm.rank(), peer, out, "a");
        pass(comm, peer, comm.rank(), in, "b");
      } else {
        pass(comm, peer, comm.rank(), in, "a");
        pass(comm, comm.rank(), peer, out, "b");
      }
      CHECK_EQ(in[499], peer * 100 + i);
    }
  });
}

TEST(messages_of_different_sizes_do_not_match) {
  run_threads(3, [](Communicator& comm) {
    if (comm.rank() == 2) return;
    std::vector<int64_t> data(comm.rank() == 0 ? 100 : 101);
    try {
      pass(comm, 0, 1, data);
      pass(comm, 0, 1, data);
      check::fail(__FILE__, __LINE__, "different sizes pass");
    } catch (const MismatchError& error) {
      const std::string text = error.what();
      CHECK(text.find("count=100,") != std::string::npos);
      CHECK(text.find("count=101,") != std::string::npos);
      CHECK(text.find("rank 0") != std::string::npos);
      CHECK(text.find("rank 1") != std::string::npos);
    }
  });
}

TEST(messages_of_different_tags_do_not_match) {
  run_threads(2, [](Communicator& comm) {
    std::vector<int64_t> data(10);
    CHECK_THROWS(MismatchError,
                 (pass(comm, 0, 1, data, comm.rank() ? "weights" : "bias"), pass(comm, 0, 1, data)));
  });
}

TEST(pairs_of_a_split_group_are_named_in_it) {
  run_threads(4, [](Communicator& comm) {
    Patience patience;
    const auto half = comm.split(comm.rank() / 2, 0, patience);
    std::vector<int64_t> data(10, comm.rank());
    pass(*half, 1, 0, data);
    CHECK_EQ(data[3], comm.rank() / 2 * 2 + 1);
    if (half->rank() == 1) {
      sleep_ms(100);
      half->close();
      return;
    }
    try {
      pass(*half, 1, 0, data);
      check::fail(__FILE__, __LINE__, "a message from a closed rank");
    } catch (const PeerLostError& error) {
      CHECK(std::string(error.what()).find("rank 1") == 0);
    }
  });
}
