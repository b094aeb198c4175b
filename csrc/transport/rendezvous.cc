#include "transport/rendezvous.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <string>
#include <string_view>

#include "common/error.h"
#include "common/hash.h"
#include "common/log.h"
#include "transport/arena.h"

namespace pycomm::transport {
namespace {

using Clock = std::chrono::steady_clock;
using std::to_string;
using std::chrono::milliseconds;

constexpr milliseconds kTick{50};     // between two calls of on_wait
constexpr milliseconds kGrace{2000};  // rank 0 knows more about a timeout: the others let it speak first
constexpr int kBatch = 120;           // seats a message; the kernel takes 253 descriptors

// ---- messages: one hello up; seats, in batches, or an error down ----

enum class Kind : int32_t { hello, seats, value_error, comm_error, peer_lost, timeout };

struct Message {
  uint32_t magic = 0x6d6f6370, version = 2;  // these two stay where they are
  Kind kind = Kind::hello;
  int32_t rank = 0, size = 0;
  int32_t first = 0, count = 0;  // seats: which
  int32_t remaining_ms = 0;      // hello: until the sender's deadline
  union {
    char text[kBatch * sizeof(int64_t)] = {};  // errors
    int64_t pids[kBatch];                      // seats
  };
};

Message error_message(const std::exception& error) {
  Message message;
  message.kind = dynamic_cast<const ValueError*>(&error)         ? Kind::value_error
                 : dynamic_cast<const PeerLostError*>(&error)    ? Kind::peer_lost
                 : dynamic_cast<const CommTimeoutError*>(&error) ? Kind::timeout
                                                                 : Kind::comm_error;
  std::snprintf(message.text, sizeof message.text, "%s", error.what());
  return message;
}

[[noreturn]] void throw_error(const Message& message) {
  const std::string text(message.text, strnlen(message.text, sizeof message.text));
  switch (message.kind) {
    case Kind::value_error:
      throw ValueError(text);
    case Kind::peer_lost:
      throw PeerLostError(text);
    case Kind::timeout:
      throw CommTimeoutError(text);
    case Kind::comm_error:
      throw CommError(text);
    case Kind::hello:
    case Kind::seats:
      break;
  }
  throw CommError(
      "rank 0 sent a message that makes no sense here; do all ranks run the same version of pycomm?");
}

enum class Io { done, again, gone };

Io failed_io() {
  // ETOOMANYREFS: more descriptors under way than the user may have open; they arrive as the others read.
  return errno == EAGAIN || errno == EINTR || errno == ETOOMANYREFS || errno == ENOBUFS ? Io::again
                                                                                        : Io::gone;
}

union Control {
  cmsghdr header;
  char bytes[CMSG_SPACE(sizeof(int) * (2 * kBatch + 1))];
};

Io send(const Fd& socket, const Message& message, const std::vector<int>& fds) {
  iovec data{const_cast<Message*>(&message), sizeof message};
  Control control{};
  msghdr header{};
  header.msg_iov = &data;
  header.msg_iovlen = 1;
  if (!fds.empty()) {
    header.msg_control = &control;
    header.msg_controllen = CMSG_SPACE(sizeof(int) * fds.size());
    cmsghdr* rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
    std::memcpy(CMSG_DATA(rights), fds.data(), sizeof(int) * fds.size());
  }
  return sendmsg(socket.get(), &header, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? failed_io() : Io::done;
}

Io receive(const Fd& socket, Message* message, std::vector<Fd>* fds) {
  iovec data{message, sizeof *message};
  Control control{};
  msghdr header{};
  header.msg_iov = &data;
  header.msg_iovlen = 1;
  header.msg_control = &control;
  header.msg_controllen = sizeof control;
  const ssize_t bytes = recvmsg(socket.get(), &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  if (bytes < 0) return failed_io();
  for (cmsghdr* rights = CMSG_FIRSTHDR(&header); rights; rights = CMSG_NXTHDR(&header, rights)) {
    if (rights->cmsg_level != SOL_SOCKET || rights->cmsg_type != SCM_RIGHTS) continue;
    for (size_t at = CMSG_LEN(0); at + sizeof(int) <= rights->cmsg_len; at += sizeof(int)) {
      int fd;
      std::memcpy(&fd, reinterpret_cast<char*>(rights) + at, sizeof fd);
      fds->emplace_back(fd);
    }
  }
  const Message own{};
  if (bytes < static_cast<ssize_t>(offsetof(Message, kind)) || message->magic != own.magic) return Io::gone;
  if (message->version != own.version || bytes != sizeof *message)
    throw CommError("another rank speaks version " + to_string(message->version) +
                    " of the join's protocol, this one " + to_string(own.version) +
                    ": install the same pycomm for all ranks");
  if (header.msg_flags & MSG_CTRUNC)
    throw CommError(
        "no room for the descriptors of all ranks (two a rank): raise the limit on open files, ulimit -n");
  return Io::done;
}

ucred peer_of(const Fd& socket) {
  ucred peer{};
  peer.uid = static_cast<uid_t>(-1);
  socklen_t bytes = sizeof peer;
  getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &peer, &bytes);
  return peer;
}

Fd open_pidfd() {
  Fd fd(static_cast<int>(syscall(SYS_pidfd_open, getpid(), 0)));
  if (!fd) throw CommError("pycomm cannot open a pidfd (it needs Linux 5.3 or newer): " + reason());
  return fd;
}

// ---- a join: the parts that host and guest share ----

class Join {
 public:
  explicit Join(const Node::Options& options)
      : options_(options), pidfd_(open_pidfd()), arena_(Arena::of_process().file()) {
    const uint64_t hash = Hasher().add(options.address).add(geteuid()).digest();
    const int length = std::snprintf(name_.sun_path + 1, sizeof name_.sun_path - 1, "pycomm-%016llx",
                                     static_cast<unsigned long long>(hash));
    name_.sun_family = AF_UNIX;  // sun_path[0] == 0: abstract
    name_bytes_ = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + length);
    constexpr double kLongest = 1e9;  // for infinity
    deadline_ = start_ + milliseconds(static_cast<int64_t>(std::min(options.timeout_s, kLongest) * 1000));
  }

  Fd listen_as_host();  // empty if somebody else does
  Meeting host(Fd listener, Fd memory);
  Fd connect_to_host();  // empty if nobody listens
  Meeting attend(const Fd& host);

  bool late(milliseconds grace = {}) const { return Clock::now() >= deadline_ + grace; }
  // Until one of `fds` is ready, or a tick has passed.
  void wait(std::vector<pollfd>& fds, milliseconds longest = kTick) {
    const auto rest = std::chrono::ceil<milliseconds>(deadline_ - Clock::now());
    const auto slice = rest.count() > 0 ? std::min(rest, longest) : std::min(longest, milliseconds(10));
    poll(fds.data(), fds.size(), static_cast<int>(slice.count()));
    if (options_.on_wait) options_.on_wait();
  }
  void pause(milliseconds longest) {
    std::vector<pollfd> none;
    wait(none, longest);
  }
  std::string elapsed() const {
    char text[32];
    std::snprintf(text, sizeof text, "%.1f s", std::chrono::duration<double>(Clock::now() - start_).count());
    return text;
  }
  std::string place() const {
    return std::string(name_.sun_path + 1) + " (from the address '" + options_.address + "')";
  }

 private:
  int32_t remaining_ms() const {
    const auto rest = std::chrono::duration_cast<milliseconds>(deadline_ - Clock::now()).count();
    return static_cast<int32_t>(std::clamp<int64_t>(rest, 0, INT32_MAX));
  }

  void accept_guests();
  void greet_guests();
  void admit(Fd& guest, const Message& hello, std::vector<Fd>& fds);
  void watch();
  std::string missing_ranks() const;
  void send_members(int rank);
  void tell_all(const Message& error);

  const Node::Options& options_;
  Fd pidfd_;
  const int arena_;
  sockaddr_un name_{};
  socklen_t name_bytes_ = 0;
  const Clock::time_point start_ = Clock::now();
  Clock::time_point deadline_;
  // The host's:
  Fd listener_;
  std::vector<Fd> guests_;       // connected, hello not read
  std::vector<Fd> connections_;  // by rank
  Meeting meeting_;
  int missing_ = 0;
};

Fd Join::listen_as_host() {
  Fd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) throw CommError("pycomm cannot make a Unix socket: " + reason());
  if (bind(socket.get(), reinterpret_cast<sockaddr*>(&name_), name_bytes_)) {
    if (errno == EADDRINUSE) return Fd();
    throw CommError("pycomm cannot bind its socket " + place() + ": " + reason());
  }
  if (listen(socket.get(), SOMAXCONN))
    throw CommError("pycomm cannot listen on " + place() + ": " + reason());
  return socket;
}

Fd Join::connect_to_host() {
  Fd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) throw CommError("pycomm cannot make a Unix socket: " + reason());
  if (connect(socket.get(), reinterpret_cast<sockaddr*>(&name_), name_bytes_)) {
    if (errno == ECONNREFUSED || errno == EAGAIN || errno == EINTR) return Fd();
    throw CommError("pycomm cannot connect to " + place() + ": " + reason());
  }
  const uid_t uid = peer_of(socket).uid;
  if (uid != geteuid())
    throw CommError("the socket " + place() + " is held by uid " + to_string(uid) + ", this process is uid " +
                    to_string(geteuid()) + ": all ranks must run as one user; else choose another address");
  return socket;
}

Meeting Join::attend(const Fd& host) {
  Message hello;
  hello.rank = options_.rank;
  hello.size = options_.size;
  hello.remaining_ms = remaining_ms();
  Meeting meeting;
  meeting.seats.resize(options_.size);
  bool said_hello = false;
  for (int known = 0; known < options_.size;) {
    Message message;
    std::vector<Fd> fds;
    // Read first: the reason why rank 0 left may lie there.
    Io io = receive(host, &message, &fds);
    if (io == Io::again && !said_hello) {
      io = send(host, hello, {pidfd_.get(), arena_});
      said_hello = io == Io::done;
      if (io == Io::done) io = Io::again;
    }
    if (io == Io::gone)
      throw PeerLostError(
          "rank 0 left while the ranks were joining: its process ended, or its group was complete " +
          std::string("without rank ") + to_string(options_.rank) + "; see what rank 0 said");
    if (io == Io::again) {
      if (late(kGrace))
        throw CommTimeoutError("rank 0 (pid " + to_string(peer_of(host).pid) +
                               ") is there but did not finish the join within " + elapsed() +
                               ": is it stopped?");
      std::vector<pollfd> entry{{host.get(), POLLIN, 0}};
      wait(entry, said_hello ? kTick : milliseconds(1));
      continue;
    }
    const size_t with_memory = known == 0;
    if (message.kind != Kind::seats || message.first != known || message.count < 1 ||
        message.count > kBatch || message.count > options_.size - known ||
        fds.size() != 2 * message.count + with_memory)
      throw_error(message);
    if (with_memory) meeting.memory = std::move(fds[0]);
    for (int i = 0; i < message.count; ++i)
      meeting.seats[known + i] = {message.pids[i], std::move(fds[2 * i + with_memory]),
                                  std::move(fds[2 * i + 1 + with_memory])};
    known += message.count;
  }
  return meeting;
}

// ---- rank 0 ----

void Join::accept_guests() {
  while (Fd guest{accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)}) {
    const ucred peer = peer_of(guest);
    if (peer.uid == geteuid())
      guests_.push_back(std::move(guest));
    else
      log(LogLevel::warn, "turned away a process of uid ", peer.uid, " (pid ", peer.pid, ") at ", place());
  }
}

void Join::greet_guests() {
  for (Fd& guest : guests_) {
    Message hello;
    std::vector<Fd> fds;
    const Io io = receive(guest, &hello, &fds);
    if (io == Io::gone) guest = Fd();  // not a rank of this job
    if (io == Io::done) admit(guest, hello, fds);
  }
  std::erase_if(guests_, [](const Fd& guest) { return !guest; });
}

void Join::admit(Fd& guest, const Message& hello, std::vector<Fd>& fds) {
  const int64_t pid = peer_of(guest).pid;
  const std::string who = "rank " + to_string(hello.rank) + " (pid " + to_string(pid) + ")";
  if (hello.size != options_.size)
    throw ValueError(who + " says that there are " + to_string(hello.size) + " ranks, rank 0 says " +
                     to_string(options_.size) + ": start all ranks with one size");
  if (hello.kind != Kind::hello || hello.rank < 0 || hello.rank >= hello.size || fds.size() != 2)
    throw CommError(who + " sent a hello that makes no sense; do all ranks run the same version of pycomm?");
  Seat& seat = meeting_.seats[hello.rank];
  if (seat.pidfd)
    throw ValueError("two processes say that they are rank " + to_string(hello.rank) + ": pid " +
                     to_string(seat.pid) + " and pid " + to_string(pid) +
                     ". Give every process its own rank, and every job its own address");
  seat = {pid, std::move(fds[0]), std::move(fds[1])};
  connections_[hello.rank] = std::move(guest);
  deadline_ = std::min(deadline_, Clock::now() + milliseconds(hello.remaining_ms));
  --missing_;
}

// Waits until something happens, and throws if that is a rank's end.
void Join::watch() {
  std::vector<pollfd> entries;
  for (int rank = 0; rank < options_.size;
       ++rank) {  // poll skips the descriptor -1 of those that have not come
    entries.push_back({connections_[rank].get(), POLLIN, 0});
    entries.push_back({rank == 0 ? -1 : meeting_.seats[rank].pidfd.get(), POLLIN, 0});
  }
  entries.push_back({listener_.get(), POLLIN, 0});
  for (const Fd& guest : guests_) entries.push_back({guest.get(), POLLIN, 0});
  wait(entries);
  for (int rank = 0; rank < options_.size; ++rank) {
    pollfd& ended = entries[2 * rank + 1];
    if (!entries[2 * rank].revents && !ended.revents) continue;
    // Nothing is sent after the hello: it hung up. A process that ends closes its sockets a moment before it
    // is gone.
    poll(&ended, 1, 20);
    throw PeerLostError("rank " + to_string(rank) + " (pid " + to_string(meeting_.seats[rank].pid) + ") " +
                        (ended.revents ? "ended" : "gave up") +
                        " while the ranks were joining; see what it said");
  }
}

std::string Join::missing_ranks() const {
  constexpr int kListed = 16;
  std::string ranks;
  int listed = 0;
  for (int rank = 0; rank < options_.size; ++rank) {
    if (meeting_.seats[rank].pidfd || ++listed > kListed) continue;
    ranks += (ranks.empty() ? "" : ", ") + to_string(rank);
  }
  return (missing_ == 1 ? "rank " : "ranks ") + ranks + (listed > kListed ? ", ..." : "");
}

void Join::send_members(int rank) {
  for (int first = 0; first < options_.size; first += kBatch) {
    Message message;
    message.kind = Kind::seats;
    message.first = first;
    message.count = std::min(kBatch, options_.size - first);
    std::vector<int> fds;
    if (first == 0) fds.push_back(meeting_.memory.get());
    for (int i = 0; i < message.count; ++i) {
      message.pids[i] = meeting_.seats[first + i].pid;
      const Seat& seat = meeting_.seats[first + i];
      fds.push_back(seat.pidfd.get());
      fds.push_back(&seat == &meeting_.seats[0] ? arena_ : seat.arena.get());
    }
    Io io;
    while ((io = send(connections_[rank], message, fds)) == Io::again) {
      if (late(kGrace))
        throw CommTimeoutError("rank " + to_string(rank) + " came but does not read: is it stopped?");
      pause(milliseconds(1));
    }
    if (io == Io::gone)
      throw PeerLostError("rank " + to_string(rank) + " (pid " + to_string(meeting_.seats[rank].pid) +
                          ") left while the ranks were joining; see what it said");
  }
}

void Join::tell_all(const Message& error) {
  // Unread hellos would turn the message into a reset connection.
  if (listener_) accept_guests();
  for (Fd& guest : guests_) {
    Message hello;
    std::vector<Fd> fds;
    try {
      if (guest) receive(guest, &hello, &fds);
    } catch (const CommError&) {  // of another version: it is told all the same
    }
    if (guest) send(guest, error, {});
  }
  for (const Fd& connection : connections_)
    if (connection) send(connection, error, {});
}

Meeting Join::host(Fd listener, Fd memory) {
  listener_ = std::move(listener);
  connections_.resize(options_.size);
  meeting_.memory = std::move(memory);
  meeting_.seats.resize(options_.size);
  meeting_.seats[0] = {getpid(), std::move(pidfd_), Fd()};
  missing_ = options_.size - 1;
  try {
    while (missing_ > 0) {
      watch();
      accept_guests();
      greet_guests();
      if (missing_ > 0 && late())
        throw CommTimeoutError(
            missing_ranks() + " of " + to_string(options_.size) + " did not join within " + elapsed() +
            ". Do all run on this machine, with one address and in one network namespace? Socket " + place());
    }
    listener_ = Fd();  // first: whoever is done may soon meet again under this name
    for (int rank = 1; rank < options_.size; ++rank) send_members(rank);
  } catch (const std::exception& error) {
    tell_all(error_message(error));
    throw;
  } catch (...) {
    tell_all(error_message(CommError("rank 0 was interrupted while the ranks were joining")));
    throw;
  }
  return std::move(meeting_);
}

}  // namespace

Meeting meet(const Node::Options& options, Fd memory) {
  Join join(options);
  for (milliseconds backoff{1};; backoff = std::min(2 * backoff, kTick)) {
    if (options.rank == 0)
      if (Fd listener = join.listen_as_host()) return join.host(std::move(listener), std::move(memory));
    // If rank 0 finds its name taken, it goes to the other rank 0 as well, and both are told that there are
    // two.
    if (const Fd host = join.connect_to_host()) return join.attend(host);
    if (join.late())
      throw CommTimeoutError(
          "rank 0 did not come within " + join.elapsed() + ", rank " + to_string(options.rank) +
          " waited for it at " + join.place() +
          ". Does it run on this machine, with the same address and in the same network namespace?");
    join.pause(backoff);
  }
}

}  // namespace pycomm::transport
