#include "schedule/lower.h"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "common/error.h"
#include "common/hash.h"
#include "schedule/layout.h"

namespace pycomm::schedule {

namespace {

using Kind = ScheduleStep::Kind;

[[noreturn]] void malformed(int rank, int step, const std::string& what) {
  throw ValueError("schedule, rank " + std::to_string(rank) + ", step " + std::to_string(step) + ": " + what);
}

std::string words(const Ref& ref) {
  return std::string(name(ref.buffer)) + "@" + std::to_string(ref.rank) + " block " +
         std::to_string(ref.chunk.block) + " [" + std::to_string(ref.chunk.first) + ", " +
         std::to_string(ref.chunk.last) + ")/" + std::to_string(ref.chunk.of);
}

bool overlap(const Ref& a, const Ref& b) {
  return a.rank == b.rank && a.buffer == b.buffer && a.chunk.block == b.chunk.block &&
         int64_t{a.chunk.first} * b.chunk.of < int64_t{b.chunk.last} * a.chunk.of &&
         int64_t{b.chunk.first} * a.chunk.of < int64_t{a.chunk.last} * b.chunk.of;
}

// The index-th signal in a trip on a cell from one rank to another.
struct Event {
  int cell = 0;
  int index = 0;  // 0: none
};

// One offer with the combine that uses it and the accept that ends it.
struct Offer {
  int owner, peer;
  Ref ref;
  Ref from;         // what is shown: ref, or what ref is a copy of
  int step;         // owner's
  int use = -1;     // peer's combine
  int accept = -1;  // owner's
  bool read = false, written = false;
  bool rides = false;     // the chunk travels in its signal's cell
  bool copy = false;      // the offer copies the chunk into the window
  Event shown{}, done{};  // owner -> peer; peer -> owner
};

// A rank's schedule after matching: offers in a row to one peer share one signal.
struct Item {
  Kind kind;
  int step;
  std::vector<int> offers;
};

class Lowering {
 public:
  Lowering(const Schedule& schedule, const Call& call, const Geometry& geometry)
      : schedule_(schedule),
        call_(call),
        stream_bytes_(geometry.stream_bytes),
        n_(call.world.size),
        offers_of_(n_),
        items_(n_),
        waits_at_top_(n_),
        window_copies_(n_),
        idle_(n_),
        blocks_read_(n_),
        layout_(match(geometry)) {
    number_events();
    find_riders(geometry.payload_bytes);
    find_idle_copies();
    find_copies();
    find_reads();
  }

  Program emit(int rank) const;
  bool full_exchange() const;
  const Layout& layout() const { return layout_; }
  int cells() const { return schedule_.stages; }

 private:
  Layout match(const Geometry& geometry);
  void number_events();
  void find_riders(int64_t room);
  void find_idle_copies();
  void find_copies();
  void find_reads();

  bool staged(const Ref& ref) const {
    return (ref.buffer == Buffer::in && call_.in == Placement::plain) ||
           (ref.buffer == Buffer::out && call_.out == Placement::plain);
  }
  bool in_window(const Ref& ref) const {
    return ref.buffer == Buffer::image || ref.buffer == Buffer::scratch || staged(ref);
  }
  // A chunk in the window that is only read is safe until its slot is used again.
  bool deferred(const Offer& offer) const { return !offer.written && in_window(offer.ref); }
  bool needs_done(const Offer& offer) const { return !deferred(offer) || reuses_slots(); }
  bool reuses_slots() const { return layout_.ragged || layout_.trips > layout_.slots; }
  int per_trip(int from, int to, int cell) const {
    auto found = num_events_.find({from, to, cell});
    return found == num_events_.end() ? 0 : found->second;
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
  bool uses_image_ = false;
  int scratch_blocks_ = 0;
  std::vector<Offer> offers_;
  std::vector<std::map<int, std::vector<int>>> offers_of_;  // rank -> step -> offers made, used or accepted
  std::vector<std::vector<Item>> items_;
  std::vector<std::vector<int>> waits_at_top_;  // rank -> offers whose last readers free the slot
  std::vector<std::set<std::pair<int, int>>>
      window_copies_;                // rank -> (combine step, dst) also written to the window
  std::vector<std::set<int>> idle_;  // rank -> steps that need not be done
  std::vector<std::set<std::pair<Buffer, int>>> blocks_read_;  // rank -> its own `in` and `out` that are read
  std::map<std::tuple<int, int, int>, int> num_events_;        // (from, to, cell)
  Layout layout_;
};

// Pairs every offer with its use and its accept, and finds what windows must hold.
Layout Lowering::match(const Geometry& geometry) {
  if (static_cast<int>(schedule_.ranks.size()) != n_) {
    throw ValueError("the schedule has " + std::to_string(schedule_.ranks.size()) + " programs for " +
                     std::to_string(n_) + " ranks");
  }
  using Key = std::tuple<int, int, Buffer, int, int, int, int>;
  auto key = [](int peer, const Ref& r) {
    return Key{r.rank, peer, r.buffer, r.chunk.block, r.chunk.first, r.chunk.last, r.chunk.of};
  };
  std::map<Key, std::vector<int>> made;
  auto note = [&](const Ref& ref) {
    if (ref.buffer == Buffer::image) uses_image_ = true;
    if (ref.buffer == Buffer::scratch) scratch_blocks_ = std::max(scratch_blocks_, ref.chunk.block + 1);
  };
  auto check = [&](int rank, int step, const Ref& ref) {
    const Chunk& c = ref.chunk;
    if (ref.rank < 0 || ref.rank >= n_) malformed(rank, step, "there is no rank " + std::to_string(ref.rank));
    if (c.of < 1 || c.first < 0 || c.last < c.first || c.last > c.of || c.block < 0) {
      malformed(rank, step, "not a chunk: " + words(ref));
    }
    if (ref.buffer == Buffer::in || ref.buffer == Buffer::out) {
      block_offset(call_, ref.rank, ref.buffer, c.block);
    } else if (c.block >= (ref.buffer == Buffer::image ? num_blocks(call_.world) : 64)) {
      malformed(rank, step, "no such block: " + words(ref));
    }
  };
  for (int rank = 0; rank < n_; ++rank) {
    const auto& program = schedule_.ranks[rank];
    for (int i = 0; i < static_cast<int>(program.size()); ++i) {
      const ScheduleStep& step = program[i];
      for (const auto* refs : {&step.dsts, &step.srcs}) {
        for (const Ref& ref : *refs) {
          check(rank, i, ref);
          note(ref);
        }
      }
      if (step.kind != Kind::offer) continue;
      const Ref& ref = step.srcs[0];
      if (ref.rank != rank) malformed(rank, i, "offers what is not its own: " + words(ref));
      if (step.peer < 0 || step.peer >= n_ || step.peer == rank) {
        malformed(rank, i, "offers to rank " + std::to_string(step.peer));
      }
      if (staged(ref)) uses_image_ = true;
      const int id = static_cast<int>(offers_.size());
      offers_.push_back({.owner = rank, .peer = step.peer, .ref = ref, .from = ref, .step = i});
      made[key(step.peer, ref)].push_back(id);
      offers_of_[rank][i].push_back(id);
    }
  }
  std::map<Key, size_t> used, accepted;
  for (int rank = 0; rank < n_; ++rank) {
    const auto& program = schedule_.ranks[rank];
    for (int i = 0; i < static_cast<int>(program.size()); ++i) {
      const ScheduleStep& step = program[i];
      if (step.kind == Kind::accept) {
        const Key k = key(step.peer, step.srcs[0]);
        const size_t at = accepted[k]++;
        auto found = made.find(k);
        if (step.srcs[0].rank != rank || found == made.end() || at >= found->second.size() ||
            offers_[found->second[at]].step > i) {
          malformed(rank, i, "accepts what it has not offered: " + words(step.srcs[0]));
        }
        offers_[found->second[at]].accept = i;
        offers_of_[rank][i].push_back(found->second[at]);
      }
      if (step.kind != Kind::combine) continue;
      if (step.dsts.empty() || step.srcs.empty()) malformed(rank, i, "combines nothing");
      std::map<Key, int> here;
      auto use = [&](const Ref& ref, bool write) {
        if (ref.rank == rank) return;
        const Key k = key(rank, ref);
        auto known = here.find(k);
        if (known == here.end()) {
          const size_t at = used[k]++;
          auto found = made.find(k);
          if (found == made.end() || at >= found->second.size()) {
            malformed(rank, i,
                      "uses what rank " + std::to_string(ref.rank) + " has not offered: " + words(ref));
          }
          known = here.emplace(k, found->second[at]).first;
          offers_[known->second].use = i;
          offers_of_[rank][i].push_back(known->second);
        }
        (write ? offers_[known->second].written : offers_[known->second].read) = true;
      };
      for (const Ref& ref : step.srcs) use(ref, false);
      for (const Ref& ref : step.dsts) use(ref, true);
    }
  }
  for (const Offer& offer : offers_) {
    if (offer.use < 0) malformed(offer.owner, offer.step, "nobody uses the offer of " + words(offer.ref));
    if (offer.accept < 0) malformed(offer.owner, offer.step, "never accepts " + words(offer.ref));
  }
  return Layout(call_, schedule_, geometry, uses_image_, scratch_blocks_);
}

// How each staged chunk that is read comes into the window: at once with the combine that made it, by the
// peer that wrote it, by an earlier offer, or by a copy at the offer.
void Lowering::find_copies() {
  for (Offer& offer : offers_) {
    if (!offer.read || !staged(offer.ref) || offer.rides) continue;
    const auto& program = schedule_.ranks[offer.owner];
    offer.copy = true;
    for (int i = offer.step - 1; i >= 0; --i) {
      const ScheduleStep& step = program[i];
      if (step.kind == Kind::combine) {
        const auto written = std::find_if(step.dsts.begin(), step.dsts.end(),
                                          [&](const Ref& dst) { return overlap(dst, offer.ref); });
        if (written == step.dsts.end()) continue;
        if (*written == offer.ref) {
          window_copies_[offer.owner].insert({i, static_cast<int>(written - step.dsts.begin())});
          offer.copy = false;
        }
        break;
      }
      if (!overlap(step.srcs[0], offer.ref)) continue;
      const Offer& other = offers_[offers_of_[offer.owner].at(i).front()];
      const bool lands = step.kind == Kind::accept && other.written;
      const bool shows = step.kind == Kind::offer && other.read && !other.rides;
      if (lands || (shows && other.ref == offer.ref)) {
        offer.copy = !(other.ref == offer.ref);
        break;
      }
    }
  }
}

// What each rank's call reads of its own caller's memory, by itself or through peers.
void Lowering::find_reads() {
  for (int rank = 0; rank < n_; ++rank) {
    for (const ScheduleStep& step : schedule_.ranks[rank]) {
      if (step.kind != Kind::combine) continue;
      for (const Ref& src : step.srcs) {
        if (src.rank == rank) blocks_read_[rank].insert({src.buffer, src.chunk.block});
      }
    }
  }
  for (const Offer& offer : offers_) {
    if (offer.read && (offer.copy || offer.rides || !staged(offer.ref))) {
      blocks_read_[offer.owner].insert({offer.from.buffer, offer.from.chunk.block});
    }
  }
}

// Gives every signal its place in its cell's order, which is the same whatever trips are long or empty.
void Lowering::number_events() {
  for (int rank = 0; rank < n_; ++rank) {
    const auto& program = schedule_.ranks[rank];
    auto next = [&](int peer, int cell) { return Event{cell, ++num_events_[{rank, peer, cell}]}; };
    for (int i = 0; i < static_cast<int>(program.size());) {
      const ScheduleStep& step = program[i];
      if (step.kind != Kind::offer) {
        auto found = offers_of_[rank].find(i);
        Item item{step.kind, i, found == offers_of_[rank].end() ? std::vector<int>{} : found->second};
        if (step.kind == Kind::combine) {
          std::map<int, Event> done;
          for (int id : item.offers) {
            Offer& offer = offers_[id];
            if (!needs_done(offer)) continue;
            auto [entry, is_new] = done.try_emplace(offer.owner);
            if (is_new) entry->second = next(offer.owner, step.stage);
            offer.done = entry->second;
          }
        }
        items_[rank].push_back(std::move(item));
        ++i;
        continue;
      }
      std::vector<Item> groups;  // by peer, in order of appearance
      for (; i < static_cast<int>(program.size()) && program[i].kind == Kind::offer &&
             program[i].stage == step.stage;
           ++i) {
        const int id = offers_of_[rank].at(i).front();
        auto group = std::find_if(groups.begin(), groups.end(), [&](const Item& item) {
          return offers_[item.offers[0]].peer == offers_[id].peer;
        });
        if (group == groups.end()) group = groups.insert(groups.end(), Item{Kind::offer, i, {}});
        group->offers.push_back(id);
      }
      for (Item& group : groups) {
        const Event shown = next(offers_[group.offers[0]].peer, step.stage);
        for (int id : group.offers) offers_[id].shown = shown;
        items_[rank].push_back(std::move(group));
      }
    }
  }
  // A slot is free again when its readers of `slots` trips ago are done. Where an accept has waited for the
  // same or a later signal, that is known already.
  if (!reuses_slots()) return;
  std::map<std::tuple<int, int, int>, int> known;
  for (const Offer& offer : offers_) {
    if (deferred(offer)) continue;
    int& index = known[{offer.owner, offer.peer, offer.done.cell}];
    index = std::max(index, offer.done.index);
  }
  for (int id = 0; id < static_cast<int>(offers_.size()); ++id) {
    const Offer& offer = offers_[id];
    if (deferred(offer) && known[{offer.owner, offer.peer, offer.done.cell}] < offer.done.index) {
      waits_at_top_[offer.owner].push_back(id);
    }
  }
}

// A chunk that its owner would show in the window rides with the signal instead if it fits, and if the cell
// has no other signal in the call, which would write over it.
void Lowering::find_riders(int64_t room) {
  if (reuses_slots() || layout_.trips > 1) return;
  std::map<std::tuple<int, int, int>, int> offers;  // (owner, peer, cell)
  for (const Offer& offer : offers_) ++offers[{offer.owner, offer.peer, offer.shown.cell}];
  for (Offer& offer : offers_) {
    const int64_t item = offer.ref.buffer == Buffer::scratch ? layout_.partial_item : layout_.item;
    const int64_t bytes = length_of(offer.ref, 0) * item;
    offer.rides = offer.read && deferred(offer) && bytes <= room &&
                  offers[{offer.owner, offer.peer, offer.shown.cell}] == 1 &&
                  per_trip(offer.owner, offer.peer, offer.shown.cell) == 1;
  }
}

// A copy to the image right before the offers that show it is left out if all of these ride: they take the
// source.
void Lowering::find_idle_copies() {
  for (int rank = 0; rank < n_; ++rank) {
    const auto& program = schedule_.ranks[rank];
    for (int i = 0; i < static_cast<int>(program.size()); ++i) {
      const ScheduleStep& step = program[i];
      if (step.kind != Kind::combine || step.final || step.srcs.size() != 1 || step.dsts.size() != 1)
        continue;
      const Ref &image = step.dsts[0], &source = step.srcs[0];
      if (image.rank != rank || image.buffer != Buffer::image || source.rank != rank ||
          source.buffer != Buffer::in) {
        continue;
      }
      std::vector<int> riders;
      int next = i + 1;
      for (; next < static_cast<int>(program.size()) && program[next].kind == Kind::offer; ++next) {
        const int id = offers_of_[rank].at(next).front();
        if (offers_[id].rides && offers_[id].ref == image) riders.push_back(id);
      }
      const auto uses = [&](const ScheduleStep& other) {
        return (other.kind == Kind::combine || other.kind == Kind::offer) &&
               std::ranges::any_of(other.srcs, [&](const Ref& ref) { return overlap(ref, image); });
      };
      const auto num_uses = std::ranges::count_if(program, uses);
      if (riders.empty() || num_uses != static_cast<std::ptrdiff_t>(riders.size())) continue;
      for (int id : riders) offers_[id].from = source;
      idle_[rank].insert(i);
    }
  }
}

// Writes one rank's steps for the trips of one loop: within them all lengths are the same.
class Emitter {
 public:
  Emitter(const Lowering& lowering, int rank, int64_t trip, Program& program)
      : l_(lowering), rank_(rank), trip_(trip), program_(program) {}

  void run() {
    for (int id : l_.waits_at_top_[rank_]) {
      const Offer& offer = l_.offers_[id];
      if (alive(offer)) {
        wait(offer.peer, offer.done, 0, -l_.layout_.slots * l_.per_trip(offer.peer, rank_, offer.done.cell));
      }
    }
    for (const Item& item : l_.items_[rank_]) {
      const ScheduleStep& step = l_.schedule_.ranks[rank_][item.step];
      switch (item.kind) {
        case Kind::offer:
          show(item, step.stage);
          break;
        case Kind::combine:
          if (!l_.idle_[rank_].contains(item.step)) combine(item, step);
          break;
        case Kind::accept:
          accept(l_.offers_[item.offers[0]], step.stage);
          break;
      }
    }
  }

 private:
  // Ragged trips beyond the first leave out the pairs that have nothing more to exchange.
  bool alive(const Offer& offer) const {
    return !l_.layout_.ragged || trip_ == 0 || l_.length_of(offer.ref, trip_) > 0;
  }

  void signal(int peer, Event event, int stage) {
    push({.kind = Step::Kind::signal,
          .stage = static_cast<uint8_t>(stage),
          .cell = static_cast<uint8_t>(event.cell),
          .peer = peer,
          .value = event.index,
          .per_trip = l_.per_trip(rank_, peer, event.cell)});
  }

  void wait(int peer, Event event, int stage, int64_t shift = 0) {
    int64_t& reached = reached_.try_emplace({peer, event.cell, stage}, INT64_MIN).first->second;
    if (reached >= event.index + shift) return;
    reached = event.index + shift;
    push({.kind = Step::Kind::wait,
          .stage = static_cast<uint8_t>(stage),
          .cell = static_cast<uint8_t>(event.cell),
          .peer = peer,
          .value = reached,
          .per_trip = l_.per_trip(peer, rank_, event.cell)});
  }

  void push(const Step& step) { program_.steps.push_back(step); }

  static Format format_of(const Ref& ref) {
    return ref.buffer == Buffer::scratch ? Format::partial : Format::raw;
  }

  Operand operand(const Ref& ref, bool window, Format format) const {
    const int64_t block = block_length(l_.call_, ref.rank, ref.buffer, ref.chunk.block);
    const Layout& layout = l_.layout_;
    const int64_t begin = layout.chunk_range(ref.chunk, layout.trip_length(block, trip_)).begin;
    if (ref.buffer == Buffer::scratch) {
      return {Space::window, format, ref.rank, layout.scratch_bytes(ref.chunk.block, begin), 0};
    }
    if (window || ref.buffer == Buffer::image) {
      return {Space::window, format, ref.rank, layout.image_bytes(ref.chunk.block, begin), 0};
    }
    const int64_t base = block_offset(l_.call_, ref.rank, ref.buffer, ref.chunk.block);
    return {ref.buffer == Buffer::in ? Space::in : Space::out, format, ref.rank, (base + begin) * layout.item,
            layout.trips > 1 || layout.ragged ? layout.width * layout.item : 0};
  }

  void move(const Operand& dst, const Operand& src, int64_t count, int stage, bool stream) {
    emit({dst}, {src}, count, stage, stream);
  }

  void emit(const std::vector<Operand>& dsts, const std::vector<Operand>& srcs, int64_t count, int stage,
            bool stream) {
    if (count == 0) return;
    push({.kind = Step::Kind::combine,
          .stage = static_cast<uint8_t>(stage),
          .stream = stream,
          .dst_format = dsts[0].format,
          .num_dsts = static_cast<int32_t>(dsts.size()),
          .num_srcs = static_cast<int32_t>(srcs.size()),
          .operand = static_cast<int32_t>(program_.operands.size()),
          .count = count});
    program_.operands.insert(program_.operands.end(), dsts.begin(), dsts.end());
    program_.operands.insert(program_.operands.end(), srcs.begin(), srcs.end());
  }

  // Stores to the caller's `out` go past the cache where it is large and neither was nor will be read by this
  // call.
  bool streams(const Ref& out) const {
    const auto& read = l_.blocks_read_[rank_];
    return out_elements(l_.call_, rank_) * l_.layout_.item >= l_.stream_bytes_ &&
           !read.count({Buffer::out, out.chunk.block}) &&
           !(l_.call_.in_place && read.count({Buffer::in, out.chunk.block}));
  }

  void show(const Item& item, int stage) {
    bool any = false;
    for (int id : item.offers) {
      const Offer& offer = l_.offers_[id];
      if (!alive(offer)) continue;
      any = true;
      if (offer.rides) {
        const Operand from = operand(offer.from, false, format_of(offer.ref));
        move({Space::outgoing, from.format, offer.peer, offer.shown.cell * kCellBytes}, from,
             l_.length_of(offer.ref, trip_), stage, false);
      } else if (offer.copy) {
        move(operand(offer.ref, true, Format::raw), operand(offer.ref, false, Format::raw),
             l_.length_of(offer.ref, trip_), stage, false);
      }
    }
    const Offer& first = l_.offers_[item.offers[0]];
    if (any) signal(first.peer, first.shown, stage);
  }

  void accept(const Offer& offer, int stage) {
    if (l_.deferred(offer) || !alive(offer)) return;
    wait(offer.peer, offer.done, stage);
    if (offer.written && l_.staged(offer.ref)) {
      move(operand(offer.ref, false, Format::raw), operand(offer.ref, true, Format::raw),
           l_.length_of(offer.ref, trip_), stage, streams(offer.ref));
    }
  }

  void combine(const Item& item, const ScheduleStep& step) {
    std::map<int, Event> shown, done;  // by peer: the last signal to wait for, the one to give
    for (int id : item.offers) {
      const Offer& offer = l_.offers_[id];
      if (!alive(offer)) continue;
      Event& last = shown[offer.owner];
      if (offer.shown.index > last.index) last = offer.shown;
      if (offer.done.index) done[offer.owner] = offer.done;
    }
    for (const auto& [peer, event] : shown) wait(peer, event, step.stage);

    const int64_t count = l_.length_of(step.dsts[0], trip_);
    const bool is_copy = !step.final && step.srcs.size() == 1 &&
                         (step.dsts[0].buffer == Buffer::scratch) == (step.srcs[0].buffer == Buffer::scratch);
    auto check = [&](const Ref& ref) {
      if (l_.length_of(ref, trip_) == count) return;
      malformed(rank_, item.step, words(ref) + " is not as long as " + words(step.dsts[0]));
    };
    std::vector<Operand> dsts, srcs;
    bool to_user = true;
    for (int d = 0; d < static_cast<int>(step.dsts.size()); ++d) {
      const Ref& ref = step.dsts[d];
      check(ref);
      const bool partial = ref.buffer == Buffer::scratch;
      if (ref.buffer == Buffer::in) malformed(rank_, item.step, "writes " + words(ref));
      if (!is_copy && partial == step.final) {
        malformed(rank_, item.step,
                  step.final ? "a final result cannot go to scratch"
                             : "a partial result can go to scratch only: " + words(ref));
      }
      const Format format = step.final ? Format::final : partial ? Format::partial : Format::raw;
      const bool window = l_.in_window(ref) && ref.rank != rank_;
      // In place, a rank's `out` holds what its `in` does.
      const bool there = l_.call_.in_place && is_copy && ref == Ref{rank_, Buffer::out, step.srcs[0].chunk} &&
                         step.srcs[0] == Ref{rank_, Buffer::in, ref.chunk};
      if (!there) dsts.push_back(operand(ref, window, format));
      to_user = to_user && !there && dsts.back().space == Space::out;
      if (l_.window_copies_[rank_].count({item.step, d})) {
        dsts.push_back(operand(ref, true, format));
        to_user = false;
      }
    }
    for (const Ref& ref : step.srcs) {
      check(ref);
      if (!is_copy && ref.buffer == Buffer::out) malformed(rank_, item.step, "reduces " + words(ref));
      const auto rider = std::find_if(item.offers.begin(), item.offers.end(), [&](int id) {
        return l_.offers_[id].rides && l_.offers_[id].ref == ref;
      });
      if (rider != item.offers.end()) {
        srcs.push_back(
            {Space::incoming, format_of(ref), ref.rank, l_.offers_[*rider].shown.cell * kCellBytes});
      } else {
        srcs.push_back(operand(ref, l_.in_window(ref) && ref.rank != rank_, format_of(ref)));
      }
    }
    if (!dsts.empty()) emit(dsts, srcs, count, step.stage, to_user && streams(step.dsts[0]));
    for (const auto& [peer, event] : done) signal(peer, event, step.stage);
  }

  const Lowering& l_;
  const int rank_;
  const int64_t trip_;
  Program& program_;
  std::map<std::tuple<int, int, int>, int64_t> reached_;  // (peer, cell, stage): what has been waited for
};

Program Lowering::emit(int rank) const {
  // Lengths change only where some block that this rank touches has its last full trip or its tail.
  std::set<int64_t> cuts = {0};
  auto cut = [&](int64_t length) {
    if (layout_.width == 0) return;
    cuts.insert(length / layout_.width);
    cuts.insert((length + layout_.width - 1) / layout_.width);
  };
  if (layout_.ragged) {
    for (int peer = 0; peer < n_; ++peer) {
      cut(call_.counts[rank * n_ + peer]);
      cut(call_.counts[peer * n_ + rank]);
    }
  } else {
    for (int64_t count : call_.counts) cut(count);
  }
  if (layout_.ragged || layout_.trips == 1) cuts.insert(1);
  Program program;
  for (auto at = cuts.begin(); std::next(at) != cuts.end(); ++at) {
    Loop loop{.first = *at,
              .trips = *std::next(at) - *at,
              .step = static_cast<int32_t>(program.steps.size()),
              .stages = schedule_.stages};
    Emitter(*this, rank, *at, program).run();
    loop.num_steps = static_cast<int32_t>(program.steps.size()) - loop.step;
    program.loops.push_back(loop);
  }
  return program;
}

// Follows the first trip's signals: who has heard, through whom, that whom has entered.
bool Lowering::full_exchange() const {
  std::vector<std::vector<bool>> heard(n_, std::vector<bool>(n_, false));
  std::map<std::tuple<int, int, int, int>, std::vector<bool>> sent;  // (from, to, cell, index)
  struct Cursor {
    int stage = 0;
    size_t item = 0;
  };
  std::vector<Cursor> cursors(n_);
  for (int rank = 0; rank < n_; ++rank) heard[rank][rank] = true;

  auto hear = [&](int rank, int peer, Event event) {
    auto found = sent.find({peer, rank, event.cell, event.index});
    if (found == sent.end()) return false;
    for (int r = 0; r < n_; ++r) heard[rank][r] = heard[rank][r] || found->second[r];
    return true;
  };
  auto step = [&](int rank, const Item& item) {  // false: must wait
    for (int id : item.offers) {
      const Offer& offer = offers_[id];
      if (item.kind == Kind::combine && !hear(rank, offer.owner, offer.shown)) return false;
      if (item.kind == Kind::accept && !deferred(offer) && !hear(rank, offer.peer, offer.done)) return false;
    }
    for (int id : item.offers) {
      const Offer& offer = offers_[id];
      if (item.kind == Kind::offer)
        sent[{rank, offer.peer, offer.shown.cell, offer.shown.index}] = heard[rank];
      if (item.kind == Kind::combine && offer.done.index) {
        sent[{rank, offer.owner, offer.done.cell, offer.done.index}] = heard[rank];
      }
    }
    return true;
  };
  for (bool moved = true; moved;) {
    moved = false;
    for (int rank = 0; rank < n_; ++rank) {
      Cursor& at = cursors[rank];
      while (at.stage < schedule_.stages) {
        if (at.item == items_[rank].size()) {
          at = {at.stage + 1, 0};
          continue;
        }
        const Item& item = items_[rank][at.item];
        if (schedule_.ranks[rank][item.step].stage == at.stage && !step(rank, item)) break;
        ++at.item;
        moved = true;
      }
    }
  }
  return std::all_of(heard.begin(), heard.end(), [](const std::vector<bool>& ranks) {
    return std::all_of(ranks.begin(), ranks.end(), [](bool known) { return known; });
  });
}

// What a reachable `in` is good for.
bool only_copies_in(const Schedule& schedule) {
  bool offers = false;
  for (size_t rank = 0; rank < schedule.ranks.size(); ++rank) {
    const auto own = [&](const Ref& ref) { return ref.rank == static_cast<int>(rank); };
    for (const ScheduleStep& step : schedule.ranks[rank]) {
      if (step.kind == Kind::offer) {
        if (step.srcs[0].buffer != Buffer::in) return false;
        offers = true;
      }
      if (step.kind != Kind::combine) continue;
      if (std::all_of(step.dsts.begin(), step.dsts.end(), own) &&
          std::all_of(step.srcs.begin(), step.srcs.end(), own)) {
        continue;
      }
      const bool bare = !step.final && step.dsts.size() == 1 && step.srcs.size() == 1 && own(step.dsts[0]) &&
                        step.dsts[0].buffer == Buffer::out;
      if (!bare) return false;
    }
  }
  return offers;
}

uint64_t fingerprint_of(const Plan& plan, const Schedule& schedule, const Layout& layout) {
  Hasher h;
  const Call& call = plan.call;
  h.add(static_cast<int>(call.world.collective));
  for (int v : {call.world.size, call.world.root, call.world.peer}) h.add(v);
  h.add(static_cast<int>(call.dtype));
  h.add(static_cast<int>(call.op));
  if (!layout.ragged) {
    for (int64_t count : call.counts) h.add(count);
  }
  h.add(static_cast<int>(call.in));
  h.add(static_cast<int>(call.out));
  h.add(layout.ragged);
  h.add(call.prescale).add(plan.algorithm);
  for (int64_t v : {layout.width, int64_t{plan.slots}, plan.slot_bytes, int64_t{plan.cells}}) h.add(v);
  // Of the steps too: users may have written two algorithms of one name.
  for (const std::vector<ScheduleStep>& program : schedule.ranks) {
    h.add(program.size());
    for (const ScheduleStep& step : program) {
      h.add(step.kind).add(step.stage).add(step.final).add(step.peer).add(step.dsts.size());
      for (const std::vector<Ref>& refs : {step.dsts, step.srcs}) {
        for (const Ref& ref : refs) {
          h.add(ref.rank).add(ref.buffer);
          h.add(ref.chunk.block).add(ref.chunk.first).add(ref.chunk.last).add(ref.chunk.of);
        }
      }
    }
  }
  return h.digest() | 1;  // 0 means "nothing yet" in a cell
}

}  // namespace

Plan lower(const Schedule& schedule, const std::string& algorithm, const Call& asked,
           const Geometry& geometry, int only_rank) {
  Call call = asked;
  if (call.out == Placement::reachable) throw ValueError("`out` cannot be reachable: peers may only read it");
  if (call.in == Placement::reachable && !only_copies_in(schedule)) call.in = Placement::plain;
  if (schedule.stages > geometry.max_cells) {
    throw ValueError("the schedule uses " + std::to_string(schedule.stages) +
                     " stages; there are cells for " + std::to_string(geometry.max_cells));
  }
  const Lowering lowering(schedule, call, geometry);
  const Layout& layout = lowering.layout();
  Plan plan;
  plan.call = call;
  plan.algorithm = algorithm;
  plan.cells = lowering.cells();
  plan.slots = layout.slots;
  plan.slot_bytes = layout.slot_bytes;
  plan.bank_bytes = layout.slots * layout.slot_bytes;
  plan.divisor = call.op == Op::avg ? call.world.size : 1.0;
  plan.full_exchange = lowering.full_exchange();
  plan.programs.resize(call.world.size);
  for (int rank = 0; rank < call.world.size; ++rank) {
    if (only_rank < 0 || rank == only_rank) plan.programs[rank] = lowering.emit(rank);
  }
  plan.fingerprint = fingerprint_of(plan, schedule, layout);
  return plan;
}

Plan make_plan(const std::string& algorithm, const Call& call, const Geometry& geometry, int only_rank) {
  const Algorithm& chosen = find_algorithm(call.world.collective, algorithm);
  return lower(chosen.write(call.world), algorithm, call, geometry, only_rank);
}

}  // namespace pycomm::schedule
