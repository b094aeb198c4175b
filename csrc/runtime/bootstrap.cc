#include "runtime/bootstrap.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <map>
#include <numeric>
#include <thread>

#include "common/env.h"
#include "common/error.h"
#include "common/hash.h"
#include "common/log.h"
#include "transport/peer_memory.h"

namespace pycomm::runtime {

namespace {

bool reads_itself(transport::Node& node) {
  const uint64_t word = 1;
  uint64_t there = 0;
  return node.read(node.rank(), &there, reinterpret_cast<uint64_t>(&word), sizeof word) == 0 && there == word;
}

// The cores that the ranks may use together decide whether spinning is polite.
void learn_cores(Communicator& comm, Fabric& fabric) {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  sched_getaffinity(0, sizeof mask, &mask);
  std::vector<int64_t> words(sizeof mask / sizeof(int64_t));
  std::memcpy(words.data(), &mask, sizeof mask);
  Patience patience;
  const auto all = comm.exchange("init()", words, patience);
  int cores = 0;
  for (size_t w = 0; w < words.size(); ++w) {
    uint64_t together = 0;
    for (int r = 0; r < comm.size(); ++r) together |= static_cast<uint64_t>(all[r * words.size() + w]);
    cores += std::popcount(together);
  }
  fabric.policy = wait_policy(comm.size(), cores);
  if (cores > comm.size()) fabric.background = fabric.policy;
  log(LogLevel::info, "joined ", comm.size(), " ranks on ", cores, " cores: waits ",
      fabric.policy.yield ? "yield" : "spin", " before they sleep");
}

// Plans depend on the caches, and ranks may be shown different ones: each in a container of its own, say.
void learn_caches(Communicator& comm, Fabric& fabric) {
  const Caches& mine = caches();
  Patience patience;
  const auto all = comm.exchange("init()", {mine.l2, mine.last, mine.sharers}, patience);
  Caches least = mine;
  for (int r = 0; r < comm.size(); ++r) {
    least.l2 = std::min(least.l2, all[3 * r]);
    least.last = std::min(least.last, all[3 * r + 1]);
    least.sharers = std::min(least.sharers, static_cast<int>(all[3 * r + 2]));
  }
  fabric.profile = built_in_profile(least);
  log(LogLevel::info, "caches: L2 of ", least.l2 >> 10, " KiB a core, last level of ", least.last >> 20,
      " MiB for ", least.sharers, " cores");
}

// Every rank reads a word of each other's, and all hear how that went: they must choose alike.
void learn_single_copy(Communicator& comm, Fabric& fabric) {
  if (comm.size() == 1) return;
  const uint64_t word = Hasher().add(getpid()).add(now_s()).digest();
  const int64_t address = env().single_copy ? reinterpret_cast<int64_t>(&word) : 0;
  Patience patience;
  const auto words = comm.exchange("init()", {address, static_cast<int64_t>(word)}, patience);
  for (int r = 0; r < comm.size(); ++r) {
    if (words[2 * r] != 0) continue;
    return log(LogLevel::info, "single copy off: rank ", r, " has PYCOMM_SINGLE_COPY=0");
  }
  const auto try_all = [&] {
    int64_t error = 0;
    for (int r = 0; r < comm.size() && error == 0; ++r) {
      int64_t there = 0;
      error = comm.domain().group().read(r, &there, static_cast<uint64_t>(words[2 * r]), sizeof there);
      if (error == 0 && there != words[2 * r + 1]) error = ESRCH;  // another namespace's pid
    }
    return comm.exchange("init()", {error}, patience);
  };
  auto errors = try_all();
  const bool forbidden = std::count(errors.begin(), errors.end(), EPERM) > 0;
  if (forbidden) {
    transport::let_siblings_read(true);
    comm.exchange("init()", {0}, patience);
    errors = try_all();
  }
  const auto error = static_cast<int>(*std::max_element(errors.begin(), errors.end()));
  if (forbidden && error != 0) transport::let_siblings_read(false);
  fabric.single_copy = error == 0;
  log(LogLevel::info, "single copy ",
      fabric.single_copy ? "on" : "off: ranks cannot read each other's memory: ",
      fabric.single_copy ? "" : std::strerror(error));
}

}  // namespace

std::shared_ptr<Communicator> join(const transport::Node::Options& options) {
  warn_of_misspelt_variables();
  transport::Node::Options with_root = options;
  with_root.root_bytes = Domain::bytes(options.size, options.size);
  auto node = transport::Node::join(with_root);
  std::vector<int> ranks(options.size);
  std::iota(ranks.begin(), ranks.end(), 0);
  auto domain = std::make_unique<Domain>(node, ranks, options.rank, node->root_extent());
  auto comm = std::make_shared<Communicator>(std::move(domain), Fabric{}, options.timeout_s);
  learn_cores(*comm, comm->fabric_);
  learn_caches(*comm, comm->fabric_);
  learn_single_copy(*comm, comm->fabric_);
  return comm;
}

std::vector<std::shared_ptr<Communicator>> join_threads(int size, double timeout_s,
                                                        const transport::Node::MadeUp& made_up) {
  warn_of_misspelt_variables();
  auto nodes = transport::Node::local(size, made_up);
  std::vector<int> ranks(size);
  std::iota(ranks.begin(), ranks.end(), 0);
  std::vector<int> node_of = nodes[0]->nodes_of(ranks);
  if (node_of.empty()) node_of.assign(size, 0);
  std::map<int, int64_t> offsets;  // by node
  for (int r = 0; r < size; ++r) {
    if (offsets.contains(node_of[r])) continue;
    const auto local = static_cast<int>(std::count(node_of.begin(), node_of.end(), node_of[r]));
    offsets[node_of[r]] = nodes[r]->reserve(Domain::bytes(local, size));
  }
  Fabric fabric;
  fabric.policy = wait_policy(size, static_cast<int>(std::thread::hardware_concurrency()));
  fabric.profile = built_in_profile(caches());
  fabric.single_copy = env().single_copy && reads_itself(*nodes[0]);
  std::vector<std::shared_ptr<Communicator>> comms;
  for (int r = 0; r < size; ++r) {
    auto domain = std::make_unique<Domain>(nodes[r], ranks, r, offsets[node_of[r]]);
    comms.push_back(std::make_shared<Communicator>(std::move(domain), fabric, timeout_s));
  }
  return comms;
}

}  // namespace pycomm::runtime
