// The first part of lower(): which combine uses each offer of a schedule, and which accept ends it.
#pragma once

#include <string>
#include <vector>

#include "schedule/plan.h"

namespace pycomm::schedule {

// The index-th signal in a trip on a cell from one rank to another, or the index-th message on a channel.
struct Event {
  int cell = 0;
  int index = 0;  // 0: none
};

struct Offer {
  // What match() finds.
  int owner, peer;
  Ref ref;
  int step;         // of the owner's program
  int use = -1;     // of the peer's program: the combine
  int accept = -1;  // of the owner's program
  bool read = false, written = false;

  // How the chunk crosses, which Lowering decides.
  Ref from = ref;         // what is shown: ref, or what ref is a copy of
  bool rides = false;     // the chunk travels in its signal's cell
  bool copy = false;      // the offer copies the chunk into the window
  bool kept = false;      // at the accept, what the peer has sent goes to the window as well
  int encoded = -1;       // which of its owner's encoded chunks is sent, or is decoded in the window
  Event shown{}, done{};  // owner -> peer; peer -> owner
};

struct Matches {
  std::vector<Offer> offers;
  // By rank and step, indices into `offers`: the offer that the step makes or accepts, or those that the
  // combine uses, in the order in which it names them.
  std::vector<std::vector<std::vector<int>>> at_step;
};

// A pure function. Throws ValueError that names the rank and the step if a step names a rank, a block or a
// chunk that does not exist, or if an offer has not exactly one use and one accept (schedule.h).
Matches match(const Schedule& schedule, const Call& call);

// Throws ValueError: "schedule, rank 0, step 3: " and `what`.
[[noreturn]] void malformed(int rank, int step, const std::string& what);
// "image@1 block 0 [1, 2)/4".
std::string words(const Ref& ref);
// Whether two refs of one buffer share elements, whatever the block's length.
bool overlap(const Ref& a, const Ref& b);

}  // namespace pycomm::schedule
