#include "runtime/call_log.h"

#include <chrono>
#include <iterator>
#include <utility>

namespace pycomm::runtime {

int64_t now_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

void CallLog::add(const Domain& group, uint64_t number, const CallRecord& record, int64_t started) {
  CallTimes call{.number = number,
                 .collective = name(record.collective),
                 .algorithm = record.algorithm,
                 .codec = record.codec,
                 .tag = record.tag,
                 .bytes = record.count * static_cast<int64_t>(size_of(record.dtype)),
                 .started = started};
  for (const int rank : group.group().local_ranks) {
    const int64_t arrival = rank == group.rank() ? 0 : group.board().entered_at(rank, number);
    if (arrival == 0) continue;
    if (call.last_rank < 0 || arrival < call.first_arrival) call.first_arrival = arrival;
    if (call.last_rank >= 0 && arrival <= call.last_arrival) continue;
    call.last_arrival = arrival;
    call.last_rank = rank;
  }
  call.finished = now_ns();
  const std::lock_guard lock(mutex_);
  calls_.push_back(std::move(call));
  if (calls_.size() <= capacity_) return;
  calls_.pop_front();
  ++dropped_;
}

CallLog::Taken CallLog::take() {
  const std::lock_guard lock(mutex_);
  Taken taken{{std::make_move_iterator(calls_.begin()), std::make_move_iterator(calls_.end())},
              std::exchange(dropped_, 0)};
  calls_.clear();
  return taken;
}

}  // namespace pycomm::runtime
