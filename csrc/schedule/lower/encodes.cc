// Which steps of a call with a codec encode.
#include <algorithm>

#include "schedule/lower/lowering.h"

namespace pycomm::schedule {

namespace {
using Kind = ScheduleStep::Kind;
}  // namespace

// Finds which combines encode, in which turn, and whether a rank encodes an element twice. An encode of `in`
// alone has turn 0, as an offer's encode has: both give an element the same bits.
void Lowering::find_encodes() {
  if (call_.coded_on(Links::wire)) return find_encodes_for_messages();
  if (!call_.coded()) return;
  for (int rank = 0; rank < n_; ++rank) {
    std::vector<Ref> encoded;
    const auto note = [&](Ref ref) {
      ref = {rank, Buffer::scratch, ref.chunk};
      if (ref.chunk.block >= num_blocks(call_.world)) ref.chunk.block = 0;
      encodes_once_ = encodes_once_ &&
                      std::ranges::none_of(encoded, [&](const Ref& other) { return overlap(ref, other); });
      encoded.push_back(ref);
    };
    for (const Offer& offer : offers_) {
      if (offer.owner == rank && offer.copy) note(offer.ref);
    }
    const auto in_buffers = [&](const Ref& ref) {
      return ref.rank == rank && (ref.buffer == Buffer::in || ref.buffer == Buffer::out);
    };
    int turn = 0;
    const auto& program = schedule_.ranks[rank];
    for (int i = 0; i < static_cast<int>(program.size()); ++i) {
      const ScheduleStep& step = program[i];
      if (step.kind != Kind::combine) continue;
      const bool copied =
          window_copies_[rank].lower_bound({i, 0}) != window_copies_[rank].lower_bound({i + 1, 0});
      const bool to_wire = copied || !std::ranges::all_of(step.dsts, in_buffers);
      const bool bare = step.srcs.size() == 1;
      if (!to_wire || (bare && !in_buffers(step.srcs[0]))) continue;
      encode_turns_[rank][i] = bare ? 0 : static_cast<uint8_t>(++turn);
      note(step.dsts[0]);
    }
  }
}

// With a codec on message links alone, a chunk that is shown across them is encoded once, for all its readers
// on other nodes. In a collective that does not reduce, all ranks must end with what these decode: so the
// owner and the readers in its node get the decoded form as well.
void Lowering::find_encoded() {
  if (!call_.coded_on(Links::wire)) return;
  const auto maker_of = [&](const Offer& offer) {
    const auto& program = schedule_.ranks[offer.owner];
    int i = offer.step - 1;
    for (; i >= 0; --i) {
      const auto writes = [&](const Ref& ref) { return overlap(ref, offer.ref); };
      if (program[i].kind == Kind::combine && std::ranges::any_of(program[i].dsts, writes)) break;
      if (program[i].kind == Kind::accept && writes(program[i].srcs[0]) &&
          offers_[offers_of_[offer.owner][i].front()].written) {
        break;
      }
    }
    return i;
  };
  const auto known = [&](const Offer& offer, int maker) {
    const auto same = [&](const Encoded& e) { return e.ref == offer.ref && e.maker == maker; };
    return std::ranges::find_if(encoded_[offer.owner], same);
  };
  for (Offer& offer : offers_) {
    if (!offer.read || !crosses(offer)) continue;
    std::vector<Encoded>& all = encoded_[offer.owner];
    const int maker = maker_of(offer);
    auto found = known(offer, maker);
    if (found == all.end())
      found = all.insert(all.end(), {.ref = offer.ref, .step = offer.step, .maker = maker});
    offer.encoded = static_cast<int>(found - all.begin());
  }
  if (call_.world.traits().reduces) return;
  for (Offer& offer : offers_) {
    if (!offer.read || crosses(offer) || offer.ref.buffer != Buffer::in) continue;
    const auto found = known(offer, maker_of(offer));
    if (found == encoded_[offer.owner].end()) continue;
    found->step = std::min(found->step, offer.step);
    offer.encoded = static_cast<int>(found - encoded_[offer.owner].begin());
  }
}

// All encodes that a rank makes of one element differ in their turn; encodes of `in` alone have turn 0.
void Lowering::find_encodes_for_messages() {
  struct Encode {
    int step;
    Chunk chunk;
    bool bare;
    uint8_t* turn;
  };
  for (int rank = 0; rank < n_; ++rank) {
    std::vector<Encode> encodes;
    for (Encoded& e : encoded_[rank]) {
      encodes.push_back({e.step, e.ref.chunk, e.ref.buffer == Buffer::in, &e.turn});
    }
    for (int i = 0; i < static_cast<int>(schedule_.ranks[rank].size()); ++i) {
      const ScheduleStep& step = schedule_.ranks[rank][i];
      const auto elsewhere = [&](const Ref& ref) { return !call_.world.mapped(ref.rank, rank); };
      if (step.kind != Kind::combine || std::ranges::none_of(step.dsts, elsewhere)) continue;
      const bool bare = step.srcs.size() == 1;
      if (bare && elsewhere(step.srcs[0])) continue;  // encoded already
      encodes.push_back(
          {i, step.dsts[0].chunk, bare && step.srcs[0].buffer == Buffer::in, &encode_turns_[rank][i]});
    }
    std::ranges::sort(encodes, {}, &Encode::step);
    const auto data = [&](Chunk chunk) {
      if (chunk.block >= num_blocks(call_.world)) chunk.block = 0;
      return Ref{rank, Buffer::scratch, chunk};
    };
    for (size_t i = 0; i < encodes.size(); ++i) {
      int earlier = 0;
      for (size_t j = 0; j < i; ++j) {
        if (!overlap(data(encodes[i].chunk), data(encodes[j].chunk))) continue;
        encodes_once_ = false;
        earlier = std::max<int>(earlier, *encodes[j].turn);
      }
      *encodes[i].turn = encodes[i].bare ? 0 : static_cast<uint8_t>(earlier + 1);
    }
  }
}

}  // namespace pycomm::schedule
