// The third part of lower(): writes one rank's steps for the trips of one loop, which all have the same
// lengths. Private to emit.cc and emit_codec.cc.
#pragma once

#include <map>
#include <optional>
#include <tuple>
#include <vector>

#include "schedule/lower/lowering.h"

namespace pycomm::schedule {

class Emitter {
 public:
  Emitter(const Lowering& lowering, int rank, int64_t trip, Program& program)
      : l_(lowering), rank_(rank), trip_(trip), program_(program) {}

  void run();

 private:
  // Beyond the first trip, pairs of a ragged call that have nothing more to exchange are left out.
  bool alive(const Offer& offer) const {
    return !l_.layout_.ragged || trip_ == 0 || l_.length_of(offer.ref, trip_) > 0;
  }
  void signal(int peer, Event event, int stage);
  void wait(int peer, Event event, int stage, int64_t shift = 0);

  // Across message links.
  void send(int to, int channel, int index, const Operand& from);
  int64_t length_of(const Message& message) const;
  void receive(const Message& message, int from, int channel, const Operand& to);
  // Receives all messages of a channel up to the index-th that it has not received yet, into the mail.
  void receive_until(int from, int channel, int index);
  void complete_earlier();
  void complete(const Offer& offer, int stage);
  void take_written(const Offer& offer);
  // The form that a chunk has in windows, and in messages.
  Format window_format(const Ref& ref) const;
  Format message_format(const Ref& ref) const;
  Operand mail(int64_t at, Format format) const {
    return {Space::window, format, rank_, l_.layout_.mail_offset + at, 0};
  }
  // From where a combine reads the chunk: from memory that this rank maps, or from the mail.
  Operand source(const Item& item, const Ref& ref) const;
  // Adds the place to which a combine writes the chunk: memory that this rank maps, or the mail, to be sent.
  void add_destination(std::vector<Operand>& dsts, const Item& item, const Ref& ref, Format format) const;
  void push(const Step& step) { program_.steps.push_back(step); }

  Operand operand(const Ref& ref, bool window, Format format) const;
  void emit(const std::vector<Operand>& dsts, const std::vector<Operand>& srcs, int64_t count, int stage,
            bool stream);
  void move(const Operand& dst, const Operand& src, int64_t count, int stage, bool stream) {
    emit({dst}, {src}, count, stage, stream);
  }
  bool streams(const Ref& out) const;

  void show(const Item& item, int stage);
  void bring_to_window(const Offer& offer, int stage);
  void accept(const Offer& offer, int stage);
  void combine(const Item& item, const ScheduleStep& step);
  int64_t checked_length(const Item& item, const ScheduleStep& step, bool is_copy) const;
  void combine_plain(const Item& item, const ScheduleStep& step, int64_t count, bool is_copy);

  // With a codec (emit_codec.cc).
  Operand wire(const Ref& ref) const { return operand(ref, true, Format::wire); }
  Operand coded_source(const Item& item, const Ref& ref) const;
  std::optional<Ref> shown_form(const Ref& ref, int step) const;
  void emit_coded(const std::vector<Operand>& dsts, const std::vector<Operand>& srcs, int64_t count,
                  int stage, Transcode transcode, bool stream = false);
  Transcode encode_of(const Chunk& chunk, uint8_t turn) const;
  void encode_offer(const Offer& offer, int stage);
  // With a codec on message links alone.
  Operand encoded(const Encoded& chunk) const { return mail(chunk.mail, Format::wire); }
  void encode_for_messages(const Encoded& chunk, int stage);
  void take_encoded(const Offer& offer, int stage);
  std::optional<Operand> published_form(const Ref& ref, int step) const;
  void combine_coded(const Item& item, const ScheduleStep& step, int64_t count, bool is_copy);

  const Lowering& l_;
  const int rank_;
  const int64_t trip_;
  Program& program_;
  std::map<std::tuple<int, int, int>, int64_t>
      reached_;                                  // (peer, cell, stage): the value that has been waited for
  std::map<std::pair<int, int>, int> received_;  // (peer, channel): how many messages of a trip
};

}  // namespace pycomm::schedule
