#include "schedule/lower/lowering.h"

#include <algorithm>
#include <tuple>

namespace pycomm::schedule {

namespace {
using Kind = ScheduleStep::Kind;
}  // namespace

// What the window must hold: the image (as large as the data, if it is used at all), scratch, and mail.
Layout Lowering::make_layout(const Geometry& geometry) {
  has_messages_ = std::ranges::any_of(offers_, [&](const Offer& offer) { return crosses(offer); });
  find_encoded();
  int image_blocks = 0, scratch_blocks = 0;
  const auto need_image = [&](int blocks) {
    image_blocks = std::max({image_blocks, num_blocks(call_.world), blocks});
  };
  for (const std::vector<ScheduleStep>& program : schedule_.ranks) {
    for (const ScheduleStep& step : program) {
      for (const std::vector<Ref>* refs : {&step.dsts, &step.srcs}) {
        for (const Ref& ref : *refs) {
          if (ref.buffer == Buffer::image) need_image(ref.chunk.block + 1);
          if (ref.buffer == Buffer::scratch) scratch_blocks = std::max(scratch_blocks, ref.chunk.block + 1);
        }
      }
    }
  }
  if (std::ranges::any_of(offers_, [&](const Offer& offer) { return staged(offer.ref); })) need_image(0);
  return Layout(call_, schedule_, geometry, image_blocks, scratch_blocks, mail());
}

// A receiver keeps each message until the step that needs it. A sender keeps each result that it cannot store
// at its reader but sends, and what it has encoded for messages.
Layout::Mail Lowering::mail() const {
  std::vector<Layout::Mail> mail(n_);
  std::vector<std::set<int>> sent(n_);
  const auto add = [&](int rank, const Chunk& chunk) {
    ++mail[rank].chunks;
    mail[rank].blocks += static_cast<double>(chunk.last - chunk.first) / chunk.of;
  };
  for (const Offer& offer : offers_) {
    if (!crosses(offer)) continue;
    if (offer.read) add(offer.peer, offer.ref.chunk);
    if (offer.written) add(offer.owner, offer.ref.chunk);
    if (offer.written && sent[offer.peer].insert(offer.use).second) add(offer.peer, offer.ref.chunk);
  }
  for (int rank = 0; rank < n_; ++rank) {
    for (const Encoded& encoded : encoded_[rank]) add(rank, encoded.ref.chunk);
  }
  Layout::Mail most;
  for (const Layout::Mail& one : mail) {
    most = {std::max(most.chunks, one.chunks), std::max(most.blocks, one.blocks)};
  }
  return most;
}

void Lowering::place_mail() {
  std::vector<int64_t> used(n_, 0);
  const auto place = [&](int rank, const Chunk& chunk) {
    return std::exchange(used[rank], used[rank] + layout_.mail_bytes(chunk));
  };
  for (int rank = 0; rank < n_; ++rank) {
    for (Encoded& encoded : encoded_[rank]) encoded.mail = place(rank, encoded.ref.chunk);
  }
  for (int from = 0; from < n_; ++from) {
    for (int to = 0; to < n_; ++to) {
      for (auto& [channel, messages] : messages_[from * n_ + to]) {
        for (Message& message : messages) {
          message.mail = used[to];
          for (const int id : message.offers) place(to, offers_[id].ref.chunk);
          const Offer& offer = offers_[message.offers[0]];
          if (message.written && !outboxes_[from].contains(offer.use)) {
            outboxes_[from][offer.use] = place(from, offer.ref.chunk);
          }
        }
      }
    }
  }
}

// Decides how each staged chunk that is read comes into the window: the combines that make it, or the peers
// that write it, store it there as well; or an earlier offer has copied it; or this offer copies it.
void Lowering::find_copies() {
  for (Offer& offer : offers_) {
    if (!offer.read || !staged(offer.ref) || offer.rides) continue;
    if (call_.coded_on(Links::wire) && crosses(offer)) continue;
    offer.copy = !comes_with_earlier_steps(offer);
  }
}

// Looks back for steps that can bring all parts of the chunk to the window. If there are, makes them do so.
bool Lowering::comes_with_earlier_steps(const Offer& offer) {
  const auto& program = schedule_.ranks[offer.owner];
  const Chunk& chunk = offer.ref.chunk;
  std::vector<bool> there(chunk.last - chunk.first);
  // Whether the whole of `part` belongs to the chunk: then it is there.
  const auto take = [&](const Ref& part) {
    const bool within = part == offer.ref || (part.chunk.of == chunk.of && part.chunk.first >= chunk.first &&
                                              part.chunk.last <= chunk.last);
    if (within) {
      std::fill(there.begin() + (part.chunk.first - chunk.first),
                there.begin() + (part.chunk.last - chunk.first), true);
    }
    return within;
  };
  std::vector<std::pair<int, int>> copies;  // of combines
  std::vector<int> landings;                // of what peers sent
  for (int i = offer.step - 1; i >= 0 && std::ranges::find(there, false) != there.end(); --i) {
    const ScheduleStep& step = program[i];
    if (step.kind == Kind::combine) {
      for (size_t d = 0; d < step.dsts.size(); ++d) {
        if (!overlap(step.dsts[d], offer.ref)) continue;
        if (!take(step.dsts[d])) return false;
        copies.emplace_back(i, static_cast<int>(d));
      }
      continue;
    }
    if (!overlap(step.srcs[0], offer.ref)) continue;
    const int id = offers_of_[offer.owner][i].front();
    const Offer& other = offers_[id];
    const bool crosses_encoded = call_.coded_on(Links::wire) && crosses(other);
    const bool lands = step.kind == Kind::accept && other.written;
    const bool shows = step.kind == Kind::offer && other.read && !other.rides && !crosses_encoded;
    if (lands && !take(other.ref)) return false;
    if (lands) landings.push_back(id);
    if (shows && other.ref == offer.ref) take(other.ref);
  }
  if (std::ranges::find(there, false) != there.end()) return false;
  window_copies_[offer.owner].insert(copies.begin(), copies.end());
  for (const int id : landings) offers_[id].kept = true;
  return true;
}

// Finds which blocks of a rank's own `in` and `out` are read, by itself or by peers.
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
    if (offer.read && (offer.copy || offer.rides || offer.encoded >= 0 || !staged(offer.ref))) {
      blocks_read_[offer.owner].insert({offer.from.buffer, offer.from.chunk.block});
    }
  }
}

// Numbers the signals of each cell and the messages of each channel, in a trip. The numbers are the same for
// trips of all lengths, also where nothing is left to exchange.
void Lowering::number_events() {
  for (int rank = 0; rank < n_; ++rank) {
    const auto& program = schedule_.ranks[rank];
    auto next = [&](int peer, int cell) {
      std::vector<int>& cells = num_events_[rank * n_ + peer];
      if (cell >= static_cast<int>(cells.size())) cells.resize(cell + 1);
      return Event{cell, ++cells[cell]};
    };
    for (int i = 0; i < static_cast<int>(program.size());) {
      const ScheduleStep& step = program[i];
      if (step.kind != Kind::offer) {
        Item item{step.kind, i, offers_of_[rank][i]};
        if (step.kind == Kind::combine) {
          for (size_t at = 0; at < item.offers.size(); ++at) {
            Offer& offer = offers_[item.offers[at]];
            if (crosses(offer)) {
              if (offer.written) {
                offer.done = number_message(rank, offer.owner, item.offers[at], true,
                                            stage_of(offer.owner, offer.accept));
              }
              continue;
            }
            if (!needs_done(offer)) continue;
            const auto before = std::find_if(item.offers.begin(), item.offers.begin() + at, [&](int id) {
              return offers_[id].owner == offer.owner && offers_[id].done.index;
            });
            const bool first = before == item.offers.begin() + at;
            offer.done = first ? next(offer.owner, step.stage) : offers_[*before].done;
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
        const int id = offers_of_[rank][i].front();
        auto group = std::find_if(groups.begin(), groups.end(), [&](const Item& item) {
          return offers_[item.offers[0]].peer == offers_[id].peer;
        });
        if (group == groups.end()) group = groups.insert(groups.end(), Item{Kind::offer, i, {}});
        group->offers.push_back(id);
      }
      for (Item& group : groups) {
        const int peer = offers_[group.offers[0]].peer;
        if (std::ranges::all_of(group.offers, [&](int id) { return known(rank, offers_[id]); })) {
          // no signal
        } else if (call_.world.mapped(rank, peer)) {
          const Event shown = next(peer, step.stage);
          for (int id : group.offers) offers_[id].shown = shown;
        } else {
          for (size_t at = 0; at < group.offers.size(); ++at) {
            const int id = group.offers[at];
            Offer& offer = offers_[id];
            if (!offer.read) continue;
            const Offer* before = at > 0 ? &offers_[group.offers[at - 1]] : nullptr;
            if (before && adjoins(*before, offer)) {
              offer.shown = before->shown;
              messages_[rank * n_ + peer][offer.shown.cell].back().offers.push_back(id);
            } else {
              offer.shown = number_message(rank, peer, id, false, stage_of(peer, offer.use));
            }
          }
        }
        items_[rank].push_back(std::move(group));
      }
    }
  }
  // A slot is free when those who read it `slots` trips ago are done. Where an accept of that trip has waited
  // for the same signal or a later one, that is known already.
  if (!reuses_slots()) return;
  std::map<std::tuple<int, int, int>, int> known;
  for (const Offer& offer : offers_) {
    if (deferred(offer) || crosses(offer)) continue;
    int& index = known[{offer.owner, offer.peer, offer.done.cell}];
    index = std::max(index, offer.done.index);
  }
  for (int id = 0; id < static_cast<int>(offers_.size()); ++id) {
    const Offer& offer = offers_[id];
    if (deferred(offer) && !crosses(offer) &&
        known[{offer.owner, offer.peer, offer.done.cell}] < offer.done.index) {
      waits_at_top_[offer.owner].push_back(id);
    }
  }
}

// Whether two chunks that are offered in a row, across a message link, lie side by side in every trip: whole
// blocks of the image, equally long.
bool Lowering::adjoins(const Offer& offer, const Offer& next) const {
  const auto whole = [&](const Offer& o) {
    return o.read && !o.written && o.ref.buffer == Buffer::image && o.ref.chunk.first == 0 &&
           o.ref.chunk.last == o.ref.chunk.of;
  };
  const auto length = [&](const Offer& o) {
    return block_length(call_, o.owner, Buffer::image, o.ref.chunk.block);
  };
  return whole(offer) && whole(next) && next.ref.chunk.block == offer.ref.chunk.block + 1 &&
         stage_of(offer.peer, offer.use) == stage_of(next.peer, next.use) && length(offer) == length(next) &&
         !layout_.ragged && !call_.coded();
}

Event Lowering::number_message(int from, int to, int offer, bool written, int receiver_stage) {
  const int sender_stage = written ? stage_of(from, offers_[offer].use) : stage_of(from, offers_[offer].step);
  const int channel = sender_stage * schedule_.stages + receiver_stage;
  std::vector<Message>& messages = messages_[from * n_ + to][channel];
  messages.push_back({{offer}, written, 0});
  return {channel, static_cast<int>(messages.size())};
}

// A chunk that its owner would show in the window rides in the signal's cell instead, if it fits and the cell
// has no other signal in this call, which would overwrite it.
void Lowering::find_riders(int64_t room) {
  if (reuses_slots() || layout_.trips > 1 || call_.coded()) return;
  std::map<std::tuple<int, int, int>, int> offers;  // (owner, peer, cell)
  for (const Offer& offer : offers_) {
    if (!crosses(offer) && offer.shown.index) ++offers[{offer.owner, offer.peer, offer.shown.cell}];
  }
  for (Offer& offer : offers_) {
    if (crosses(offer)) continue;
    const int64_t item = offer.ref.buffer == Buffer::scratch ? layout_.scratch_unit : layout_.item;
    const int64_t bytes = length_of(offer.ref, 0) * item;
    offer.rides = offer.read && deferred(offer) && bytes <= room &&
                  offers[{offer.owner, offer.peer, offer.shown.cell}] == 1 &&
                  per_trip(offer.owner, offer.peer, offer.shown.cell) == 1;
  }
}

// A copy of `in` to the image is left out if all that use it are offers right behind it that ride: these take
// `in` itself.
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
        const int id = offers_of_[rank][next].front();
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

int64_t Lowering::most_signals() const {
  int most = 0;
  for (const std::vector<int>& cells : num_events_) {
    for (const int signals : cells) most = std::max(most, signals);
  }
  return most * layout_.trips;
}

// Follows the signals of the first trip and tells whether each rank hears from every rank of its node,
// directly or through others, that it has entered.
bool Lowering::full_exchange() const {
  using Ranks = std::vector<bool>;
  std::vector<Ranks> heard(n_, Ranks(n_, false));
  std::vector<Ranks> sent;  // what a sender had heard when it signalled
  std::vector<int> shown(offers_.size(), -1), done(offers_.size(), -1);  // by offer: index into `sent`
  struct Cursor {
    int stage = 0;
    size_t item = 0;
  };
  std::vector<Cursor> cursors(n_);
  for (int rank = 0; rank < n_; ++rank) heard[rank][rank] = true;

  auto hear = [&](int rank, int at) {
    if (at < 0) return false;
    for (int r = 0; r < n_; ++r) heard[rank][r] = heard[rank][r] || sent[at][r];
    return true;
  };
  auto step = [&](int rank, const Item& item) {  // false: must wait
    for (int id : item.offers) {
      const Offer& offer = offers_[id];
      if (crosses(offer) && !(item.kind == Kind::combine ? offer.read : offer.written)) continue;
      if (item.kind == Kind::combine && (crosses(offer) || offer.shown.index) && !hear(rank, shown[id])) {
        return false;
      }
      if (item.kind == Kind::accept && !deferred(offer) && !hear(rank, done[id])) return false;
    }
    for (int id : item.offers) {
      if (item.kind == Kind::offer) shown[id] = static_cast<int>(sent.size());
      if (item.kind == Kind::combine && offers_[id].done.index) done[id] = static_cast<int>(sent.size());
    }
    if (item.kind != Kind::accept) sent.push_back(heard[rank]);
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
  for (int rank = 0; rank < n_; ++rank) {
    for (int peer = 0; peer < n_; ++peer) {
      if (call_.world.mapped(rank, peer) && !heard[rank][peer]) return false;
    }
  }
  return true;
}

}  // namespace pycomm::schedule
