#include "runtime/domain.h"

#include <utility>

#include "transport/memory.h"

namespace pycomm::runtime {

using transport::Board;

namespace {

int64_t header_bytes(int local, int size) {
  const int64_t n = size, m = local;
  return transport::round_up(
      Board::bytes(local) +
          static_cast<int64_t>(m * m * 2 * kCellsPerPair * sizeof(Cell) + n * n * sizeof(int64_t) +
                               ((m + 63) / 64 + 1) * sizeof(uint64_t)),
      transport::kSmallPage);
}

}  // namespace

int64_t Domain::bytes(int local, int size, int64_t bank_bytes) {
  return header_bytes(local, size) + 2 * local * bank_bytes;
}

Domain::Domain(std::shared_ptr<transport::Node> node, std::vector<int> node_ranks, int rank, int64_t offset,
               int64_t bank_bytes, GroupKey key, Domain* parent)
    : group_(std::move(node), std::move(node_ranks), rank),
      key_(key),
      bank_bytes_(bank_bytes),
      offset_(offset),
      mapping_(group_.node->map(offset, bytes(group_.local_size(), size(), bank_bytes))),
      board_(group_, key, mapping_, mapping_->data(), parent ? &parent->board_ : nullptr) {
  const int local = group_.local_size();
  cells_ = reinterpret_cast<Cell*>(mapping_->data() + Board::bytes(local));
  channels_ = reinterpret_cast<std::atomic<int64_t>*>(cells_ + local * local * 2 * kCellsPerPair);
  let_go_ = reinterpret_cast<std::atomic<uint64_t>*>(channels_ + size() * size());
  told_from_ = let_go_ + (local + 63) / 64;
  windows_ = mapping_->data() + header_bytes(local, size());
}

Cell* Domain::cells(int reader, int writer, uint64_t call) const {
  const int pair = group_.places[reader] * group_.local_size() + group_.places[writer];
  return cells_ + (pair * 2 + (call & 1)) * kCellsPerPair;
}

std::vector<Link> Domain::links(uint64_t call) const {
  std::vector<Link> links(size());
  for (const int r : group_.local_ranks) {
    Cell *const outgoing = cells(r, rank(), call), *const incoming = cells(rank(), r, call);
    links[r] = {.bases = {nullptr, nullptr, bank(r, call), outgoing->payload, incoming->payload},
                .outgoing = outgoing,
                .incoming = incoming,
                .doorbell = &board_.waker(r).doorbell};
  }
  return links;
}

void Domain::wish_to_tell(uint64_t call) const {
  uint64_t from = told_from_->load(std::memory_order_relaxed);
  while (from == 0 || from > call + 2) {
    if (told_from_->compare_exchange_weak(from, call + 2)) return;
  }
}

void Domain::let_go() {
  board_.end_messages();  // before the memory that they lie in
  const auto begin = reinterpret_cast<char*>(channels_) - mapping_->data();
  std::vector<int> ranks;
  for (const int r : group_.local_ranks) ranks.push_back(group_.node_ranks[r]);
  group_.node->let_go({.mapping = mapping_,
                       .offset = offset_,
                       .bytes = bytes(group_.local_size(), size(), bank_bytes_),
                       .let_go = let_go_,
                       .ranks = std::move(ranks),
                       .me = group_.places[rank()],
                       .with_it = [offset = offset_, begin, local = group_.local_size(),
                                   places = group_.places](transport::Node& node) {
                         const auto n = static_cast<int>(places.size());
                         const auto header = node.map(offset, header_bytes(local, n));
                         const auto* channels =
                             reinterpret_cast<const std::atomic<int64_t>*>(header->data() + begin);
                         for (int pair = 0; pair < n * n; ++pair) {
                           const int64_t offset = channels[pair].load(std::memory_order_acquire);
                           const int src = pair / n, dst = pair % n,
                                     here = (places[src] >= 0) + (places[dst] >= 0);
                           if (offset != 0 && src != dst) node.release(offset, bytes(here, 2));
                         }
                       }});
}

}  // namespace pycomm::runtime
