// The collectives: a table with one row for each, which says all there is to know besides its algorithms.
//
// The verifier does not derive the required results from it: verify/required.cc says them once more.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace pycomm::schedule {

enum class Collective : uint8_t {
  all_reduce,
  reduce_scatter,
  all_gather,
  broadcast,
  reduce,
  gather,
  scatter,
  all_to_all,
  barrier,
  send_recv,
};
inline constexpr int kNumCollectives = 10;

// What one of the caller's buffers holds, and which ranks have it. A collective's data is one block in all,
// or one block for each rank.
struct Content {
  enum class Holds : uint8_t {
    nothing,
    whole,   // the one block
    own,     // the rank's own block alone
    blocks,  // all of them, in rank order
  };
  enum class On : uint8_t { all, root, peer };  // World::root, World::peer
  Holds holds;
  On on;
};

// In place, `in` and `out` begin at the same address if they hold the same. If one holds the rank's own block
// and the other holds all blocks, the one lies within the other, where that block belongs.
struct Traits {
  Collective collective;
  const char* name;
  Content in, out;
  bool reduces = false;      // combines elements; the others only move them
  bool rooted = false;       // the caller names a root
  bool pairwise = false;     // a block for each pair of ranks: `in` holds a row of them, `out` a column
  bool takes_codec = false;  // for floats
  bool takes_list = false;   // several buffers in one call

  bool moves() const { return in.holds != Content::Holds::nothing; }
  bool one_block() const { return in.holds != Content::Holds::own && in.holds != Content::Holds::blocks; }
  bool between_two() const { return out.on == Content::On::peer; }
};

// In the order of the enumerators.
inline constexpr std::array<Traits, kNumCollectives> kTraits = [] {
  using enum Content::Holds;
  using enum Content::On;
  return std::array<Traits, kNumCollectives>{{
      {.collective = Collective::all_reduce,
       .name = "all_reduce",
       .in = {whole, all},
       .out = {whole, all},
       .reduces = true,
       .takes_codec = true,
       .takes_list = true},
      {.collective = Collective::reduce_scatter,
       .name = "reduce_scatter",
       .in = {blocks, all},
       .out = {own, all},
       .reduces = true,
       .takes_codec = true},
      {.collective = Collective::all_gather,
       .name = "all_gather",
       .in = {own, all},
       .out = {blocks, all},
       .takes_codec = true},
      {.collective = Collective::broadcast,
       .name = "broadcast",
       .in = {whole, root},
       .out = {whole, all},
       .rooted = true,
       .takes_list = true},
      {.collective = Collective::reduce,
       .name = "reduce",
       .in = {whole, all},
       .out = {whole, root},
       .reduces = true,
       .rooted = true},
      {.collective = Collective::gather,
       .name = "gather",
       .in = {own, all},
       .out = {blocks, root},
       .rooted = true},
      {.collective = Collective::scatter,
       .name = "scatter",
       .in = {blocks, root},
       .out = {own, all},
       .rooted = true},
      {.collective = Collective::all_to_all,
       .name = "all_to_all",
       .in = {blocks, all},
       .out = {blocks, all},
       .pairwise = true},
      {.collective = Collective::barrier, .name = "barrier", .in = {nothing, all}, .out = {nothing, all}},
      {.collective = Collective::send_recv, .name = "send_recv", .in = {whole, root}, .out = {whole, peer}},
  }};
}();

static_assert([] {
  for (size_t i = 0; i < kTraits.size(); ++i) {
    if (static_cast<size_t>(kTraits[i].collective) != i) return false;
  }
  return true;
}());

inline const Traits& traits(Collective collective) { return kTraits[static_cast<size_t>(collective)]; }
inline const char* name(Collective collective) { return traits(collective).name; }
Collective parse_collective(const std::string& name);  // throws ValueError that lists the names
std::string codec_collectives();                       // "all_reduce, reduce_scatter and all_gather"

}  // namespace pycomm::schedule
