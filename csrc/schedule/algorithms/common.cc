#include "schedule/algorithms/common.h"

#include <algorithm>
#include <utility>

namespace pycomm::schedule {

Schedule alone(const World& world) {
  Schedule schedule;
  Builder b(schedule, 0);
  switch (world.collective) {
    case Collective::all_reduce:
    case Collective::reduce_scatter:
    case Collective::reduce:
      b.combine({b.out()}, {b.in()}, /*final=*/true);
      break;
    case Collective::all_gather:
    case Collective::broadcast:
    case Collective::gather:
    case Collective::scatter:
    case Collective::all_to_all:
    case Collective::send_recv:
      b.copy(b.out(), b.in());
      break;
    case Collective::barrier:
      break;
  }
  return schedule;
}

void accept_all(Schedule& schedule) {
  using Kind = ScheduleStep::Kind;
  for (std::vector<ScheduleStep>& program : schedule.ranks) {
    std::vector<ScheduleStep> open;
    for (const ScheduleStep& step : program) {
      if (step.kind == Kind::offer) open.push_back(step);
      if (step.kind != Kind::accept) continue;
      const auto same = [&](const ScheduleStep& offer) {
        return offer.peer == step.peer && offer.srcs == step.srcs;
      };
      const auto offer = std::find_if(open.begin(), open.end(), same);
      if (offer != open.end()) open.erase(offer);
    }
    for (ScheduleStep& step : open) {
      step.kind = Kind::accept;
      step.stage = schedule.stages - 1;
      program.push_back(std::move(step));
    }
  }
}

Nodes::Nodes(const World& world) : node(world.size), local(world.size) {
  std::vector<int> seen;
  for (int rank = 0; rank < world.size; ++rank) {
    const int name = world.nodes.empty() ? 0 : world.nodes[rank];
    const auto known = std::find(seen.begin(), seen.end(), name);
    node[rank] = static_cast<int>(known - seen.begin());
    if (known == seen.end()) {
      seen.push_back(name);
      members.emplace_back();
    }
    local[rank] = static_cast<int>(members[node[rank]].size());
    members[node[rank]].push_back(rank);
  }
}

std::vector<int> Nodes::in_order() const {
  std::vector<int> order;
  for (const std::vector<int>& ranks : members) order.insert(order.end(), ranks.begin(), ranks.end());
  return order;
}

Tree::Tree(std::vector<int> parents) : parent(std::move(parents)), children(parent.size()) {
  for (size_t rank = 0; rank < parent.size(); ++rank) {
    if (parent[rank] >= 0) children[parent[rank]].push_back(static_cast<int>(rank));
    int links = 0;
    for (int above = parent[rank]; above >= 0; above = parent[above]) ++links;
    depth = std::max(depth, links);
  }
}

void reduce_up(Builder& b, const Tree& tree, Chunk chunk) {
  const auto shown = [&](int rank) {
    return Ref{rank, tree.children[rank].empty() ? Buffer::in : Buffer::scratch, chunk};
  };
  const int parent = tree.parent[b.rank()];
  std::vector<Ref> srcs = {b.in(chunk)};
  for (int child : tree.children[b.rank()]) srcs.push_back(shown(child));
  if (parent < 0) {
    b.combine({b.out(chunk)}, srcs, /*final=*/true);
    return;
  }
  if (srcs.size() > 1) b.combine({b.scratch(chunk)}, srcs);
  b.offer(parent, shown(b.rank()));
}

void broadcast_down(Builder& b, const Tree& tree, Chunk chunk, Buffer source) {
  const auto shown = [&](int rank) { return Ref{rank, tree.parent[rank] < 0 ? source : Buffer::out, chunk}; };
  const int parent = tree.parent[b.rank()];
  if (parent >= 0) b.copy(b.out(chunk), shown(parent));
  for (int child : tree.children[b.rank()]) b.offer(child, shown(b.rank()));
}

Schedule along_tree(const World& world, const Tree& tree, int64_t trip_bytes) {
  if (world.size == 1) return alone(world);
  Schedule schedule;
  schedule.trip_bytes = trip_bytes;
  // A rank goes on to the next trip while its readers are still at this one.
  schedule.stages = 2;
  for (int rank = 0; rank < world.size; ++rank) {
    Builder b(schedule, rank);
    if (world.collective == Collective::reduce) {
      reduce_up(b, tree, {});
    } else {
      broadcast_down(b, tree, {}, Buffer::in);
      if (tree.parent[rank] < 0) b.copy(b.out(), b.in());
    }
  }
  accept_all(schedule);
  return schedule;
}

}  // namespace pycomm::schedule
