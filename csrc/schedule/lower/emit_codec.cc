// The steps of calls with a codec: windows hold encoded data, callers' buffers do not, so a combine between
// the two encodes or decodes.
//
// * A result that several ranks read is encoded once, into every window that needs it, the rank's own
//   included. Every rank decodes its `out` from those bytes, the rank that computed them too, so that all
//   ranks hold the same values.
// * If a rank publishes an encoded chunk of `in`, it also reads the encoded copy, so that all ranks sum the
//   same values. A chunk that only its own rank reads enters exactly.
// * With a codec on message links alone, windows hold no encoded data but the mail: the same holds of what
//   crosses between nodes, and everything else is as without a codec.
#include <algorithm>

#include "schedule/lower/emit.h"

namespace pycomm::schedule {

void Emitter::emit_coded(const std::vector<Operand>& dsts, const std::vector<Operand>& srcs, int64_t count,
                         int stage, Transcode transcode, bool stream) {
  if (count == 0) return;
  emit(dsts, srcs, count, stage, stream);
  const auto is_wire = [](const Operand& operand) { return operand.format == Format::wire; };
  if (std::ranges::none_of(dsts, is_wire) && std::ranges::none_of(srcs, is_wire)) return;
  program_.steps.back().transcode = static_cast<int32_t>(program_.transcodes.size());
  program_.transcodes.push_back(transcode);
}

// An encode of this chunk: the turn, and the elements from which it counts.
Transcode Emitter::encode_of(const Chunk& chunk, uint8_t turn) const {
  const Layout& layout = l_.layout_;
  const bool further = chunk.block >= num_blocks(l_.call_.world);  // such a block holds data of block 0
  const int block = further ? 0 : chunk.block;
  const int64_t length = block_length(l_.call_, rank_, Buffer::scratch, block);
  const int64_t begin = layout.chunk_range(chunk, layout.trip_length(length, trip_)).begin;
  const bool one_block_in = l_.call_.world.traits().in.holds == Content::Holds::own;
  return {.turn = turn,
          .index = data_index(l_.call_, block, begin),
          .element = (one_block_in ? 0 : block_offset(l_.call_, rank_, Buffer::in, block)) + begin,
          .stride = layout.trips > 1 ? layout.width : 0};
}

void Emitter::encode_offer(const Offer& offer, int stage) {
  emit_coded({wire(offer.ref)}, {operand(offer.ref, false, Format::raw)}, l_.length_of(offer.ref, trip_),
             stage, encode_of(offer.ref.chunk, 0));
}

// Where in its window the rank has put an encoded copy of this chunk of `in` before this step, if it has.
std::optional<Ref> Emitter::shown_form(const Ref& ref, int step) const {
  for (const Offer& offer : l_.offers_) {
    if (offer.owner == rank_ && offer.ref == ref && offer.read && offer.step < step) return ref;
  }
  const auto& program = l_.schedule_.ranks[rank_];
  for (int i = 0; i < step; ++i) {
    if (program[i].kind != ScheduleStep::Kind::combine || program[i].srcs != std::vector{ref}) continue;
    for (const Ref& dst : program[i].dsts) {
      if (dst == Ref{rank_, Buffer::image, ref.chunk}) return dst;
    }
  }
  return std::nullopt;
}

// The source is the chunk in its exact form.
void Emitter::encode_for_messages(const Encoded& chunk, int stage) {
  emit_coded({encoded(chunk)}, {operand(chunk.ref, false, window_format(chunk.ref))},
             l_.length_of(chunk.ref, trip_), stage, encode_of(chunk.ref.chunk, chunk.turn));
}

// Decodes what a peer on another node has written: for the caller, and into the window for ranks of this
// node.
void Emitter::take_encoded(const Offer& offer, int stage) {
  const auto [channel, index] = offer.done;
  receive_until(offer.peer, channel, index);
  const Message& message = l_.messages_[offer.peer * l_.n_ + rank_].at(channel)[index - 1];
  const Format format = offer.ref.buffer == Buffer::scratch ? Format::partial : Format::final;
  std::vector<Operand> dsts;
  if (l_.staged(offer.ref)) dsts.push_back(operand(offer.ref, false, format));
  if (!l_.staged(offer.ref) || offer.kept) dsts.push_back(operand(offer.ref, true, format));
  emit_coded(dsts, {mail(message.mail, Format::wire)}, l_.length_of(offer.ref, trip_), stage, {},
             dsts.size() == 1 && l_.staged(offer.ref) && streams(offer.ref));
}

// The encoded copy of this chunk of its own `in` that the rank has made for messages before this step, if it
// has. In a collective that does not reduce, this rank reads it too, so that all ranks end with the same
// values.
std::optional<Operand> Emitter::published_form(const Ref& ref, int step) const {
  if (ref.rank != rank_ || ref.buffer != Buffer::in || l_.call_.world.traits().reduces) return std::nullopt;
  for (const Encoded& chunk : l_.encoded_[rank_]) {
    if (chunk.ref == ref && chunk.step < step) return encoded(chunk);
  }
  return std::nullopt;
}

Operand Emitter::coded_source(const Item& item, const Ref& ref) const {
  if (ref.rank != rank_ || !l_.staged(ref)) return source(item, ref);
  const auto shown = ref.buffer == Buffer::in ? shown_form(ref, item.step) : std::nullopt;
  return shown ? wire(*shown) : operand(ref, false, Format::raw);
}

void Emitter::combine_coded(const Item& item, const ScheduleStep& step, int64_t count, bool is_copy) {
  std::vector<Operand> wires, srcs;
  std::optional<Ref> out;
  for (int d = 0; d < static_cast<int>(step.dsts.size()); ++d) {
    const Ref& ref = step.dsts[d];
    const bool own_out = ref.rank == rank_ && ref.buffer == Buffer::out;
    if (own_out) out = ref;
    if (!own_out || l_.window_copies_[rank_].count({item.step, d})) {
      add_destination(wires, item, ref, Format::wire);
    }
  }
  for (const Ref& ref : step.srcs) srcs.push_back(coded_source(item, ref));
  if (wires.empty()) {
    const bool raw = std::ranges::all_of(srcs, [](const Operand& src) { return src.format == Format::raw; });
    const Format format = raw && is_copy ? Format::raw : Format::final;
    // In place, `out` is `in`: there is nothing to copy.
    const bool there =
        format == Format::raw && l_.call_.in_place && step.srcs[0] == Ref{rank_, Buffer::in, out->chunk};
    if (!there) {
      emit_coded({operand(*out, false, format)}, srcs, count, step.stage, {.divides = step.final},
                 streams(*out));
    }
    return;
  }
  if (out) {
    const Operand own = wire(*out);
    const auto same = [&](const Operand& dst) { return dst.rank == own.rank && dst.offset == own.offset; };
    if (std::ranges::none_of(wires, same)) wires.insert(wires.begin(), own);
  }
  const auto turn = l_.encode_turns_[rank_].find(item.step);
  Transcode transcode;
  if (turn != l_.encode_turns_[rank_].end()) transcode = encode_of(step.dsts[0].chunk, turn->second);
  transcode.divides = step.final;
  emit_coded(wires, srcs, count, step.stage, transcode);
  if (out)
    emit_coded({operand(*out, false, Format::final)}, {wire(*out)}, count, step.stage, {}, streams(*out));
}

}  // namespace pycomm::schedule
