#include "runtime/executor.h"

#include <algorithm>
#include <cstring>

namespace pycomm::runtime {

Prepared::Prepared(schedule::Plan p, int rank) : plan(std::move(p)) {
  for (const schedule::Operand& operand : program(rank).operands) formats.push_back(operand.format);
  combine = kernels::find_combine(plan.call.dtype, plan.call.op);
  const schedule::Call& call = plan.call;
  record.fingerprint = plan.fingerprint;
  record.count =
      call.world.collective == Collective::all_to_all ? schedule::in_elements(call, rank) : call.counts[0];
  record.root = call.world.root;
  record.collective = call.world.collective;
  record.dtype = call.dtype;
  record.op = call.op;
  record.prescale = call.prescale;
  record.in = call.in;
  record.out = call.out;
  std::strncpy(record.algorithm, plan.algorithm.c_str(), sizeof record.algorithm - 1);
}

void Run::start(Domain& domain, const Prepared& prepared, const Buffers& buffers, uint64_t call,
                const CallRecord& record, bool wait_for_entries) {
  domain_ = &domain;
  prepared_ = &prepared;
  program_ = &prepared.program(domain.rank());
  call_ = call;
  fingerprint_ = record.fingerprint;
  const int me = domain.rank();
  outgoing_ = domain.cells(0, me, call);
  incoming_ = domain.cells(me, 0, call);
  next_outgoing_ = domain.next_reader();
  next_incoming_ = domain.next_writer();
  constexpr int64_t cell = schedule::kCellBytes;
  bases_ = {const_cast<char*>(buffers.in) - me * buffers.in_distance, buffers.out - me * buffers.out_distance,
            domain.bank(0, call), outgoing_->payload, incoming_->payload};
  distances_ = {buffers.in_distance, buffers.out_distance, domain.bank(1, call) - domain.bank(0, call),
                next_outgoing_ * cell, next_incoming_ * cell};
  next_entry_ = wait_for_entries ? 0 : domain.size();
  loop_ = 0;
  iteration_ = -1;
  step_ = 0;
  mismatched_ = -1;
  if (pointers_.size() < prepared.formats.size()) pointers_.resize(prepared.formats.size());
  record_ = &record;
}

bool Run::entered() {
  if (next_entry_ > domain_->size()) return true;
  for (; next_entry_ < domain_->size(); ++next_entry_) {
    const std::atomic<uint64_t>& entered = domain_->member(next_entry_).entered;
    if (entered.load(std::memory_order_acquire) + 1 < call_) {
      blocked_ = {&entered, call_ - 1, next_entry_};
      return false;
    }
    if (domain_->fingerprint_of(next_entry_, call_ - 1) !=
        domain_->fingerprint_of(domain_->rank(), call_ - 1)) {
      blocked_ = {&entered, call_ - 1, next_entry_};
      mismatched_ = next_entry_;
      return false;
    }
  }
  domain_->enter(call_, *record_);
  ++next_entry_;
  return true;
}

bool Run::agrees(int peer) const {
  const auto record = domain_->record_of(peer, call_);
  return record && record->fingerprint == fingerprint_;
}

}  // namespace pycomm::runtime
