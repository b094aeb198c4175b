// The input of explore(): the program of every rank, written out as moves over the addresses of one flat
// memory that holds every buffer, window and cell.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "schedule/plan.h"

namespace explore {

using namespace pycomm;
using namespace pycomm::schedule;

struct Span {
  int64_t begin, end;
  bool write;
};

inline bool overlap(const Span& a, const Span& b) {
  return std::max(a.begin, b.begin) < std::min(a.end, b.end);
}

struct Move {
  enum class Kind : uint8_t {
    caller_writes,
    gate,
    meet,
    enter,
    combine,
    signal,
    wait,
    send,
    recv,
    complete,
    drain,
    caller_takes_back
  };
  Kind kind;
  int call = 0;
  std::vector<Span> spans;  // the memory that the move accesses
  const Step* step = nullptr;
  const Operand* operands = nullptr;
  int cell = 0;      // signal, wait; send, recv, complete: the channel
  int64_t word = 0;  // signal, wait (-1: for nothing); complete: how many messages, over all calls
  int64_t trip = 0;  // combine
  int asks = -1;     // combine: the rank whose entry says where its reachable input lies
  const Transcode* transcode = nullptr;
  std::vector<int> last_conflict;  // by rank: its last move that conflicts with this one, -1 if none
};

inline bool conflict(const Move& a, const Move& b) {
  for (const Span& x : a.spans) {
    for (const Span& y : b.spans) {
      if ((x.write || y.write) && overlap(x, y)) return true;
    }
  }
  return false;
}

struct Impossible {
  std::string why;
};

class Programs {
 protected:
  // Throws Impossible if a step refers to a buffer or cell that does not exist.
  explicit Programs(const std::vector<const Plan*>& calls) : calls_(calls), n_(calls[0]->call.world.size) {}
  void write_out();

  struct Place {
    int64_t in = 0, in_bytes = 0, out = 0, out_bytes = 0;  // addresses
  };

  static int64_t item(const Plan& plan) { return static_cast<int64_t>(size_of(plan.call.dtype)); }
  static int64_t partial(const Plan& plan) {
    return static_cast<int64_t>(size_of(accumulator(plan.call.dtype)));
  }
  static constexpr int64_t kTile = 1024;
  static int64_t tile(const Plan& plan) { return tile_bytes(plan.call.codec.kind); }
  static int64_t bytes_of(const Plan& plan, Format format, int64_t count) {
    if (format == Format::wire) return (count + kTile - 1) / kTile * tile(plan);
    return count * (format == Format::partial ? partial(plan) : item(plan));
  }
  static int64_t before(const Call& call, int block) {
    int64_t sum = 0;
    for (int b = 0; b < block; ++b) sum += call.counts[b];
    return sum;
  }

  const std::vector<const Plan*>& calls_;
  const int n_;
  int cells_per_pair_ = 1, channels_per_pair_ = 0;
  int64_t top_ = 0;                                         // bytes of the flat memory
  std::vector<int64_t> windows_;                            // rank * 2 + bank
  std::vector<int64_t> payloads_;                           // of the cells a rank reads: rank * 2 + bank
  std::vector<std::vector<Place>> places_;                  // by call and rank
  std::vector<std::vector<Move>> moves_;                    // by rank
  std::vector<std::vector<size_t>> came_;                   // by rank, call: its move that begins the call
  std::vector<std::vector<std::vector<int64_t>>> sent_by_;  // by rank, call, channel: sent before the call
  std::vector<std::vector<const Move*>> sends_;             // by channel, in the sender's order

 private:
  void lay_out();
  void write_out(int rank);
  Move write_out(int rank, int c, const Step& step, int64_t trip);
  Move write_out_message(int rank, int c, const Step& step, int64_t trip);
  void write_out_operands(int rank, const Step& step, int64_t trip, Move& move);
  void pair_messages();
  int channel(int from, int to, int index) const { return (from * n_ + to) * channels_per_pair_ + index; }

  std::vector<int64_t> sent_before_;  // by channel: messages of the calls before the one that is written out
};

}  // namespace explore
