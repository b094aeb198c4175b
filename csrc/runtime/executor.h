// Runs a plan on the host: one rank's program over bound buffers, in a domain.
//
// advance() never blocks: it runs steps until the program ends or a wait is not met yet; then blocked_on()
// says what for. Waiting is somebody else's policy (waiter.h), so blocking calls, asynchronous ones and tests
// share this one interpreter. An Observer is told of each step that touches data or a peer before it runs (the kill suite ends the
// process there); the default one is empty and costs nothing.
//
// What is *reachable* of a peer is read through the kernel, as much at once as the plan says: until it is
// there, advance() does not come back. A read that fails, or that cannot be trusted since the peer has ended
// or has left a failed call (and may use its buffer again), stops the run for good: it is blocked on what is
// never met, and the waiter finds the reason.
#pragma once

#include <array>
#include <vector>

#include "kernels/combine.h"
#include "runtime/coding.h"
#include "runtime/domain.h"
#include "schedule/plan.h"

namespace pycomm::runtime {

// A plan with what only this rank needs to run it again and again.
struct Prepared {
  schedule::Plan plan;          // only this rank's program is filled
  std::vector<Format> formats;  // of the operands, in one row for the kernels
  kernels::CombineFn combine = nullptr;
  bool reachable = false;  // inputs are
  CallRecord record;

  Prepared(schedule::Plan plan, int rank);
  const schedule::Program& program(int rank) const { return plan.programs[rank]; }
};

// Where the caller's buffers lie, and those of the other ranks of its node where they are symmetric or told.
struct Bases {
  const char* in = nullptr;
  char* out = nullptr;
  // Symmetric: from the buffer of one of the node's ranks to that of the next one. 0: plain.
  int64_t in_distance = 0, out_distance = 0;
  // Told: by rank, the address here of each rank's `in`, then of each rank's `out`.
  char* const* told = nullptr;
  Coding* coding = nullptr;  // of a call with a codec
};

struct NoObserver {
  void operator()(int /*step*/) const {}
};

struct Blocked {
  const std::atomic<uint64_t>* word = nullptr;
  uint64_t target = 0;
  int peer = -1;
  bool met() const { return word->load(std::memory_order_acquire) >= target; }
};

inline void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline bool reaches(const std::atomic<uint64_t>& word, uint64_t target, int polls) {
  for (int i = 0; i < polls; ++i) {
    if (word.load(std::memory_order_acquire) >= target) return true;
    pause_core();
  }
  return false;
}

class Run {
 public:
  // Call number `call` on `domain`. `wait_for_entries`: the call before was no full exchange. `record` is
  // published once all have entered the call before (earlier, it would replace the record of a call that a
  // slow rank is still in), and must live as long as the run.
  void start(Domain& domain, const Prepared& prepared, const Bases& bases, uint64_t call,
             const CallRecord& record, bool wait_for_entries);

  // True when the program has ended. Throws nothing; a peer that called something else stops it: see
  // mismatched().
  template <class Observer = NoObserver>
  bool advance(int polls = 1, const Observer& observer = {});

  const Blocked& blocked_on() const { return blocked_; }
  int mismatched() const { return mismatched_; }  // that peer, or -1
  // Whether the plan uses peers' buffers where they lie.
  bool shares_buffers() const { return shares_buffers_; }
  uint64_t call() const { return call_; }
  uint64_t fingerprint() const { return fingerprint_; }
  const CallRecord& record() const { return *record_; }

 private:
  void find_peers_buffers(const Bases& bases);
  bool entered();
  // A signal with another fingerprint may come from the peer's next call; its record of this one decides.
  bool agrees(int peer) const;
  void combine(const schedule::Step& step, int64_t trip);
  void transcode(const schedule::Step& step, int64_t trip);
  bool reads_peer(const schedule::Step& step) const {
    const schedule::Operand& source = program_->operands[step.operand + step.num_dsts];
    return source.space == schedule::Space::in && source.rank != domain_->rank();
  }
  bool read(const schedule::Step& step, int64_t trip);  // false: blocked for good
  // Across message links; false: blocked.
  void send(const schedule::Step& step, int64_t trip);
  bool receive(const schedule::Step& step, int64_t trip, int polls);
  bool sent_are_received(int to, int channel, int64_t value, int polls);
  bool earlier_received();
  int64_t slot(int64_t trip) const {
    const schedule::Plan& plan = prepared_->plan;
    return plan.slots == 1 ? 0 : trip % plan.slots * plan.slot_bytes;
  }
  char* address(const schedule::Operand& operand, int64_t trip, int64_t slot) const {
    return links_[operand.rank].bases[static_cast<size_t>(operand.space)] + operand.offset +
           (operand.space == schedule::Space::window ? slot : trip * operand.stride);
  }

  Domain* domain_ = nullptr;
  const Prepared* prepared_ = nullptr;
  const schedule::Program* program_ = nullptr;
  uint64_t call_ = 0, fingerprint_ = 0;
  std::array<std::vector<Link>, 2> links_of_bank_;  // in domain_
  Link* links_ = nullptr;                           // of this call's bank, by rank
  const CallRecord* record_ = nullptr;
  Coding* coding_ = nullptr;
  size_t next_entry_ = 0;  // local ranks before it have entered the call before; past the last: published
  size_t loop_ = 0;
  int64_t iteration_ = 0;
  int32_t step_ = 0;
  Blocked blocked_;
  int mismatched_ = -1;
  bool shares_buffers_ = false;
  std::vector<void*> pointers_;
  // By peer and channel, how much was sent in all calls before this one, and before the one before.
  std::vector<uint64_t> sent_before_, sent_earlier_;
};

inline void Run::combine(const schedule::Step& step, int64_t trip) {
  const schedule::Plan& plan = prepared_->plan;
  const schedule::Operand* operands = &program_->operands[step.operand];
  const int64_t slot_now = slot(trip);
  void** pointers = pointers_.data();
  for (int i = 0; i < step.num_dsts + step.num_srcs; ++i) pointers[i] = address(operands[i], trip, slot_now);
  if (step.transcode >= 0) [[unlikely]]
    return transcode(step, trip);
  prepared_->combine({.dsts = pointers,
                      .srcs = pointers + step.num_dsts,
                      .src_formats = &prepared_->formats[step.operand + step.num_dsts],
                      .num_dsts = step.num_dsts,
                      .num_srcs = step.num_srcs,
                      .dst_format = step.dst_format,
                      .stream = step.stream,
                      .count = static_cast<size_t>(step.count),
                      .prescale = plan.prescale,
                      .divisor = plan.divisor});
}

template <class Observer>
bool Run::advance(int polls, const Observer& observer) {
  using Kind = schedule::Step::Kind;
  if (!entered()) return false;
  const schedule::Program& program = *program_;
  for (; loop_ < program.loops.size(); ++loop_, iteration_ = -1, step_ = 0) {
    const schedule::Loop& loop = program.loops[loop_];
    if (iteration_ < 0) iteration_ = loop.first;
    const int64_t last_trip = loop.first + loop.trips, end = last_trip + loop.stages - 1;
    for (; iteration_ < end; ++iteration_, step_ = 0) {
      for (; step_ < loop.num_steps; ++step_) {
        const schedule::Step& step = program.steps[loop.step + step_];
        const int64_t trip = iteration_ - step.stage;
        if (trip < loop.first || trip >= last_trip) continue;
        switch (step.kind) {
          case Kind::combine:
            observer(loop.step + step_);
            if (prepared_->reachable && reads_peer(step)) [[unlikely]] {
              if (!read(step, trip)) return false;
              break;
            }
            combine(step, trip);
            break;
          case Kind::send:
            observer(loop.step + step_);
            send(step, trip);
            break;
          case Kind::recv:
            observer(loop.step + step_);
            if (!receive(step, trip, polls)) return false;
            break;
          case Kind::complete:
            if (!sent_are_received(step.peer, step.cell, step.value + trip * step.per_trip, polls))
              return false;
            break;
          case Kind::signal: {
            observer(loop.step + step_);
            const Link& link = links_[step.peer];
            link.outgoing[step.cell].signal(call_, step.value + trip * step.per_trip, fingerprint_);
            link.doorbell->ring();
            break;
          }
          case Kind::wait: {
            const int64_t value = step.value + trip * step.per_trip;
            if (value <= 0) break;
            observer(loop.step + step_);
            const Cell& cell = links_[step.peer].incoming[step.cell];
            const uint64_t target = transport::cell_word(call_, value);
            if (!reaches(cell.word, target, polls)) {
              blocked_ = {&cell.word, target, step.peer};
              return false;
            }
            if (cell.fingerprint.load(std::memory_order_relaxed) != fingerprint_ && !agrees(step.peer))
                [[unlikely]] {
              mismatched_ = step.peer;
              return false;
            }
            break;
          }
        }
      }
    }
  }
  return true;
}

}  // namespace pycomm::runtime
