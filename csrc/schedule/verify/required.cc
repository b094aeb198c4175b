#include "schedule/verify/required.h"

#include <algorithm>
#include <numeric>

namespace pycomm::schedule {

namespace {

// Elements of the blocks before `block`.
int64_t displacement(const Call& call, int block) {
  return std::accumulate(call.counts.begin(), call.counts.begin() + block, int64_t{0});
}

}  // namespace

CallerMemory buffers_of(const Call& call, int rank) {
  const auto item = static_cast<int64_t>(size_of(call.dtype));
  CallerMemory buffers;
  buffers.in_bytes = in_elements(call, rank) * item;
  buffers.out_bytes = out_elements(call, rank) * item;
  if (!call.in_place) {
    buffers.out_begin = buffers.in_bytes;
    return buffers;
  }
  switch (call.world.collective) {
    case Collective::all_gather:
    case Collective::gather:
      buffers.in_begin = displacement(call, rank) * item;
      break;
    case Collective::reduce_scatter:
    case Collective::scatter:
      buffers.out_begin = displacement(call, rank) * item;
      break;
    case Collective::all_reduce:
    case Collective::broadcast:
    case Collective::reduce:
    case Collective::all_to_all:
    case Collective::barrier:
    case Collective::send_recv:
      break;
  }
  return buffers;
}

std::vector<Required> required_of(const Call& call, int rank) {
  const World& world = call.world;
  std::vector<Required> required;
  switch (world.collective) {
    case Collective::all_reduce:
      required.push_back({0, call.counts[0], Required::kReduced, 0});
      break;
    case Collective::reduce:
      if (rank == world.root) required.push_back({0, call.counts[0], Required::kReduced, 0});
      break;
    case Collective::reduce_scatter:
      required.push_back({0, call.counts[rank], Required::kReduced, displacement(call, rank)});
      break;
    case Collective::gather:
      if (rank != world.root) break;
      [[fallthrough]];
    case Collective::all_gather:
      for (int source = 0; source < world.size; ++source) {
        const int64_t begin = displacement(call, source);
        required.push_back({begin, begin + call.counts[source], source, -begin});
      }
      break;
    case Collective::broadcast:
      required.push_back({0, call.counts[0], world.root, 0});
      break;
    case Collective::scatter:
      required.push_back({0, call.counts[rank], world.root, displacement(call, rank)});
      break;
    case Collective::all_to_all: {
      int64_t begin = 0;
      for (int source = 0; source < world.size; ++source) {
        const auto row = call.counts.begin() + static_cast<std::ptrdiff_t>(source) * world.size;
        const int64_t end = begin + row[rank];
        required.push_back({begin, end, source, std::accumulate(row, row + rank, int64_t{0}) - begin});
        begin = end;
      }
      break;
    }
    case Collective::send_recv:
      if (rank == world.peer) required.push_back({0, call.counts[0], world.root, 0});
      break;
    case Collective::barrier:
      break;
  }
  return required;
}

bool same_results(Collective collective) {
  switch (collective) {
    case Collective::all_reduce:
    case Collective::all_gather:
    case Collective::broadcast:
      return true;
    case Collective::reduce_scatter:
    case Collective::reduce:
    case Collective::gather:
    case Collective::scatter:
    case Collective::all_to_all:
    case Collective::barrier:
    case Collective::send_recv:
      return false;
  }
  return true;
}

bool synchronises(Collective collective) {
  switch (collective) {
    case Collective::barrier:
      return true;
    case Collective::all_reduce:
    case Collective::reduce_scatter:
    case Collective::all_gather:
    case Collective::broadcast:
    case Collective::reduce:
    case Collective::gather:
    case Collective::scatter:
    case Collective::all_to_all:
    case Collective::send_recv:
      return false;
  }
  return true;
}

bool encodable(Collective collective) {
  switch (collective) {
    case Collective::all_reduce:
    case Collective::reduce_scatter:
    case Collective::all_gather:
      return true;
    case Collective::broadcast:
    case Collective::reduce:
    case Collective::gather:
    case Collective::scatter:
    case Collective::all_to_all:
    case Collective::barrier:
    case Collective::send_recv:
      return false;
  }
  return false;
}

std::optional<std::string> call_fault(const Call& call) {
  const World& world = call.world;
  const auto n = static_cast<size_t>(std::max(world.size, 0));
  size_t counts = 1;
  bool reduces = false, pairwise = false;
  switch (world.collective) {
    case Collective::all_gather:
    case Collective::gather:
    case Collective::scatter:
      counts = n;
      break;
    case Collective::reduce_scatter:
      counts = n;
      reduces = true;
      break;
    case Collective::all_to_all:
      counts = n * n;
      pairwise = true;
      break;
    case Collective::all_reduce:
    case Collective::reduce:
      reduces = true;
      break;
    case Collective::broadcast:
    case Collective::barrier:
    case Collective::send_recv:
      break;
  }
  if (world.size < 1) return "a world of " + std::to_string(world.size) + " ranks";
  if (call.counts.size() != counts) {
    return std::to_string(call.counts.size()) + " counts; " + name(world.collective) + " of " +
           std::to_string(n) + " ranks takes " + std::to_string(counts);
  }
  for (int64_t count : call.counts) {
    if (count < 0) return "a count of " + std::to_string(count);
  }
  if (world.root < 0 || world.root >= world.size || world.peer < 0 || world.peer >= world.size) {
    return "root " + std::to_string(world.root) + " and peer " + std::to_string(world.peer) +
           " in a world of " + std::to_string(world.size);
  }
  if (call.in_place && pairwise) {
    for (size_t i = 0; i < n * n; ++i) {
      if (call.counts[i] != call.counts[i % n * n + i / n]) {
        return "in place, but rank " + std::to_string(i / n) + " sends " + std::to_string(call.counts[i]) +
               " elements to rank " + std::to_string(i % n) + " and receives " +
               std::to_string(call.counts[i % n * n + i / n]) + ": the blocks would lie elsewhere";
      }
    }
  }
  if (call.out == Placement::reachable) return "a reachable `out`: peers can only read such memory";
  if (call.coded()) {
    if (!encodable(world.collective)) return std::string("a codec in ") + name(world.collective);
    if (!takes_codec(call.dtype) || (call.op != Op::sum && call.op != Op::avg)) {
      return std::string("a codec of ") + name(call.dtype) + ", " + name(call.op);
    }
    if (call.in != Placement::plain || call.out != Placement::plain) {
      return "a codec, and buffers that are not plain";
    }
  }
  if (call.prescale != 1.0 && !reduces) {
    return std::string(name(world.collective)) + " does not scale";
  }
  return std::nullopt;
}

}  // namespace pycomm::schedule
