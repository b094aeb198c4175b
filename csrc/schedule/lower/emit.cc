#include "schedule/lower/emit.h"

#include <algorithm>
#include <iterator>

namespace pycomm::schedule {

namespace {

using Kind = ScheduleStep::Kind;

Format format_of(const Ref& ref) { return ref.buffer == Buffer::scratch ? Format::partial : Format::raw; }

}  // namespace

void Emitter::run() {
  for (int id : l_.waits_at_top_[rank_]) {
    const Offer& offer = l_.offers_[id];
    if (alive(offer)) {
      wait(offer.peer, offer.done, 0, -l_.layout_.slots * l_.per_trip(offer.peer, rank_, offer.done.cell));
    }
  }
  complete_earlier();
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

void Emitter::signal(int peer, Event event, int stage) {
  push({.kind = Step::Kind::signal,
        .stage = static_cast<uint8_t>(stage),
        .cell = static_cast<uint8_t>(event.cell),
        .peer = peer,
        .value = event.index,
        .per_trip = l_.per_trip(rank_, peer, event.cell)});
}

void Emitter::wait(int peer, Event event, int stage, int64_t shift) {
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

Format Emitter::window_format(const Ref& ref) const {
  return l_.call_.coded_on(Links::all) ? Format::wire : format_of(ref);
}

Format Emitter::message_format(const Ref& ref) const {
  return l_.call_.coded() ? Format::wire : format_of(ref);
}

// From the first block's begin to the last one's end: they lie side by side.
int64_t Emitter::length_of(const Message& message) const {
  const int64_t length = l_.length_of(l_.offers_[message.offers[0]].ref, trip_);
  const auto before = static_cast<int64_t>(message.offers.size()) - 1;
  return length == 0 ? 0 : before * l_.layout_.width + length;
}

// The index-th message of a channel.
void Emitter::send(int to, int channel, int index, const Operand& from) {
  push({.kind = Step::Kind::send,
        .stage = static_cast<uint8_t>(channel / l_.schedule_.stages),
        .cell = static_cast<uint8_t>(channel),
        .num_srcs = 1,
        .operand = static_cast<int32_t>(program_.operands.size()),
        .peer = to,
        .count = length_of(l_.messages_[rank_ * l_.n_ + to].at(channel)[index - 1])});
  program_.operands.push_back(from);
}

void Emitter::receive(const Message& message, int from, int channel, const Operand& to) {
  push({.kind = Step::Kind::recv,
        .stage = static_cast<uint8_t>(channel % l_.schedule_.stages),
        .cell = static_cast<uint8_t>(channel),
        .num_dsts = 1,
        .operand = static_cast<int32_t>(program_.operands.size()),
        .peer = from,
        .count = length_of(message)});
  program_.operands.push_back(to);
}

void Emitter::receive_until(int from, int channel, int index) {
  const std::vector<Message>& messages = l_.messages_[from * l_.n_ + rank_].at(channel);
  for (int& received = received_[{from, channel}]; received < index; ++received) {
    const Message& message = messages[received];
    const Offer& offer = l_.offers_[message.offers[0]];
    if (alive(offer)) receive(message, from, channel, mail(message.mail, message_format(offer.ref)));
  }
}

// Waits until what earlier trips have sent from this slot has been received: then it may be written.
void Emitter::complete_earlier() {
  if (!l_.reuses_slots()) return;
  for (int to = 0; to < l_.n_; ++to) {
    for (const auto& [channel, messages] : l_.messages_[rank_ * l_.n_ + to]) {
      if (std::ranges::none_of(messages, [&](const Message& m) { return alive(l_.offers_[m.offers[0]]); }))
        continue;
      const auto per_trip = static_cast<int64_t>(messages.size());
      push({.kind = Step::Kind::complete,
            .cell = static_cast<uint8_t>(channel),
            .peer = to,
            .value = (1 - l_.layout_.slots) * per_trip,
            .per_trip = per_trip});
    }
  }
}

// Waits until the message has been received: then the caller's memory that it was sent from may be written.
void Emitter::complete(const Offer& offer, int stage) {
  const auto [channel, index] = offer.shown;
  push({.kind = Step::Kind::complete,
        .stage = static_cast<uint8_t>(stage),
        .cell = static_cast<uint8_t>(channel),
        .peer = offer.peer,
        .value = index,
        .per_trip = static_cast<int64_t>(l_.messages_[rank_ * l_.n_ + offer.peer].at(channel).size())});
}

// Brings the chunk that a peer has written and sent to where other peers read it: in the window, if it is
// staged.
void Emitter::take_written(const Offer& offer) {
  const auto [channel, index] = offer.done;
  const Message& message = l_.messages_[offer.peer * l_.n_ + rank_].at(channel)[index - 1];
  const Format format = window_format(offer.ref);
  const Operand to = operand(offer.ref, l_.staged(offer.ref), format);
  receive_until(offer.peer, channel, index - 1);
  if (int& received = received_[{offer.peer, channel}]; received < index) {
    received = index;
    return receive(message, offer.peer, channel, to);
  }
  const int64_t count = l_.length_of(offer.ref, trip_);
  const int stage = channel % l_.schedule_.stages;
  l_.call_.coded() ? emit_coded({to}, {mail(message.mail, format)}, count, stage, {})
                   : move(to, mail(message.mail, format), count, stage, false);
}

Operand Emitter::source(const Item& item, const Ref& ref) const {
  if (l_.call_.world.mapped(ref.rank, rank_)) {
    const bool window = l_.call_.coded_on(Links::all) || (l_.in_window(ref) && ref.rank != rank_);
    return operand(ref, window, window_format(ref));
  }
  const auto id = std::ranges::find_if(item.offers, [&](int id) { return l_.offers_[id].ref == ref; });
  const Event& shown = l_.offers_[*id].shown;
  const Message& message = l_.messages_[ref.rank * l_.n_ + rank_].at(shown.cell)[shown.index - 1];
  const int blocks_before = ref.chunk.block - l_.offers_[message.offers[0]].ref.chunk.block;
  return mail(message.mail + l_.layout_.image_bytes(blocks_before, 0), message_format(ref));
}

void Emitter::add_destination(std::vector<Operand>& dsts, const Item& item, const Ref& ref,
                              Format format) const {
  if (l_.call_.world.mapped(ref.rank, rank_)) {
    const bool window = l_.call_.coded_on(Links::all) || (l_.in_window(ref) && ref.rank != rank_);
    return dsts.push_back(operand(ref, window, format));
  }
  const Operand outbox = mail(l_.outboxes_[rank_].at(item.step), format);
  const auto same = [&](const Operand& dst) {
    return dst.space == outbox.space && dst.offset == outbox.offset;
  };
  if (std::ranges::none_of(dsts, same)) dsts.push_back(outbox);
}

Operand Emitter::operand(const Ref& ref, bool window, Format format) const {
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

void Emitter::emit(const std::vector<Operand>& dsts, const std::vector<Operand>& srcs, int64_t count,
                   int stage, bool stream) {
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

// Whether stores to this rank's `out` go past the cache: if it is large and this call never reads the block.
bool Emitter::streams(const Ref& out) const {
  const auto& read = l_.blocks_read_[rank_];
  return out_elements(l_.call_, rank_) * l_.layout_.item >= l_.stream_bytes_ &&
         !read.count({Buffer::out, out.chunk.block}) &&
         !(l_.call_.in_place && read.count({Buffer::in, out.chunk.block}));
}

void Emitter::show(const Item& item, int stage) {
  bool any = false;
  for (int id : item.offers) {
    const Offer& offer = l_.offers_[id];
    if (!alive(offer)) continue;
    any = true;
    if (offer.rides) {
      const Operand from = operand(offer.from, false, format_of(offer.ref));
      move({Space::outgoing, from.format, offer.peer, offer.shown.cell * kCellBytes}, from,
           l_.length_of(offer.ref, trip_), stage, false);
    } else {
      bring_to_window(offer, stage);
    }
  }
  const Offer& first = l_.offers_[item.offers[0]];
  if (!l_.crosses(first)) {
    if (any && first.shown.index) signal(first.peer, first.shown, stage);
    return;
  }
  Event last;
  for (int id : item.offers) {
    const Offer& offer = l_.offers_[id];
    const auto [channel, index] = offer.shown;
    if (!offer.read || !alive(offer) || (channel == last.cell && index == last.index)) continue;
    last = offer.shown;
    send(offer.peer, channel, index,
         offer.encoded < 0 ? operand(offer.ref, l_.staged(offer.ref), message_format(offer.ref))
                           : encoded(l_.encoded_[rank_][offer.encoded]));
  }
}

void Emitter::bring_to_window(const Offer& offer, int stage) {
  const Encoded* chunk = offer.encoded < 0 ? nullptr : &l_.encoded_[rank_][offer.encoded];
  if (chunk && chunk->step == offer.step) encode_for_messages(*chunk, stage);
  if (!offer.copy) return;
  if (l_.call_.coded_on(Links::all)) return encode_offer(offer, stage);
  const int64_t count = l_.length_of(offer.ref, trip_);
  if (chunk) {
    emit_coded({operand(offer.ref, true, Format::final)}, {encoded(*chunk)}, count, stage, {});
  } else {
    move(operand(offer.ref, true, Format::raw), operand(offer.ref, false, Format::raw), count, stage, false);
  }
}

void Emitter::accept(const Offer& offer, int stage) {
  if (l_.deferred(offer) || !alive(offer)) return;
  if (l_.crosses(offer) && offer.written && l_.call_.coded_on(Links::wire)) return take_encoded(offer, stage);
  if (!l_.crosses(offer)) {
    wait(offer.peer, offer.done, stage);
  } else if (offer.written) {
    take_written(offer);
  } else {
    complete(offer, stage);
  }
  if (!offer.written || !l_.staged(offer.ref)) return;
  const int64_t count = l_.length_of(offer.ref, trip_);
  if (l_.call_.coded_on(Links::all)) {
    emit_coded({operand(offer.ref, false, Format::final)}, {wire(offer.ref)}, count, stage, {},
               streams(offer.ref));
  } else {
    move(operand(offer.ref, false, Format::raw), operand(offer.ref, true, Format::raw), count, stage,
         streams(offer.ref));
  }
}

void Emitter::combine(const Item& item, const ScheduleStep& step) {
  struct Peer {
    int rank;
    Event shown, done;  // the last signal to wait for, and the one to give
  };
  std::vector<Peer> peers;
  for (int id : item.offers) {
    const Offer& offer = l_.offers_[id];
    if (!alive(offer)) continue;
    if (l_.crosses(offer)) {
      if (offer.read) receive_until(offer.owner, offer.shown.cell, offer.shown.index);
      continue;
    }
    auto peer = std::ranges::lower_bound(peers, offer.owner, {}, &Peer::rank);
    if (peer == peers.end() || peer->rank != offer.owner) peer = peers.insert(peer, {offer.owner, {}, {}});
    if (offer.shown.index > peer->shown.index) peer->shown = offer.shown;
    if (offer.done.index) peer->done = offer.done;
  }
  for (const Peer& peer : peers) {
    if (peer.shown.index) wait(peer.rank, peer.shown, step.stage);
  }
  const bool is_copy = !step.final && step.srcs.size() == 1 &&
                       (step.dsts[0].buffer == Buffer::scratch) == (step.srcs[0].buffer == Buffer::scratch);
  const int64_t count = checked_length(item, step, is_copy);
  if (l_.call_.coded_on(Links::all)) {
    combine_coded(item, step, count, is_copy);
  } else {
    combine_plain(item, step, count, is_copy);
  }
  for (const Peer& peer : peers) {
    if (peer.done.index) signal(peer.rank, peer.done, step.stage);
  }
  for (int id : item.offers) {
    const Offer& offer = l_.offers_[id];
    if (!l_.crosses(offer) || !offer.written || !alive(offer)) continue;
    send(offer.owner, offer.done.cell, offer.done.index,
         mail(l_.outboxes_[rank_].at(item.step), message_format(offer.ref)));
  }
}

// The length of all its chunks. Checks that they have one length, and that each may be read or written.
int64_t Emitter::checked_length(const Item& item, const ScheduleStep& step, bool is_copy) const {
  const int64_t count = l_.length_of(step.dsts[0], trip_);
  const auto check = [&](const Ref& ref) {
    if (l_.length_of(ref, trip_) == count) return;
    malformed(rank_, item.step, words(ref) + " is not as long as " + words(step.dsts[0]));
  };
  for (const Ref& ref : step.dsts) {
    check(ref);
    if (ref.buffer == Buffer::in) malformed(rank_, item.step, "writes " + words(ref) + ", an input");
    if (!is_copy && (ref.buffer == Buffer::scratch) == step.final) {
      malformed(rank_, item.step,
                step.final ? "a final result cannot go to scratch"
                           : "a partial result can go to scratch only: " + words(ref));
    }
  }
  for (const Ref& ref : step.srcs) {
    check(ref);
    if (!is_copy && ref.buffer == Buffer::out) {
      malformed(rank_, item.step, "reduces " + words(ref) + ", a finished result");
    }
  }
  return count;
}

// Without a codec on all links. With one on message links alone, a result for other nodes is encoded first,
// and its readers in this node get the decoded form, so that all ranks hold the same values.
void Emitter::combine_plain(const Item& item, const ScheduleStep& step, int64_t count, bool is_copy) {
  std::vector<Operand> dsts, srcs;
  for (const Ref& ref : step.srcs) {
    const auto rider = std::find_if(item.offers.begin(), item.offers.end(), [&](int id) {
      return l_.offers_[id].rides && l_.offers_[id].ref == ref;
    });
    if (rider != item.offers.end()) {
      srcs.push_back({Space::incoming, format_of(ref), ref.rank, l_.offers_[*rider].shown.cell * kCellBytes});
    } else {
      srcs.push_back(published_form(ref, item.step).value_or(source(item, ref)));
    }
  }
  const auto sent_encoded = [&](const Ref& ref) {
    return l_.call_.coded() && !l_.call_.world.mapped(ref.rank, rank_);
  };
  const bool sends = std::ranges::any_of(step.dsts, sent_encoded);
  const bool decodes =
      sends || std::ranges::any_of(srcs, [](const Operand& src) { return src.format == Format::wire; });
  bool to_user = true;
  for (int d = 0; d < static_cast<int>(step.dsts.size()); ++d) {
    const Ref& ref = step.dsts[d];
    if (sent_encoded(ref)) continue;
    const Format format = ref.buffer == Buffer::scratch ? Format::partial
                          : step.final || decodes       ? Format::final
                                                        : Format::raw;
    // In place, `out` is `in`: there is nothing to copy.
    const bool there = l_.call_.in_place && is_copy && !decodes &&
                       ref == Ref{rank_, Buffer::out, step.srcs[0].chunk} &&
                       step.srcs[0] == Ref{rank_, Buffer::in, ref.chunk};
    if (!there) add_destination(dsts, item, ref, format);
    to_user = to_user && !there && dsts.back().space == Space::out;
    if (l_.window_copies_[rank_].count({item.step, d})) {
      dsts.push_back(operand(ref, true, format));
      to_user = false;
    }
  }
  Transcode transcode;
  if (sends) {
    const Operand outbox = mail(l_.outboxes_[rank_].at(item.step), Format::wire);
    const auto turn = l_.encode_turns_[rank_].find(item.step);
    if (turn != l_.encode_turns_[rank_].end()) transcode = encode_of(step.dsts[0].chunk, turn->second);
    transcode.divides = step.final;
    emit_coded({outbox}, srcs, count, step.stage, transcode);
    srcs = {outbox};
    transcode = {};
  } else {
    transcode.divides = step.final;
  }
  if (!dsts.empty()) emit_coded(dsts, srcs, count, step.stage, transcode, to_user && streams(step.dsts[0]));
}

Program Lowering::emit(int rank) const {
  // A loop ends where lengths change: after the last full trip of a block that this rank touches, and after
  // its tail.
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

}  // namespace pycomm::schedule
