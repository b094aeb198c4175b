// A group of rank threads in one process. A thread that throws fails the test and ends the group.
#pragma once

#include <functional>
#include <thread>
#include <vector>

#include "check.h"
#include "runtime/bootstrap.h"

inline void run_threads(int size, const std::function<void(pycomm::runtime::Communicator&)>& body,
                        double timeout_s = 20, const pycomm::transport::Node::MadeUp& made_up = {}) {
  auto comms = pycomm::runtime::join_threads(size, timeout_s, made_up);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        body(*comms[rank]);
      } catch (const std::exception& error) {
        check::fail("rank", rank, error.what());
        comms[rank]->abandon();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}
