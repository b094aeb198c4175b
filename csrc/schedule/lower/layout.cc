#include "schedule/lower/layout.h"

#include <algorithm>
#include <cmath>

#include "common/error.h"

namespace pycomm::schedule {

namespace {
int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
}  // namespace

int num_blocks(const World& world) { return world.traits().one_block() ? 1 : world.size; }

std::vector<int64_t> uniform_counts(const World& world, int64_t count) {
  if (!world.traits().moves()) return {0};
  const auto blocks = static_cast<size_t>(num_blocks(world));
  return std::vector<int64_t>(world.traits().pairwise ? blocks * blocks : blocks, count);
}

bool is_ragged(const Call& call) {
  return call.world.traits().pairwise &&
         (call.ragged || std::any_of(call.counts.begin(), call.counts.end(),
                                     [&](int64_t c) { return c != call.counts[0]; }));
}

int64_t block_length(const Call& call, int rank, Buffer buffer, int block) {
  const int blocks = num_blocks(call.world);
  if (block >= blocks) block = 0;  // a further block of the image or of scratch
  if (!call.world.traits().pairwise) return call.counts[block];
  return buffer == Buffer::out ? call.counts[block * blocks + rank] : call.counts[rank * blocks + block];
}

int64_t block_offset(const Call& call, int rank, Buffer buffer, int block) {
  const Traits& traits = call.world.traits();
  const bool own_only = (buffer == Buffer::in && traits.in.holds == Content::Holds::own) ||
                        (buffer == Buffer::out && traits.out.holds == Content::Holds::own);
  if (block < 0 || block >= num_blocks(call.world) || (own_only && block != rank)) {
    throw ValueError("rank " + std::to_string(rank) + "'s `" + name(buffer) + "` has no block " +
                     std::to_string(block) + " in " + traits.name + ", but " +
                     (own_only ? "block " + std::to_string(rank) + " alone"
                      : num_blocks(call.world) == 1
                          ? "block 0 alone"
                          : "blocks 0 to " + std::to_string(num_blocks(call.world) - 1)));
  }
  if (own_only) return 0;
  int64_t offset = 0;
  for (int b = 0; b < block; ++b) offset += block_length(call, rank, buffer, b);
  return offset;
}

int64_t data_index(const Call& call, int block, int64_t element) {
  if (call.world.traits().in.holds != Content::Holds::blocks) return element;
  for (int b = 0; b < block; ++b) element += round_up(call.counts[b], kTile);
  return element;
}

Layout::Layout(const Call& call, const Schedule& schedule, const Geometry& geometry, int image_blocks,
               int scratch_blocks, const Mail& mail) {
  item = static_cast<int64_t>(size_of(call.dtype));
  unit = call.coded() ? kTile : 1;
  grain = call.coded() ? kTile : std::max<int64_t>(1, 64 / item);
  image_unit = unit * item;
  mail_unit = scratch_unit = unit * static_cast<int64_t>(size_of(accumulator(call.dtype)));
  if (call.coded()) mail_unit = tile_bytes(call.codec.kind);
  if (call.coded_on(Links::all)) image_unit = scratch_unit = mail_unit;
  ragged = is_ragged(call);
  const int blocks = num_blocks(call.world);
  const int64_t longest = *std::max_element(call.counts.begin(), call.counts.end());
  const bool uses_window = image_blocks > 0 || scratch_blocks > 0 || mail.chunks > 0;

  // A trip takes as much as the cache holds, or less if the algorithm pipelines or the bank is small.
  int64_t data = uses_window ? geometry.trip_bytes : INT64_MAX;
  if (schedule.trip_bytes > 0) data = std::min(data, schedule.trip_bytes);
  const int64_t unit_bytes = image_blocks * image_unit + scratch_blocks * scratch_unit +
                             static_cast<int64_t>(std::ceil(mail.blocks * static_cast<double>(mail_unit)));
  // The mail begins on a line of its own, and each chunk in it is rounded up.
  const int64_t mail_rest =
      mail.chunks == 0 ? 0 : mail.chunks * (mail_bytes({.first = 0, .last = 0}) + mail_unit + 64) + 64;
  const int32_t many_slots = schedule.stages + 1;
  int64_t widest = data == INT64_MAX ? INT64_MAX : data / (blocks * image_unit) * unit;
  if (uses_window) {
    const int64_t room =
        geometry.bank_bytes / many_slots - mail_rest - 64;  // 64: the scratch part starts on a line
    widest = std::max(grain, std::min(widest, room / unit_bytes * unit));
  }
  if (widest != INT64_MAX) widest = std::max(grain, widest / grain * grain);

  if (!ragged && longest <= widest) {
    width = round_up(longest, grain);
  } else if (ragged) {
    width = widest == INT64_MAX ? int64_t{1} << 56 : widest;
    slots = many_slots;
  } else {
    trips = (longest + widest - 1) / widest;
    width = round_up((longest + trips - 1) / trips, grain);
    trips = (longest + width - 1) / width;
    slots = many_slots;
  }
  if (!uses_window) slots = 1;
  scratch_offset = round_up(image_bytes(image_blocks, 0), 64);
  mail_offset = round_up(scratch_bytes(scratch_blocks, 0), 64);
  const auto mail_width = static_cast<int64_t>(std::ceil(mail.blocks * static_cast<double>(width / unit)));
  slot_bytes = uses_window ? round_up(mail_offset + mail_width * mail_unit + mail_rest, 64) : 0;
  if (slots * slot_bytes > geometry.bank_bytes) {
    throw ValueError("the window's bank of " + std::to_string(geometry.bank_bytes) + " bytes cannot hold " +
                     std::to_string(slots) + " slots of " + std::to_string(slot_bytes) +
                     " bytes; use larger windows");
  }
}

int64_t Layout::trip_length(int64_t length, int64_t trip) const {
  return width == 0 ? 0 : std::clamp<int64_t>(length - trip * width, 0, width);
}

// Boundaries are rounded down to the grain: a chunk may be longer than its fraction by that.
int64_t Layout::mail_bytes(const Chunk& chunk) const {
  const int64_t elements = width * (chunk.last - chunk.first) / chunk.of + 2 * grain;
  return round_up(round_up(elements, unit) / unit * mail_unit, 64);
}

Range Layout::chunk_range(const Chunk& chunk, int64_t trip_length) const {
  // Equal fractions give equal boundaries, however they are written.
  auto boundary = [&](int part) {
    return part == chunk.of ? trip_length : trip_length * part / chunk.of / grain * grain;
  };
  return {boundary(chunk.first), boundary(chunk.last)};
}

}  // namespace pycomm::schedule
