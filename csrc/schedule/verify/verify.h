// Proves a plan: runs all its ranks symbolically, on exactly what the executor gets.
//
// Every memory location holds an *expression* (leaves: rank and element index of an input; nodes: operator
// with ordered operands, accumulation type, conversions, scale, rounding). Signals have one writer and only
// grow, and a wait names its writer, so one run, in any order that the waits allow, covers all interleavings;
// what is ordered is known from vector clocks. Shown are:
//
//   data      at the end every output element of every rank holds an expression that the collective allows
//             (reductions: each rank's element once, prescaled once, rounded and divided once at the end),
//             the same on all ranks; where `balanced` is asked, in the shape of the balanced tree; inputs not
//             meant to change have not changed; with a codec on message links alone, what crosses between
//             nodes is encoded and nothing else is
//   races     no two accesses to overlapping bytes, one of them a write, are unordered; the caller's own
//             reads and writes of its buffers before entry and after the end are accesses too
//   bounds    every address lies in its buffer, or in its slot of its bank
//   deadlock  every rank reaches its end, with messages that are not buffered: what a rank sends stays in its
//             memory until it is received, and all that is sent is received
//   banks     the same for calls that follow each other (`verify_sequence`), with the entry rule of plan.h;
//             and full_exchange is claimed only where it holds
//
// Loops of more trips than fill every slot, stage and signal distance are cut to that number (the address of
// a trip is linear in its number, and slots repeat), unless `all_trips`.
#pragma once

#include <optional>
#include <span>
#include <string>

#include "schedule/plan.h"

namespace pycomm::schedule {

struct Counterexample {
  enum class Kind : uint8_t { data, race, bounds, deadlock, exchange, malformed };
  Kind kind;
  int rank;          // where it shows
  int call = 0;      // which call of a sequence
  int step = -1;     // index into the program's steps; -1: at the end
  std::string what;  // in words: rank, step, byte range, what is there, what should be
};

struct VerifyOptions {
  bool all_trips = false;
  bool balanced = false;  // demand the balanced tree
};

// Nothing: the plan is proved. The calls of a sequence are made by one group: ValueError if their worlds
// differ in size or nodes.
std::optional<Counterexample> verify(const Plan& plan, const VerifyOptions& options = {});
std::optional<Counterexample> verify_sequence(std::span<const Plan* const> calls,
                                              const VerifyOptions& options = {});

}  // namespace pycomm::schedule
