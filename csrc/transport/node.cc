#include "transport/node.h"

#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <exception>
#include <map>
#include <mutex>
#include <new>
#include <utility>

#include "common/error.h"
#include "common/log.h"
#include "transport/arena.h"
#include "transport/loopback.h"
#include "transport/memory.h"
#include "transport/peer_memory.h"
#include "transport/rendezvous.h"

namespace pycomm::transport {
namespace {

struct Region {
  int64_t bytes;
  int file;
  int64_t offset;
};
std::mutex shown_mutex;
std::map<char*, Region> shown;  // to children of fork()

void show_in_child() {
  for (const auto& [data, region] : shown) {
    mmap(data, static_cast<size_t>(region.bytes), PROT_READ | PROT_WRITE,
         MAP_PRIVATE | MAP_FIXED_NOREPLACE | MAP_NORESERVE, region.file, region.offset);
  }
  shown.clear();  // its own children inherit them
}

std::atomic<uint64_t> forks{0};
const int registered = pthread_atfork([] { shown_mutex.lock(); }, [] { shown_mutex.unlock(); },
                                      [] {
                                        forks.fetch_add(1, std::memory_order_relaxed);
                                        show_in_child();
                                        shown_mutex.unlock();
                                      });

// The file begins with this.
using Bump = std::atomic<int64_t>;
static_assert(Bump::is_always_lock_free && sizeof(Bump) == 8);
struct Head {
  Bump bump;         // where the free part begins
  int64_t root = 0;  // the root extent; -1: there was no space for it
};

void require_positive(int64_t bytes) {
  if (bytes <= 0) throw ValueError("an extent of " + std::to_string(bytes) + " bytes: must be positive");
}

}  // namespace

uint64_t fork_generation() { return forks.load(std::memory_order_relaxed); }
bool forked_since(uint64_t generation) { return fork_generation() != generation; }

void Mapping::show_to_children(int file, int64_t offset, int64_t bytes) {
  const std::lock_guard lock(shown_mutex);
  shown[data_] = {bytes, file, offset};
}

Mapping::~Mapping() {
  if (forked_since(generation_)) return;
  {
    const std::lock_guard lock(shown_mutex);
    shown.erase(data_);
  }
  munmap(data_, static_cast<size_t>(bytes_));
}

struct Node::Shared {
  explicit Shared(Fd file)
      : memory(std::move(file)), root(map_extent(memory.get(), 0, page_size(), true), page_size()) {}
  Head& head() { return *reinterpret_cast<Head*>(root.data()); }

  Fd memory;
  Mapping root;
  Fd pagemap = open_pagemap();
  std::mutex mutex;
  std::map<std::pair<int64_t, int64_t>, std::weak_ptr<Mapping>>
      mappings;  // rank threads: by offset and bytes
};

struct Node::Network {
  Network(int size, bool threads, const MadeUp& made_up)
      : threads(threads), dead(size), nodes(made_up.nodes), loopback(made_up.delays) {}
  bool threads;
  std::vector<std::atomic<bool>> dead;  // by mark_dead
  std::vector<int> nodes;               // made up
  Loopback loopback;                    // between these
};

namespace {

int64_t take_extent(int file, Bump& bump, int64_t bytes) {
  const int64_t unit = extent_unit(bytes);
  require_available(bytes);  // before any address space is spent on it
  bytes = round_up(bytes, page_size());
  int64_t free = bump.load(), offset;
  do offset = round_up(free, unit);
  while (!bump.compare_exchange_weak(free, offset + round_up(bytes, unit)));
  populate(file, offset, bytes, unit == kHugePage && huge_by_advice());
  return offset;
}

// Whoever makes the memory lays out its first page, and the root extent if there is to be one; `failed` is why
// that could not be.
Fd make_memory(int64_t root_bytes, std::exception_ptr& failed) {
  Fd memory = create_memory();
  populate(memory.get(), 0, page_size(), false);
  const Mapping page(map_extent(memory.get(), 0, page_size(), true), page_size());
  Head& head = *new (page.data()) Head{page_size()};
  try {
    if (root_bytes > 0) head.root = take_extent(memory.get(), head.bump, root_bytes);
  } catch (const OutOfMemoryError&) {
    head.root = -1;
    failed = std::current_exception();
  }
  return memory;
}

}  // namespace

std::shared_ptr<Node> Node::join(const Options& options) {
  if (options.size < 1 || options.rank < 0 || options.rank >= options.size)
    throw ValueError("rank " + std::to_string(options.rank) + " of " + std::to_string(options.size) +
                     ": a rank is at least 0 and less than the size");
  if (!(options.timeout_s > 0))
    throw ValueError("a timeout of " + std::to_string(options.timeout_s) + " s: must be positive");
  if (options.size > 1 && options.address.empty())
    throw ValueError("the ranks of a node need an address to meet at, the same on all of them; it is empty");
  std::exception_ptr failed;  // told when the others know
  Fd memory = options.rank == 0 ? make_memory(options.root_bytes, failed) : Fd();
  Meeting meeting;
  if (options.size > 1) {
    meeting = meet(options, std::move(memory));
  } else {
    meeting.memory = std::move(memory);
    meeting.seats.emplace_back().pid = getpid();
  }
  if (failed) std::rethrow_exception(failed);
  std::shared_ptr<Node> node(new Node);
  node->rank_ = options.rank;
  node->size_ = options.size;
  node->shared_ = std::make_shared<Shared>(std::move(meeting.memory));
  node->network_ = std::make_shared<Network>(options.size, false, MadeUp{});
  for (int rank = 0; rank < options.size; ++rank) {
    Seat& seat = meeting.seats[rank];
    node->pids_.push_back(seat.pid);
    node->pidfds_.push_back(rank == options.rank ? -1 : seat.pidfd.release());
    node->arena_files_.push_back(rank == options.rank ? Fd() : std::move(seat.arena));
  }
  log(LogLevel::trace, "joined the node at '", options.address, "'");
  return node;
}

std::vector<std::shared_ptr<Node>> Node::local(int size, const MadeUp& made_up) {
  if (size < 1) throw ValueError(std::to_string(size) + " ranks: must be at least 1");
  if (!made_up.nodes.empty() && static_cast<int>(made_up.nodes.size()) != size) {
    throw ValueError(std::to_string(made_up.nodes.size()) + " nodes are named for " + std::to_string(size) +
                     " ranks: name one for each rank");
  }
  const auto network = std::make_shared<Network>(size, true, made_up);
  std::map<int, std::shared_ptr<Shared>> memories;
  std::vector<std::shared_ptr<Node>> nodes;
  for (int rank = 0; rank < size; ++rank) {
    std::shared_ptr<Shared>& memory = memories[made_up.nodes.empty() ? 0 : made_up.nodes[rank]];
    std::exception_ptr none;
    if (!memory) memory = std::make_shared<Shared>(make_memory(0, none));
    std::shared_ptr<Node> node(new Node);
    node->rank_ = rank;
    node->size_ = size;
    node->shared_ = memory;
    node->network_ = network;
    node->pidfds_.assign(size, -1);
    node->pids_.assign(size, getpid());
    nodes.push_back(std::move(node));
  }
  return nodes;
}

Node::~Node() {
  for (const int fd : pidfds_)
    if (fd >= 0) close(fd);
}

std::vector<int> Node::nodes_of(const std::vector<int>& ranks) const {
  if (network_->nodes.empty()) return {};
  std::vector<int> seen, nodes;
  for (const int rank : ranks) {
    const auto at = std::ranges::find(seen, network_->nodes.at(rank));
    nodes.push_back(static_cast<int>(at - seen.begin()));
    if (at == seen.end()) seen.push_back(network_->nodes[rank]);
  }
  return seen.size() > 1 ? nodes : std::vector<int>();
}

std::unique_ptr<Messages> Node::open_messages(uint64_t key, const std::vector<int>& ranks, int me,
                                              std::function<void()> on_news) {
  if (nodes_of(ranks).empty()) return nullptr;
  return network_->loopback.open(key, static_cast<int>(ranks.size()), me, std::move(on_news));
}

char* Node::arena_of(int rank) {
  if (threads() || rank == rank_) return Arena::of_process().base();
  const std::lock_guard lock(arenas_mutex_);
  arenas_.resize(size_);
  std::shared_ptr<Mapping>& arena = arenas_[rank];
  if (!arena) {
    struct stat file{};
    if (fstat(arena_files_[rank].get(), &file)) return nullptr;
    try {
      arena = std::make_shared<Mapping>(map_extent(arena_files_[rank].get(), 0, file.st_size, false),
                                        file.st_size);
    } catch (const OutOfMemoryError&) {
      return nullptr;
    }
  }
  return arena->data();
}

bool Node::threads() const { return network_->threads; }
int64_t Node::pid_of(int rank) const { return pids_.at(rank); }
int64_t Node::root_extent() const {
  const int64_t offset = shared_->head().root;
  if (offset < 0) throw OutOfMemoryError("rank 0 could not reserve the group's shared memory; see its error");
  return offset;
}
char* Node::root_page() const { return shared_->root.data(); }

int64_t Node::reserve(int64_t bytes) {
  require_positive(bytes);
  give_back();
  return take_extent(shared_->memory.get(), shared_->head().bump, bytes);
}

std::shared_ptr<Mapping> Node::map(int64_t offset, int64_t bytes, bool for_users) {
  require_positive(bytes);
  bytes = round_up(bytes, page_size());
  const auto fresh = [&] {
    const int file = shared_->memory.get();
    auto mapping = std::make_shared<Mapping>(map_extent(file, offset, bytes, true), bytes);
    if (for_users) mapping->show_to_children(file, offset, bytes);
    return mapping;
  };
  if (!threads()) return fresh();
  // One for all rank threads, so that a sanitizer sees which thread touches what.
  const std::lock_guard lock(shared_->mutex);
  std::erase_if(shared_->mappings, [](const auto& entry) { return entry.second.expired(); });
  std::weak_ptr<Mapping>& known = shared_->mappings[{offset, bytes}];
  std::shared_ptr<Mapping> mapping = known.lock();
  if (!mapping) known = mapping = fresh();
  return mapping;
}

void Node::release(int64_t offset, int64_t bytes) {
  require_positive(bytes);
  punch(shared_->memory.get(), offset, round_up(bytes, extent_unit(bytes)));
}

void Node::let_go(Extent extent) {
  extent.let_go[extent.me / 64].fetch_or(uint64_t{1} << extent.me % 64, std::memory_order_acq_rel);
  // Of the whole only the bits stay mapped.
  const auto at = reinterpret_cast<char*>(extent.let_go) - extent.mapping->data();
  const auto page = at / page_size() * page_size();
  const auto words = static_cast<int64_t>((extent.ranks.size() + 63) / 64 * sizeof(uint64_t));
  const int64_t bytes = round_up(at - page + words, page_size());
  auto bits =
      std::make_shared<Mapping>(map_extent(shared_->memory.get(), extent.offset + page, bytes, false), bytes);
  extent.let_go = reinterpret_cast<std::atomic<uint64_t>*>(bits->data() + (at - page));
  extent.mapping = std::move(bits);
  {
    const std::lock_guard lock(left_mutex_);
    left_.push_back(std::move(extent));
  }
  give_back();
}

// Several ranks may give the same back: offsets are never used again. Where another rank has, the bits are
// zero, and to look at them took a page, which goes back as well.
void Node::give_back() {
  const auto has_let_go = [](const Extent& extent, int rank) {
    return extent.let_go[rank / 64].load(std::memory_order_acquire) >> rank % 64 & 1;
  };
  const std::lock_guard lock(left_mutex_);
  if (left_.empty()) return;
  const bool deaths = any_dead().has_value();
  std::erase_if(left_, [&](Extent& extent) {
    const bool given_back = !has_let_go(extent, extent.me);
    for (size_t i = 0; i < extent.ranks.size() && !given_back; ++i) {
      if (!has_let_go(extent, static_cast<int>(i)) && !(deaths && dead(extent.ranks[i]))) return false;
    }
    if (extent.with_it && !given_back) extent.with_it(*this);
    release(extent.offset, extent.bytes);
    return true;
  });
}

int Node::read(int rank, void* to, uint64_t from, int64_t bytes) {
  const int error = read_memory(pid_of(rank), to, from, bytes);
  return dead(rank) ? ESRCH : error;
}

bool Node::fit_to_read(const void* data, int64_t bytes) const {
  return transport::fit_to_read(shared_->pagemap, data, bytes);
}

bool Node::dead(int rank) {
  if (network_->dead.at(rank).load(std::memory_order_acquire)) return true;
  pollfd entry{pidfds_[rank], POLLIN, 0};
  return entry.fd >= 0 && poll(&entry, 1, 0) > 0;
}

std::optional<int> Node::any_dead() {
  std::vector<pollfd> entries;
  for (const int fd : pidfds_) entries.push_back({fd, POLLIN, 0});  // poll skips -1
  if (!threads()) poll(entries.data(), entries.size(), 0);
  for (int rank = 0; rank < size_; ++rank)
    if (entries[rank].revents || network_->dead[rank].load(std::memory_order_acquire)) return rank;
  return std::nullopt;
}

void Node::mark_dead(int rank) { network_->dead.at(rank).store(true, std::memory_order_release); }

}  // namespace pycomm::transport
