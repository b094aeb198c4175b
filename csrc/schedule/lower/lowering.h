// The second part of lower(): how each offered chunk crosses, where it lies in the window, and the place of
// every signal and message in the order of its cell or channel. Private to lower.cc, lowering.cc, encodes.cc
// and emit*.cc.
#pragma once

#include <algorithm>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "schedule/lower/layout.h"
#include "schedule/lower/match.h"

namespace pycomm::schedule {

// A message: the chunk of an offer, to the peer that reads it, or what that peer has written, back to the
// owner. Blocks that lie side by side in the window and are offered in a row make one message.
struct Message {
  std::vector<int> offers;
  bool written;
  int64_t mail;  // where its receiver keeps it, in the mail of a slot
};

// A chunk that a rank encodes to send it across message links. (Only with a codec on message links alone: a
// codec on all links leaves wire form in the windows, from where it is sent.)
struct Encoded {
  Ref ref;
  int step;   // the first offer of it, which encodes
  int maker;  // the last step before that which wrote the chunk; -1: none
  uint8_t turn = 0;
  int64_t mail = 0;  // where it lies
};

// What a rank does next: a combine, an accept, or offers in a row to one peer, which share one signal.
struct Item {
  ScheduleStep::Kind kind;
  int step;
  std::vector<int> offers;
};

class Lowering {
 public:
  Lowering(const Schedule& schedule, const Call& call, const Geometry& geometry)
      : Lowering(schedule, call, geometry, match(schedule, call)) {}

  Program emit(int rank) const;
  bool full_exchange() const;
  bool encodes_once() const { return encodes_once_; }
  const Layout& layout() const { return layout_; }
  int cells() const { return schedule_.stages; }
  int64_t most_signals() const;  // in a cell, in a call
  int channels() const { return has_messages_ ? schedule_.stages * schedule_.stages : 0; }

 private:
  Lowering(const Schedule& schedule, const Call& call, const Geometry& geometry, Matches matches)
      : schedule_(schedule),
        call_(call),
        stream_bytes_(geometry.stream_bytes),
        n_(call.world.size),
        offers_(std::move(matches.offers)),
        offers_of_(std::move(matches.at_step)),
        items_(n_),
        waits_at_top_(n_),
        encoded_(n_),
        window_copies_(n_),
        idle_(n_),
        encode_turns_(n_),
        blocks_read_(n_),
        num_events_(static_cast<size_t>(n_) * n_),
        messages_(static_cast<size_t>(n_) * n_),
        outboxes_(n_),
        layout_(make_layout(geometry)) {
    number_events();
    place_mail();
    find_riders(geometry.payload_bytes);
    find_idle_copies();
    find_copies();
    find_encodes();
    find_reads();
  }

  Layout make_layout(const Geometry& geometry);
  void find_encoded();
  Layout::Mail mail() const;
  void number_events();
  bool adjoins(const Offer& offer, const Offer& next) const;
  Event number_message(int from, int to, int offer, bool written, int receiver_stage);
  void place_mail();
  void find_riders(int64_t room);
  void find_idle_copies();
  void find_copies();
  bool comes_with_earlier_steps(const Offer& offer);
  void find_encodes();
  void find_encodes_for_messages();
  void find_reads();

  // Whether the chunk crosses as a message, not through memory that both ranks map.
  bool crosses(const Offer& offer) const { return !call_.world.mapped(offer.owner, offer.peer); }
  int stage_of(int rank, int step) const { return schedule_.ranks[rank][step].stage; }
  bool staged(const Ref& ref) const {
    return (ref.buffer == Buffer::in && call_.in == Placement::plain) ||
           (ref.buffer == Buffer::out && call_.out == Placement::plain);
  }
  bool in_window(const Ref& ref) const {
    return ref.buffer == Buffer::image || ref.buffer == Buffer::scratch || staged(ref);
  }
  // What a rank offers of its caller's buffers before it has touched anything: where the ranks have told each
  // other of these, each knows already that it may use them. (Where a reachable input lies it does not know.)
  bool known(int rank, const Offer& offer) const {
    const auto& program = schedule_.ranks[rank];
    const bool reachable = offer.ref.buffer == Buffer::in && call_.in == Placement::reachable;
    return call_.told() && !reachable && !in_window(offer.ref) && !crosses(offer) &&
           std::all_of(program.begin(), program.begin() + offer.step,
                       [](const ScheduleStep& step) { return step.kind == ScheduleStep::Kind::offer; });
  }
  // Whether the accept waits for nothing: a chunk in the window that is only read stays as it is until the
  // slot is used again.
  bool deferred(const Offer& offer) const { return !offer.written && in_window(offer.ref); }
  bool needs_done(const Offer& offer) const { return !deferred(offer) || reuses_slots(); }
  bool reuses_slots() const { return layout_.ragged || layout_.trips > layout_.slots; }
  int per_trip(int from, int to, int cell) const {
    const std::vector<int>& cells = num_events_[from * n_ + to];
    return cell < static_cast<int>(cells.size()) ? cells[cell] : 0;
  }
  int64_t length_of(const Ref& ref, int64_t trip) const {
    const int64_t block = block_length(call_, ref.rank, ref.buffer, ref.chunk.block);
    return layout_.chunk_range(ref.chunk, layout_.trip_length(block, trip)).size();
  }

  friend class Emitter;
  const Schedule& schedule_;
  const Call& call_;
  const int64_t stream_bytes_;
  const int n_;
  std::vector<Offer> offers_;
  std::vector<std::vector<std::vector<int>>> offers_of_;  // rank -> step -> offers made, used or accepted
  std::vector<std::vector<Item>> items_;
  std::vector<std::vector<int>> waits_at_top_;  // rank -> offers whose last readers free the slot
  std::vector<std::vector<Encoded>> encoded_;   // by rank
  std::vector<std::set<std::pair<int, int>>>
      window_copies_;                // rank -> (combine step, dst) that is written to the window as well
  std::vector<std::set<int>> idle_;  // rank -> steps that are left out
  std::vector<std::map<int, uint8_t>> encode_turns_;  // rank -> combines that encode, and their turns
  bool encodes_once_ = true;
  std::vector<std::set<std::pair<Buffer, int>>> blocks_read_;  // rank -> blocks of its own that are read
  std::vector<std::vector<int>> num_events_;                   // from * ranks + to -> cell -> signals
  bool has_messages_ = false;
  std::vector<std::map<int, std::vector<Message>>> messages_;  // from * ranks + to -> channel -> in order
  std::vector<std::map<int, int64_t>> outboxes_;  // rank -> combine whose result is sent -> where in the mail
  Layout layout_;
};

}  // namespace pycomm::schedule
