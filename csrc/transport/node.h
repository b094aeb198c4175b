// A node: ranks that map each other's memory, and how they find each other, share memory, and learn of a
// death.
//
// Memory is one anonymous sparse file (memfd) per node, so nothing has a name that could be left behind.
// Space is handed out by offset and never reused (the file's address space is practically endless;
// release() gives the pages back). The descriptor and every rank's pidfd are passed once, at join, over an
// abstract Unix socket (SCM_RIGHTS); the kernel's word for the uid is checked both ways (SO_PEERCRED).
// Mappings are MADV_DONTFORK; those that users see are mapped again, privately, in a child of fork().
// Descriptors are close-on-exec.
//
// Rank threads of one process may also be ranks of a node, or of several made-up ones (local): no sockets,
// deaths marked by hand; each made-up node has memory of its own.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "transport/fd.h"
#include "transport/messages.h"

namespace pycomm::transport {

// True in a child of fork() that inherited nodes made before it: nothing of them is mapped there. One load.
bool forked_since(uint64_t generation);
uint64_t fork_generation();

// A mapped extent; unmapped with its last owner (not in a child of fork(), where something else may lie
// there).
class Mapping {
 public:
  Mapping(char* data, int64_t bytes) : data_(data), bytes_(bytes) {}
  // From now on, a child of fork() maps the first `bytes` privately: it sees what they hold at the fork and
  // what the parent writes later, up to the child's own first write to a page. `file`, where they lie at
  // `offset`, must stay open as long as this. The last call counts.
  void show_to_children(int file, int64_t offset, int64_t bytes);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  char* data_;
  int64_t bytes_;
  uint64_t generation_ = fork_generation();
};

class Node {
 public:
  struct Options {
    int rank = 0, size = 1;
    // Names the meeting point, the same on all ranks and unlike any other job's: an abstract socket
    // "pycomm-<hash>" is derived from it together with the uid.
    std::string address;
    double timeout_s = 600;         // may be infinity; the earliest deadline of any rank is everybody's
    int64_t root_bytes = 0;         // of the extent that is there when the ranks have met (root_extent)
    std::function<void()> on_wait;  // called every 50 ms or so while waiting, and may throw: for Ctrl-C
  };

  // Blocks until all ranks have come. Throws CommTimeoutError naming the ranks that did not come (on the
  // rank that knows, rank 0; the others say that rank 0 did not answer or which ranks it said are missing),
  // ValueError for a rank or size that does not fit what others said (two processes with one rank,
  // different sizes), CommError for a stranger's uid, PeerLostError for a rank that ends meanwhile,
  // OutOfMemoryError on rank 0 where there is no space for root_bytes.
  static std::shared_ptr<Node> join(const Options& options);
  // Of rank threads: which node each is said to be on (empty: one node), and what decides how messages
  // between nodes are delayed (nothing: they are not).
  struct MadeUp {
    std::vector<int> nodes;
    std::optional<uint64_t> delays;
  };
  // One for each of `size` rank threads of this process. Throws ValueError.
  static std::vector<std::shared_ptr<Node>> local(int size, const MadeUp& made_up = {});
  ~Node();
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  bool threads() const;  // made by local()
  // The node of each of these ranks, numbered from 0 in the order of their first ranks; empty if all are on
  // one node.
  std::vector<int> nodes_of(const std::vector<int>& ranks) const;
  // The end of `me`, one of these ranks, for messages across nodes; null if all are on one node. `key`
  // identifies their group among all groups that there ever were. `on_news`: see Messages.
  std::unique_ptr<Messages> open_messages(uint64_t key, const std::vector<int>& ranks, int me,
                                          std::function<void()> on_news = {});
  int64_t pid_of(int rank) const;
  // Where this process has the rank's arena (arena.h), mapped at the first call; null if it cannot map it.
  char* arena_of(int rank);

  // Copies from a rank's own memory, at that address there, through the kernel. Returns 0 or an errno of
  // read_memory (peer_memory.h); ESRCH also if the rank has ended meanwhile, since what was read may then
  // be another's.
  int read(int rank, void* to, uint64_t from, int64_t bytes);
  // Whether others should read this memory of ours in that way: see fit_to_read in peer_memory.h.
  bool fit_to_read(const void* data, int64_t bytes) const;

  // Reserves `bytes` (rounded up to pages) for real: every page is there when this returns, zeroed, or
  // OutOfMemoryError is thrown that names what was asked, what the cgroup and MemAvailable have left, and
  // the remedy, and nothing is kept. Looks before it takes, so that neither SIGBUS nor the out-of-memory
  // killer comes. One rank calls it and tells the others the offset. Thread- and process-safe.
  int64_t reserve(int64_t bytes);
  // Maps an extent that was reserved, page tables filled (no fault later); huge pages are advised where the
  // system offers them for shared memory. `for_users`: children of fork() may read it.
  std::shared_ptr<Mapping> map(int64_t offset, int64_t bytes, bool for_users = false);
  // Gives an extent's pages back (whoever still has it mapped reads zeros).
  void release(int64_t offset, int64_t bytes);

  // An extent as one of the ranks that share it has it.
  struct Extent {
    std::shared_ptr<Mapping> mapping;
    int64_t offset, bytes;
    std::atomic<uint64_t>* let_go;       // in it, zero at first: a bit for each of
    std::vector<int> ranks;              // these, by their ranks of the node
    int me;                              // which of them this rank is
    std::function<void(Node&)> with_it;  // if set, gives back what goes with it
  };
  // This rank needs the extent no more. The pages go back when all of its ranks have said so or have ended:
  // whichever rank notices that, in its next let_go() or reserve().
  void let_go(Extent extent);
  // Where the extent of Options::root_bytes lies, which rank 0 has reserved: for the ranks' first group.
  // Throws OutOfMemoryError if it could not.
  int64_t root_extent() const;
  // The first page of the file, zeroed at the start; bytes [64, 4096) are free to use.
  char* root_page() const;

  // Whether a rank's process has ended, by its pidfd (no system call more than one poll; never blocks).
  // Threads: mark_dead, also of ranks on other nodes.
  bool dead(int rank);
  // Any rank that has ended, the lowest one; one poll for all.
  std::optional<int> any_dead();
  // For rank threads: this rank will not come back. (Between processes only this one is told.)
  void mark_dead(int rank);

 private:
  Node() = default;
  struct Shared;
  struct Network;
  int rank_ = 0, size_ = 1;
  std::shared_ptr<Shared> shared_;    // of the ranks on this node
  std::shared_ptr<Network> network_;  // of all ranks
  std::vector<int> pidfds_;
  std::vector<int64_t> pids_;
  std::mutex arenas_mutex_;
  std::vector<Fd> arena_files_;                   // of the others
  std::vector<std::shared_ptr<Mapping>> arenas_;  // as far as they are mapped
  void give_back();
  std::mutex left_mutex_;
  std::vector<Extent> left_;  // let go by this rank, and not by all
};

}  // namespace pycomm::transport
