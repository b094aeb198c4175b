#include "runtime/executor.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace pycomm::runtime {

namespace {
const std::atomic<uint64_t> kNever{0};
constexpr int kChannels = transport::Messages::kChannels;
}  // namespace

Prepared::Prepared(schedule::Plan p, int rank) : plan(std::move(p)) {
  for (const schedule::Operand& operand : program(rank).operands) formats.push_back(operand.format);
  combine = kernels::find_combine(plan.call.dtype, plan.call.op);
  reachable = plan.call.in == schedule::Placement::reachable;
  const schedule::Call& call = plan.call;
  record.fingerprint = plan.fingerprint;
  record.count = call.world.traits().pairwise ? schedule::in_elements(call, rank) : call.counts[0];
  record.root = call.world.root;
  record.collective = call.world.collective;
  record.ragged = call.ragged;
  record.dtype = call.dtype;
  record.op = call.op;
  record.prescale = call.prescale;
  record.in = call.in;
  record.out = call.out;
  std::strncpy(record.algorithm, plan.algorithm.c_str(), sizeof record.algorithm - 1);
}

void Run::start(Domain& domain, const Prepared& prepared, const Bases& bases, uint64_t call,
                const CallRecord& record, bool wait_for_entries) {
  if (domain_ != &domain) links_of_bank_ = {domain.links(0), domain.links(1)};
  domain_ = &domain;
  prepared_ = &prepared;
  program_ = &prepared.program(domain.rank());
  call_ = call;
  fingerprint_ = record.fingerprint;
  links_ = links_of_bank_[call & 1].data();
  Link& own = links_[domain.rank()];
  own.bases[static_cast<size_t>(schedule::Space::in)] = const_cast<char*>(bases.in);
  own.bases[static_cast<size_t>(schedule::Space::out)] = bases.out;
  shares_buffers_ = (bases.in_distance | bases.out_distance) != 0 || bases.told;
  if (shares_buffers_) find_peers_buffers(bases);
  next_entry_ = wait_for_entries ? 0 : domain.group().local_ranks.size();
  loop_ = 0;
  iteration_ = -1;
  step_ = 0;
  mismatched_ = -1;
  if (pointers_.size() < prepared.formats.size()) pointers_.resize(prepared.formats.size());
  record_ = &record;
  coding_ = bases.coding;
  if (!domain.board().messages()) return;
  sent_earlier_ = std::move(sent_before_);
  sent_before_.resize(static_cast<size_t>(domain.size()) * kChannels);
  for (int to = 0; to < domain.size(); ++to) {
    for (int channel = 0; channel < kChannels; ++channel) {
      sent_before_[to * kChannels + channel] = domain.board().messages()->sent(to, channel);
    }
  }
}

// A plan names those of peers only where they are symmetric or told.
void Run::find_peers_buffers(const Bases& bases) {
  constexpr auto in = static_cast<size_t>(schedule::Space::in),
                 out = static_cast<size_t>(schedule::Space::out);
  const int me = domain_->group().places[domain_->rank()];
  for (const int rank : domain_->group().local_ranks) {
    const int64_t away = domain_->group().places[rank] - me;
    Link& link = links_[rank];
    link.bases[in] = bases.told ? bases.told[rank] : const_cast<char*>(bases.in) + away * bases.in_distance;
    link.bases[out] = bases.told ? bases.told[domain_->size() + rank] : bases.out + away * bases.out_distance;
  }
}

// ---- messages ----

void Run::send(const schedule::Step& step, int64_t trip) {
  const schedule::Operand& from = program_->operands[step.operand];
  const int64_t bytes = schedule::operand_bytes(prepared_->plan.call, from.format, step.count);
  domain_->board().messages()->send(step.peer, step.cell, {call_, fingerprint_},
                                    address(from, trip, slot(trip)), bytes);
}

bool Run::receive(const schedule::Step& step, int64_t trip, int polls) {
  transport::Messages& messages = *domain_->board().messages();
  const std::atomic<uint64_t>& arrived = messages.arrived(step.peer, step.cell);
  const uint64_t target = messages.taken(step.peer, step.cell) + 1;
  if (!reaches(arrived, target, polls)) {
    blocked_ = {&arrived, target, step.peer};
    return false;
  }
  const auto header = messages.header(step.peer, step.cell);
  if (header && *header != transport::Header{call_, fingerprint_}) {
    blocked_ = {&arrived, target, step.peer};
    mismatched_ = step.peer;
    return false;
  }
  const schedule::Operand& to = program_->operands[step.operand];
  const int64_t bytes = schedule::operand_bytes(prepared_->plan.call, to.format, step.count);
  if (header && messages.receive(step.peer, step.cell, address(to, trip, slot(trip)), bytes)) return true;
  blocked_ = {&kNever, 1, step.peer};
  return false;
}

bool Run::sent_are_received(int to, int channel, int64_t value, int polls) {
  if (value <= 0) return true;
  const std::atomic<uint64_t>& received = domain_->board().messages()->received(to, channel);
  const uint64_t target = sent_before_[to * kChannels + channel] + static_cast<uint64_t>(value);
  if (reaches(received, target, polls)) return true;
  blocked_ = {&received, target, to};
  return false;
}

// The call writes the bank that the call before the last one sent from.
bool Run::earlier_received() {
  const transport::Messages& messages = *domain_->board().messages();
  for (size_t at = 0; at < sent_earlier_.size(); ++at) {
    const int to = static_cast<int>(at) / kChannels;
    const std::atomic<uint64_t>& received = messages.received(to, static_cast<int>(at) % kChannels);
    if (received.load(std::memory_order_acquire) >= sent_earlier_[at]) continue;
    blocked_ = {&received, sent_earlier_[at], to};
    return false;
  }
  return true;
}

bool Run::entered() {
  const std::vector<int>& ranks = domain_->group().local_ranks;
  if (next_entry_ > ranks.size()) return true;
  for (; next_entry_ < ranks.size(); ++next_entry_) {
    const int rank = ranks[next_entry_];
    const std::atomic<uint64_t>& entered = domain_->board().member(rank).entered;
    if (entered.load(std::memory_order_acquire) + 1 < call_) {
      blocked_ = {&entered, call_ - 1, rank};
      return false;
    }
    if (domain_->board().fingerprint_of(rank, call_ - 1) !=
        domain_->board().fingerprint_of(domain_->rank(), call_ - 1)) {
      blocked_ = {&entered, call_ - 1, rank};
      mismatched_ = rank;
      return false;
    }
  }
  if (!sent_earlier_.empty() && !earlier_received()) return false;
  if (prepared_->reachable) {
    const char* input = links_[domain_->rank()].bases[static_cast<size_t>(schedule::Space::in)];
    domain_->board().show_address(call_, reinterpret_cast<uint64_t>(input));
  }
  enter(domain_->board(), call_, *record_);
  ++next_entry_;
  return true;
}

// combine() has put the operands' addresses in pointers_.
void Run::transcode(const schedule::Step& step, int64_t trip) {
  const schedule::Plan& plan = prepared_->plan;
  const schedule::Transcode& how = program_->transcodes[step.transcode];
  const double divisor = how.divides ? plan.divisor : 1.0;
  const int64_t shift = trip * how.stride;
  kernels::Encoding encoding{.step = coding_->step,
                             .turn = how.turn,
                             .rank = static_cast<uint32_t>(domain_->rank()),
                             .index = how.index + shift,
                             .segments = coding_->segments};
  Residuals* const residuals = coding_->residuals.get();
  if (residuals) {
    encoding.residual = residuals->now() + how.element + shift;
    encoding.next_residual = residuals->next() + how.element + shift;
    encoding.residual_scale = coding_->residual_scale / static_cast<float>(divisor);
  }
  kernels::transcode({.codec = &coding_->codec,
                      .dtype = plan.call.dtype,
                      .dsts = pointers_.data(),
                      .srcs = pointers_.data() + step.num_dsts,
                      .src_formats = &prepared_->formats[step.operand + step.num_dsts],
                      .num_dsts = step.num_dsts,
                      .num_srcs = step.num_srcs,
                      .dst_format = step.dst_format,
                      .stream = step.stream,
                      .count = static_cast<size_t>(step.count),
                      .prescale = plan.prescale,
                      .divisor = divisor,
                      .encoding = encoding,
                      .finite = residuals ? &coding_->finite : nullptr});
}

bool Run::read(const schedule::Step& step, int64_t trip) {
  const schedule::Operand& to = program_->operands[step.operand];
  const schedule::Operand& from = program_->operands[step.operand + 1];
  const int64_t bytes = step.count * static_cast<int64_t>(size_of(prepared_->plan.call.dtype));
  const int error = domain_->group().read(
      from.rank, address(to, trip, slot(trip)),
      domain_->board().address_of(from.rank, call_) + static_cast<uint64_t>(from.offset + trip * from.stride),
      bytes);
  if (error == 0 && !domain_->board().failed()) return true;
  if (error != 0 && error != ESRCH) {
    domain_->board().fail(FailureKind::aborted,
                          domain_->board().name() + " could not read " + std::to_string(bytes) +
                              " bytes of " + domain_->board().name_of(from.rank) + "'s memory in " +
                              describe(*record_) + ": " + std::strerror(error) +
                              ". Set PYCOMM_SINGLE_COPY=0 on all ranks to share memory by windows alone.");
  }
  blocked_ = {&kNever, 1, from.rank};
  return false;
}

bool Run::agrees(int peer) const {
  const auto record = record_of(domain_->board(), peer, call_);
  return record && record->fingerprint == fingerprint_;
}

}  // namespace pycomm::runtime
