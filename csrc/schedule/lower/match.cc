#include "schedule/lower/match.h"

#include <algorithm>
#include <numeric>
#include <span>
#include <tuple>

#include "common/error.h"
#include "schedule/lower/layout.h"

namespace pycomm::schedule {

namespace {

using Kind = ScheduleStep::Kind;

// Offers of one chunk to one peer, in the order in which they are made, and how many of them a combine or an
// accept has met so far.
struct SameOffers {
  std::span<const int> offers;
  size_t used = 0, accepted = 0;
};

class OffersByKey {
 public:
  explicit OffersByKey(const std::vector<Offer>& offers) : ids_(offers.size()) {
    std::iota(ids_.begin(), ids_.end(), 0);
    const auto key_of = [&](int id) { return key(offers[id].peer, offers[id].ref); };
    std::ranges::stable_sort(ids_, {}, key_of);
    for (size_t first = 0, last; first < ids_.size(); first = last) {
      for (last = first + 1; last < ids_.size() && key_of(ids_[last]) == key_of(ids_[first]);) ++last;
      keys_.push_back(key_of(ids_[first]));
      groups_.push_back({std::span(ids_).subspan(first, last - first)});
    }
  }
  SameOffers* find(int peer, const Ref& ref) {  // null if there is none
    const auto at = std::ranges::lower_bound(keys_, key(peer, ref));
    return at == keys_.end() || *at != key(peer, ref) ? nullptr : &groups_[at - keys_.begin()];
  }

 private:
  using Key = std::tuple<int, int, Buffer, int, int, int, int>;
  static Key key(int peer, const Ref& r) {
    return {r.rank, peer, r.buffer, r.chunk.block, r.chunk.first, r.chunk.last, r.chunk.of};
  }
  std::vector<int> ids_;
  std::vector<Key> keys_;
  std::vector<SameOffers> groups_;
};

void check_ref(const Call& call, int rank, int step, const Ref& ref) {
  const Chunk& c = ref.chunk;
  if (ref.rank < 0 || ref.rank >= call.world.size) {
    malformed(rank, step, "there is no rank " + std::to_string(ref.rank));
  }
  if (c.of < 1 || c.first < 0 || c.last < c.first || c.last > c.of || c.block < 0) {
    malformed(rank, step, "not a chunk: " + words(ref));
  }
  if (ref.buffer == Buffer::in || ref.buffer == Buffer::out) {
    try {
      block_offset(call, ref.rank, ref.buffer, c.block);
    } catch (const ValueError& error) {
      malformed(rank, step, error.what());
    }
  } else if (c.block >= 2 * num_blocks(call.world) + 64) {
    malformed(rank, step, "no such block: " + words(ref));
  }
}

// All offers, not paired yet.
Matches find_offers(const Schedule& schedule, const Call& call) {
  Matches matches;
  for (int rank = 0; rank < call.world.size; ++rank) {
    const auto& program = schedule.ranks[rank];
    auto& at_step = matches.at_step.emplace_back(program.size());
    for (int i = 0; i < static_cast<int>(program.size()); ++i) {
      const ScheduleStep& step = program[i];
      for (const auto* refs : {&step.dsts, &step.srcs}) {
        for (const Ref& ref : *refs) check_ref(call, rank, i, ref);
      }
      if (step.kind != Kind::offer) continue;
      const Ref& ref = step.srcs[0];
      if (ref.rank != rank) malformed(rank, i, "offers another rank's " + words(ref));
      if (step.peer < 0 || step.peer >= call.world.size || step.peer == rank) {
        malformed(rank, i,
                  "offers to rank " + std::to_string(step.peer) + ", which is not one of the other ranks");
      }
      at_step[i].push_back(static_cast<int>(matches.offers.size()));
      matches.offers.push_back({.owner = rank, .peer = step.peer, .ref = ref, .step = i});
    }
  }
  return matches;
}

}  // namespace

Matches match(const Schedule& schedule, const Call& call) {
  const int n = call.world.size;
  if (static_cast<int>(schedule.ranks.size()) != n) {
    throw ValueError("the schedule has " + std::to_string(schedule.ranks.size()) + " programs for " +
                     std::to_string(n) + " ranks");
  }
  Matches matches = find_offers(schedule, call);
  std::vector<Offer>& offers = matches.offers;
  OffersByKey by_key(offers);
  for (int rank = 0; rank < n; ++rank) {
    const auto& program = schedule.ranks[rank];
    for (int i = 0; i < static_cast<int>(program.size()); ++i) {
      const ScheduleStep& step = program[i];
      std::vector<int>& here = matches.at_step[rank][i];
      if (step.kind == Kind::accept) {
        const auto found = step.srcs[0].rank == rank ? by_key.find(step.peer, step.srcs[0]) : nullptr;
        if (found == nullptr || found->accepted == found->offers.size() ||
            offers[found->offers[found->accepted]].step > i) {
          malformed(rank, i,
                    "accepts " + words(step.srcs[0]) + " from rank " + std::to_string(step.peer) +
                        " more often than it has offered it there");
        }
        here.push_back(found->offers[found->accepted++]);
        offers[here.back()].accept = i;
      }
      if (step.kind != Kind::combine) continue;
      if (step.dsts.empty() || step.srcs.empty())
        malformed(rank, i, "a combine needs a destination and a source");
      const auto use = [&](const Ref& ref, bool write) {
        if (ref.rank == rank) return;
        auto known = std::ranges::find(here, ref, [&](int id) { return offers[id].ref; });
        if (known == here.end()) {
          const auto found = by_key.find(rank, ref);
          if (found == nullptr || found->used == found->offers.size()) {
            malformed(rank, i,
                      "uses " + words(ref) + " more often than rank " + std::to_string(ref.rank) +
                          " offers it to rank " + std::to_string(rank));
          }
          known = here.insert(here.end(), found->offers[found->used++]);
          offers[*known].use = i;
        }
        (write ? offers[*known].written : offers[*known].read) = true;
      };
      for (const Ref& ref : step.srcs) use(ref, false);
      for (const Ref& ref : step.dsts) use(ref, true);
    }
  }
  for (const Offer& offer : offers) {
    if (offer.use < 0) {
      malformed(offer.owner, offer.step,
                "rank " + std::to_string(offer.peer) + " never uses the offer of " + words(offer.ref));
    }
    if (offer.accept < 0) malformed(offer.owner, offer.step, "offers and never accepts " + words(offer.ref));
  }
  return matches;
}

void malformed(int rank, int step, const std::string& what) {
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

}  // namespace pycomm::schedule
