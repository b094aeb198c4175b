// hierarchical: what crosses between nodes crosses once, and all ranks of a node carry a share of it.
//
//   all_reduce      every node sums the shares of the data, each in one of its ranks; ranks of different
//                   nodes with the same share finish it, each a piece, and show it in their nodes. Three
//                   stages, which work on three trips at once. What a rank finishes itself is summed at once.
//   reduce_scatter  every node sums each block of the others in one of its ranks, which shows it to the
//                   block's owner.
//   all_gather      every node fetches each block of the others by one of its ranks, which shows it to the
//                   rest.
//   all_to_all      the ranks of a node write what goes to one rank of another into one of their own, which
//                   sends it there in one message; what stays inside they write into each other's memory.
//                   Three stages.
//   broadcast       along a binomial tree of nodes: their first ranks have all other ranks of their node as
//                   children.
//   reduce          the same tree the other way.
//
// Cost for N nodes of L ranks each: a rank moves 2 S (N-1)/(N L) between nodes in an all_reduce and half of
// it in a reduce_scatter or all_gather, the least possible. In an all_to_all it moves S (N-1)/N, as it would
// by itself, but in N-1 messages of L blocks and not in L (N-1) of one: where all nodes are alike, local rank
// l of a node speaks to local rank l of the others. The choice where memory inside a node is much faster than
// the links between. Nodes may have different numbers of ranks: a share then belongs to one rank of each.
//
// Cho, Finkler, Kung and Hunter, BlueConnect: decomposing all-reduce for deep learning on heterogeneous
// network hierarchy, SysML 2019; broadcast and reduce: Karonis, de Supinski, Foster, Gropp, Lusk and
// Bresnahan, Exploiting hierarchy in parallel computer networks to optimize collective operation
// performance, IPDPS 2000; all_to_all: Träff and Rougier, MPI collectives and datatypes for hierarchical
// all-to-all communication, EuroMPI/ASIA 2014.
#include <algorithm>

#include "schedule/algorithms/all.h"
#include "schedule/algorithms/common.h"

namespace pycomm::schedule {
namespace {

// The rank of a node that drives the share of this number: it sums the share and carries it between nodes.
int driver_of(const Nodes& nodes, int node, int share) {
  const std::vector<int>& members = nodes.members[node];
  return members[share % static_cast<int>(members.size())];
}

// Where a driver shows its node's sum. If it is alone on its node, that is its input.
Ref node_sum(const Nodes& nodes, int driver, Chunk chunk) {
  const bool alone = nodes.members[nodes.node[driver]].size() == 1;
  return {driver, alone ? Buffer::in : Buffer::scratch, chunk};
}

struct Share {
  int driver;
  Chunk chunk;
};

// Every rank of a node shows each share to its driver there.
void show_to_drivers(Builder& b, const std::vector<Share>& shares) {
  for (const Share& share : shares) {
    if (share.driver != b.rank()) b.offer(share.driver, b.in(share.chunk));
  }
}

std::vector<Ref> inputs_of(const std::vector<int>& members, Chunk chunk) {
  std::vector<Ref> inputs;
  for (const int member : members) inputs.push_back(Builder::in_of(member, chunk));
  return inputs;
}

// A driver sums its shares over the node.
void sum_in_node(Builder& b, const Nodes& nodes, const std::vector<Share>& shares) {
  const std::vector<int>& members = nodes.members[nodes.node[b.rank()]];
  if (members.size() == 1) return;
  for (const Share& share : shares) {
    if (share.driver == b.rank()) b.combine({b.scratch(share.chunk)}, inputs_of(members, share.chunk));
  }
}

Schedule all_reduce(const World& world, const Nodes& nodes) {
  Schedule schedule;
  schedule.trip_bytes = 256 << 10;
  schedule.stages = 3;
  const int num_nodes = nodes.count();
  int num_shares = 0;
  for (const auto& members : nodes.members)
    num_shares = std::max(num_shares, static_cast<int>(members.size()));
  const int pieces = num_shares * num_nodes;
  // A share has a piece for each node; these are pieces [first, last).
  const auto run = [&](int share, int first, int last) {
    return Chunk{0, share * num_nodes + first, share * num_nodes + last, pieces};
  };
  const auto whole = [&](int share) { return run(share, 0, num_nodes); };
  const auto piece = [&](int share, int node) { return run(share, node, node + 1); };
  for (int rank = 0; rank < world.size; ++rank) {
    Builder b(schedule, rank);
    const int node = nodes.node[rank];
    std::vector<Share> own, others;
    for (int share = 0; share < num_shares; ++share) {
      const int driver = driver_of(nodes, node, share);
      own.push_back({driver, piece(share, node)});
      if (node > 0) others.push_back({driver, run(share, 0, node)});
      if (node + 1 < num_nodes) others.push_back({driver, run(share, node + 1, num_nodes)});
    }
    show_to_drivers(b, others);
    show_to_drivers(b, own);
    sum_in_node(b, nodes, others);
    b.stage(1);
    for (int share = 0; share < num_shares; ++share) {
      if (driver_of(nodes, node, share) != rank) continue;
      std::vector<Ref> dsts = {b.out(piece(share, node))};
      std::vector<Ref> srcs = inputs_of(nodes.members[node], piece(share, node));
      for (int other = 0; other < num_nodes; ++other) {
        if (other == node) continue;
        const int peer = driver_of(nodes, other, share);
        srcs.push_back(node_sum(nodes, peer, piece(share, node)));
        dsts.push_back(Builder::out_of(peer, piece(share, node)));
        b.offer(peer, node_sum(nodes, rank, piece(share, other)));
        b.offer(peer, b.out(piece(share, other)));
      }
      b.combine(dsts, srcs, /*final=*/true);
    }
    b.stage(2);
    for (const std::vector<Share>* shown : {&others, &own}) {
      for (const Share& part : *shown) {
        if (part.driver != rank) b.accept(part.driver, b.in(part.chunk));
      }
    }
    for (int share = 0; share < num_shares; ++share) {
      const int driver = driver_of(nodes, node, share);
      if (driver != rank) {
        b.copy(b.out(whole(share)), Builder::out_of(driver, whole(share)));
        continue;
      }
      for (int other = 0; other < num_nodes; ++other) {
        if (other != node) b.accept(driver_of(nodes, other, share), b.out(piece(share, other)));
      }
      for (const int member : nodes.members[node]) {
        if (member != rank) b.offer(member, b.out(whole(share)));
      }
    }
  }
  accept_all(schedule);
  return schedule;
}

Schedule reduce_scatter(const World& world, const Nodes& nodes) {
  Schedule schedule;
  const auto driver_in = [&](int node, int block) { return driver_of(nodes, node, nodes.local[block]); };
  for (int rank = 0; rank < world.size; ++rank) {
    Builder b(schedule, rank);
    const int node = nodes.node[rank];
    std::vector<Share> own, others;  // in its own node, a block's driver is its owner
    for (int block = 0; block < world.size; ++block) {
      (nodes.node[block] == node ? own : others).push_back({driver_in(node, block), {block}});
    }
    show_to_drivers(b, others);
    show_to_drivers(b, own);
    sum_in_node(b, nodes, others);
    for (int block = 0; block < world.size; ++block) {
      const bool elsewhere = nodes.node[block] != node;
      if (elsewhere && driver_in(node, block) == rank) b.offer(block, node_sum(nodes, rank, {block}));
    }
    std::vector<Ref> srcs = inputs_of(nodes.members[node], {rank});
    for (int other = 0; other < nodes.count(); ++other) {
      if (other != node) srcs.push_back(node_sum(nodes, driver_in(other, rank), {rank}));
    }
    b.combine({b.out({rank})}, srcs, /*final=*/true);
  }
  accept_all(schedule);
  return schedule;
}

Schedule all_gather(const World& world, const Nodes& nodes) {
  Schedule schedule;
  schedule.stages = 2;
  for (int rank = 0; rank < world.size; ++rank) {
    Builder b(schedule, rank);
    const int node = nodes.node[rank];
    const auto fetches = [&](int block) {
      return nodes.node[block] != node && driver_of(nodes, node, nodes.local[block]) == rank;
    };
    for (int other = 0; other < nodes.count(); ++other) {
      if (other != node) b.offer(driver_of(nodes, other, nodes.local[rank]), b.in({rank}));
    }
    for (int block = 0; block < world.size; ++block) {
      if (fetches(block)) b.copy(b.out({block}), Builder::in_of(block, {block}));
    }
    b.stage(1);
    for (const int member : nodes.members[node]) {
      if (member == rank) continue;
      b.offer(member, b.in({rank}));
      for (int block = 0; block < world.size; ++block) {
        if (fetches(block)) b.offer(member, b.out({block}));
      }
    }
    for (int block = 0; block < world.size; ++block) {
      if (fetches(block)) continue;
      const bool near = nodes.node[block] == node;
      const int driver = near ? block : driver_of(nodes, node, nodes.local[block]);
      b.copy(b.out({block}), {driver, near ? Buffer::in : Buffer::out, {block}});
    }
  }
  accept_all(schedule);
  return schedule;
}

// Who collects what a node's ranks send to each destination: the destination's *collector* in that node. For
// a destination in the node, that is the destination itself; ranks outside are dealt to the node's ranks in
// turn. A collector has a row of image blocks for each of its destinations, with a block for each rank of its
// node.
class Collectors {
 public:
  explicit Collectors(const Nodes& nodes) : nodes_(nodes), order_(nodes.in_order()) {}

  // The destinations of a rank: itself, then ranks outside.
  std::vector<int> destinations(int rank) const {
    std::vector<int> found = {rank};
    const int size = static_cast<int>(members(rank).size());
    int place = 0;
    for (const int other : order_) {
      if (nodes_.node[other] == nodes_.node[rank]) continue;
      if (place++ % size == nodes_.local[rank]) found.push_back(other);
    }
    return found;
  }
  const std::vector<int>& members(int rank) const { return nodes_.members[nodes_.node[rank]]; }
  // The image block in which a collector keeps what `source` sends to the collector's destination of this
  // number.
  Chunk block(int source, int destination) const {
    const int size = static_cast<int>(members(source).size());
    return {destination * size + nodes_.local[source]};
  }

 private:
  const Nodes& nodes_;
  const std::vector<int> order_;
};

Schedule all_to_all(const World& world, const Nodes& nodes) {
  Schedule schedule;
  schedule.stages = 3;
  const Collectors collectors(nodes);
  std::vector<std::vector<int>> destinations;
  for (int rank = 0; rank < world.size; ++rank) destinations.push_back(collectors.destinations(rank));
  const auto num_destinations = [&](int rank) { return static_cast<int>(destinations[rank].size()); };
  for (int rank = 0; rank < world.size; ++rank) {
    Builder b(schedule, rank);
    const std::vector<int>& mates = collectors.members(rank);
    const auto for_each_block_of_mates = [&](auto&& visit) {
      for (const int mate : mates) {
        if (mate == rank) continue;
        for (int d = 0; d < num_destinations(rank); ++d) visit(mate, b.image(collectors.block(mate, d)));
      }
    };
    for_each_block_of_mates([&](int mate, const Ref& block) { b.offer(mate, block); });
    for (const int collector : mates) {
      for (int d = collector == rank ? 1 : 0; d < num_destinations(collector); ++d) {
        b.copy(Builder::image_of(collector, collectors.block(rank, d)), b.in({destinations[collector][d]}));
      }
    }
    b.stage(1);
    for_each_block_of_mates([&](int mate, const Ref& block) { b.accept(mate, block); });
    for (int d = 1; d < num_destinations(rank); ++d) {
      for (const int mate : mates) b.offer(destinations[rank][d], b.image(collectors.block(mate, d)));
    }
    b.stage(2);
    b.copy(b.out({rank}), b.in({rank}));
    for (const int mate : mates) {
      if (mate != rank) b.copy(b.out({mate}), b.image(collectors.block(mate, 0)));
    }
    for (int collector = 0; collector < world.size; ++collector) {
      for (int d = 1; d < num_destinations(collector); ++d) {
        if (destinations[collector][d] != rank) continue;
        for (const int source : collectors.members(collector)) {
          b.copy(b.out({source}), Builder::image_of(collector, collectors.block(source, d)));
        }
      }
    }
  }
  accept_all(schedule);
  return schedule;
}

// The root's node comes first, with the root as its head.
Tree binomial_of_nodes(const World& world, const Nodes& nodes) {
  const int num_nodes = nodes.count(), first = nodes.node[world.root];
  const auto head = [&](int node) { return node == first ? world.root : nodes.members[node][0]; };
  std::vector<int> parent(world.size, -1);
  for (int place = 0; place < num_nodes; ++place) {
    const int node = (first + place) % num_nodes;
    for (const int member : nodes.members[node]) parent[member] = head(node);
    parent[head(node)] = place == 0 ? -1 : head((first + (place & (place - 1))) % num_nodes);
  }
  return Tree(parent);
}

}  // namespace

Schedule hierarchical(const World& world) {
  if (world.size == 1) return alone(world);
  const Nodes nodes(world);
  switch (world.collective) {
    case Collective::all_reduce:
      return all_reduce(world, nodes);
    case Collective::reduce_scatter:
      return reduce_scatter(world, nodes);
    case Collective::all_gather:
      return all_gather(world, nodes);
    case Collective::all_to_all:
      return all_to_all(world, nodes);
    case Collective::broadcast:
    case Collective::reduce:
      return along_tree(world, binomial_of_nodes(world, nodes), /*trip_bytes=*/256 << 10);
    case Collective::gather:
    case Collective::scatter:
    case Collective::barrier:
    case Collective::send_recv:
      break;  // not in the table of algorithms
  }
  return {};
}

}  // namespace pycomm::schedule
