// Where chunks lie: block lengths, offsets in the caller's buffers, trips, and the window slot's layout.
#pragma once

#include <vector>

#include "schedule/plan.h"

namespace pycomm::schedule {

// How many blocks the collective's data has.
int num_blocks(const World& world);
// Call::counts where every block (all_to_all: every pair's) has `count` elements.
std::vector<int64_t> uniform_counts(const World& world, int64_t count);
// Elements of one block of a rank's buffer (image and scratch: of the data they are copies of).
int64_t block_length(const Call& call, int rank, Buffer buffer, int block);
// First element of the block in the caller's buffer. Throws ValueError if that rank's buffer has no such
// block.
int64_t block_offset(const Call& call, int rank, Buffer buffer, int block);

// The index of a block's element in the data that a codec sees, from which encodes count. That data is the
// caller's, in its order, but every block of a reduce_scatter begins with a tile, and every block of an
// all_gather is data of its own.
int64_t data_index(const Call& call, int block, int64_t element);

// Whether the call is an all_to_all with unequal counts. A rank then knows only its own row and column of
// them, so what it does may depend on nothing else.
bool is_ragged(const Call& call);

struct Range {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
};

// How a slot is divided: a trip takes `width` elements of each block. The image's blocks come first, one
// after the other, then those of scratch, then the mail: what crosses message links.
struct Layout {
  int64_t item = 4;  // bytes of an element in the caller's buffers
  int64_t unit = 1;  // elements that stay together in windows: with a codec a tile, else one
  // Bytes of a unit in the image, of partial results, in the mail.
  int64_t image_unit = 4, scratch_unit = 4, mail_unit = 4;
  int64_t grain = 16;  // chunk boundaries are multiples of it: a cache line of elements, a tile
  int64_t width = 0;
  int64_t trips = 1;
  int32_t slots = 1;
  int64_t scratch_offset = 0, mail_offset = 0, slot_bytes = 0;
  bool ragged = false;

  // What the mail of any rank holds at most: a number of chunks, and the sum of the fractions of a block that
  // they are.
  struct Mail {
    int chunks = 0;
    double blocks = 0;
  };

  Layout(const Call& call, const Schedule& schedule, const Geometry& geometry, int image_blocks,
         int scratch_blocks, const Mail& mail);
  // Elements of a block that this trip takes; `length`: of the whole block.
  int64_t trip_length(int64_t length, int64_t trip) const;
  // The chunk's elements, relative to the trip's part of the block.
  Range chunk_range(const Chunk& chunk, int64_t trip_length) const;
  // Bytes that a chunk takes in the mail, the same in all trips.
  int64_t mail_bytes(const Chunk& chunk) const;
  int64_t image_bytes(int block, int64_t element) const {
    return (block * width + element) / unit * image_unit;
  }
  int64_t scratch_bytes(int block, int64_t element) const {
    return scratch_offset + (block * width + element) / unit * scratch_unit;
  }
};

}  // namespace pycomm::schedule
