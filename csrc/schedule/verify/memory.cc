#include "schedule/verify/memory.h"

#include <algorithm>

namespace pycomm::schedule {

namespace {
void append(std::vector<Memory::Piece>& pieces, const Memory::Piece& piece) {
  if (!pieces.empty() && pieces.back().value == piece.value && pieces.back().call == piece.call) {
    pieces.back().end = piece.end;
  } else {
    pieces.push_back(piece);
  }
}
}  // namespace

Memory::Map::iterator Memory::split(int64_t at) {
  auto found = std::prev(segments_.upper_bound(at));
  if (found->first == at) return found;
  Interval rest = found->second;
  found->second.end = at;
  return segments_.emplace_hint(std::next(found), at, std::move(rest));
}

std::optional<Conflict> Memory::read(int64_t begin, int64_t end, const Access& access, const Clock& clock,
                                     std::vector<Piece>& pieces) {
  pieces.clear();
  split(end);
  for (auto at = split(begin); at->first < end; ++at) {
    Interval& interval = at->second;
    if (!interval.write.before(clock, access.rank))
      return Conflict{at->first, interval.end, interval.write, true};
    auto known = std::find_if(interval.reads.begin(), interval.reads.end(),
                              [&](const Access& read) { return read.rank == access.rank; });
    if (known == interval.reads.end()) {
      interval.reads.push_back(access);
    } else {
      *known = access;
    }
    append(pieces, {at->first, interval.end, interval.value, interval.write.call});
  }
  return std::nullopt;
}

std::optional<Conflict> Memory::check_write(int64_t begin, int64_t end, const Access& access,
                                            const Clock& clock) {
  for (auto at = std::prev(segments_.upper_bound(begin)); at != segments_.end() && at->first < end; ++at) {
    const Interval& interval = at->second;
    const int64_t from = std::max(at->first, begin), to = std::min(interval.end, end);
    if (!interval.write.before(clock, access.rank)) return Conflict{from, to, interval.write, true};
    for (const Access& read : interval.reads) {
      if (!read.before(clock, access.rank)) return Conflict{from, to, read, false};
    }
  }
  return std::nullopt;
}

void Memory::put(int64_t begin, int64_t end, const Value& value, const Access& access) {
  auto last = split(end);
  auto first = split(begin);
  first->second = {end, value, access, {}};
  segments_.erase(std::next(first), last);
}

std::vector<Memory::Piece> Memory::look(int64_t begin, int64_t end) const {
  std::vector<Piece> pieces;
  for (auto at = std::prev(segments_.upper_bound(begin)); at != segments_.end() && at->first < end; ++at) {
    const Interval& interval = at->second;
    append(pieces,
           {std::max(at->first, begin), std::min(interval.end, end), interval.value, interval.write.call});
  }
  return pieces;
}

}  // namespace pycomm::schedule
