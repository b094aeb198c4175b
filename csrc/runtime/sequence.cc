#include "runtime/sequence.h"

#include <vector>

#include "common/hash.h"

namespace pycomm::runtime {

Sequence& Sequences::messages(std::pair<int, int> pair) {
  const auto found = channels_.find(pair);
  if (found != channels_.end()) return found->second.messages;
  const auto [src, dst] = pair;
  transport::Node& node = *group_.group().node;
  std::atomic<int64_t>& offset = group_.channel_offset(src, dst);
  int64_t there = offset.load(std::memory_order_acquire);
  if (there == 0) {
    const int here = group_.group().mapped(src) + group_.group().mapped(dst);
    const int64_t bytes = Domain::bytes(here, 2), made = node.reserve(bytes);
    if (offset.compare_exchange_strong(there, made, std::memory_order_acq_rel)) {
      there = made;
    } else {
      node.release(made, bytes);
    }
  }
  const std::vector<int> ranks = {group_.group().node_ranks[src], group_.group().node_ranks[dst]};
  const GroupKey key = Hasher(group_.key()).add("pair").add(src).add(dst).digest();
  auto domain = std::make_unique<Domain>(group_.group().node, ranks, group_.rank() == src ? 0 : 1, there,
                                         kBankBytes, key, &group_);
  return channels_.try_emplace(pair, std::move(domain)).first->second.messages;
}

bool Sequences::all_received() {
  bool all = group_.board().all_received();
  for (auto& [pair, channel] : channels_) all = channel.domain->board().all_received() && all;
  return all;
}

}  // namespace pycomm::runtime
