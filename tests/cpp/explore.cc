#include "explore.h"

#include <algorithm>
#include <unordered_set>
#include <utility>

#include "explore_programs.h"
#include "symbols.h"

namespace explore {

namespace {

class Search : Programs {
 public:
  Search(const std::vector<const Plan*>& calls, bool balanced, size_t max_states)
      : Programs(calls), balanced_(balanced), max_states_(max_states) {}

  Verdict run() {
    try {
      write_out();
      start();
      find_conflicts();
    } catch (const Impossible& fault) {
      return {true, true, fault.why, 0};
    }
    at_.assign(n_, 0);
    visit();
    verdict_.states = seen_.size();
    return verdict_;
  }

 private:
  struct Encoded {
    int64_t begin, end;  // elements of the rank's input
    int turn, symbol;
  };
  void start() {
    memory_.assign(top_, 0);
    cells_.assign(static_cast<size_t>(n_) * n_ * cells_per_pair_ + 2 * sends_.size(), 0);
    for (size_t c = 0; c < calls_.size(); ++c) {
      encoded_.emplace_back(n_);
      entered_.emplace_back(n_, false);
      results_.emplace_back(n_);
    }
  }

  int sent_at(int channel) const { return n_ * n_ * cells_per_pair_ + 2 * channel; }
  int received_at(int channel) const { return sent_at(channel) + 1; }
  int64_t sent(int channel) const { return cells_[sent_at(channel)]; }
  int64_t received(int channel) const { return cells_[received_at(channel)]; }
  void set_cell(int cell, int64_t word) {
    stored_.push_back({cell, cells_[cell]});
    cells_[cell] = word;
  }

  // Whether the order of the two matters. That a rank has entered is seen by those who must know at their
  // end, or when they read its reachable input.
  bool depend(const Move& a, const Move& b) const {
    if (a.kind == Move::Kind::caller_takes_back && b.kind == Move::Kind::enter) return depend(b, a);
    if (a.asks >= 0 && b.kind == Move::Kind::enter) return depend(b, a);
    const bool enters = a.kind == Move::Kind::enter && a.call == b.call;
    const bool seen = b.asks >= 0 || (b.kind == Move::Kind::caller_takes_back && exchange_asked(a.call));
    return (enters && seen) || conflict(a, b);
  }

  void find_conflicts() {
    for (int rank = 0; rank < n_; ++rank) {
      for (Move& move : moves_[rank]) {
        move.last_conflict.assign(n_, -1);
        for (int other = 0; other < n_; ++other) {
          if (other == rank) continue;
          for (int i = static_cast<int>(moves_[other].size()) - 1; i >= 0 && move.last_conflict[other] < 0;
               --i) {
            if (depend(move, moves_[other][i])) move.last_conflict[other] = i;
          }
        }
      }
    }
    grows_.assign(cells_.size(), true);
    std::vector<int64_t> last(cells_.size(), 0);
    for (const auto& moves : moves_) {
      for (const Move& move : moves) {
        if (move.kind != Move::Kind::signal) continue;
        if (move.word < last[move.cell]) grows_[move.cell] = false;
        last[move.cell] = move.word;
      }
    }
  }

  bool ended(int rank) const { return at_[rank] == moves_[rank].size(); }
  const Move& next(int rank) const { return moves_[rank][at_[rank]]; }

  bool enabled(int rank) const {
    if (ended(rank)) return false;
    const Move& move = next(rank);
    if (move.kind == Move::Kind::wait) return move.word < 0 || cells_[move.cell] >= move.word;
    if (move.kind == Move::Kind::recv) return received(move.cell) < sent(move.cell);
    if (move.kind == Move::Kind::complete) return received(move.cell) >= move.word;
    if (move.kind == Move::Kind::drain) {
      const std::vector<int64_t>& earlier = sent_by_[rank][move.call - 1];
      for (size_t channel = 0; channel < earlier.size(); ++channel) {
        if (received(static_cast<int>(channel)) < earlier[channel]) return false;
      }
    }
    if (move.kind == Move::Kind::meet) {
      for (int peer = 0; peer < n_; ++peer) {
        if (at_[peer] <= came_[peer][move.call]) return false;
      }
    }
    if (move.kind == Move::Kind::gate) {
      for (int peer = 0; peer < n_; ++peer) {
        if (mapped(rank, peer) && !entered_[move.call - 1][peer]) return false;
      }
    }
    return true;
  }

  bool mapped(int a, int b) const { return calls_[0]->call.world.mapped(a, b); }

  // Whether this move commutes with all that others may still do, so that no other order need be tried: it
  // touches no memory that they touch, and a cell that only grows lets a wait pass later as well as now.
  bool commutes(int rank) const {
    const Move& move = next(rank);
    if ((move.kind == Move::Kind::signal || move.kind == Move::Kind::wait) && !grows_[move.cell])
      return false;
    for (int other = 0; other < n_; ++other) {
      if (move.last_conflict[other] >= static_cast<int>(at_[other])) return false;
    }
    return true;
  }

  bool exchange_asked(int c) const {
    return calls_[c]->full_exchange || calls_[c]->call.world.collective == Collective::barrier;
  }

  void fail(const std::string& why) {
    if (!verdict_.wrong) verdict_.why = why;
    verdict_.wrong = true;
  }

  struct Undo {
    size_t memory, cells;
    std::vector<size_t> at;
    std::vector<std::vector<bool>> entered;
    std::vector<std::vector<std::vector<Encoded>>> encoded;
    uint64_t hash;
  };
  Undo now() const { return {written_.size(), stored_.size(), at_, entered_, encoded_, hash_}; }

  // Tries every order from the present state on, and restores it.
  void visit() {
    const Undo undo = now();
    while (!verdict_.wrong && verdict_.complete) {
      int choice = -1, able = 0;
      for (int rank = 0; rank < n_; ++rank) {
        if (!enabled(rank)) continue;
        ++able;
        if (choice < 0 && commutes(rank)) choice = rank;
      }
      if (choice >= 0) {
        move(choice);
        continue;
      }
      if (able == 0) {
        for (int rank = 0; rank < n_; ++rank) {
          if (!ended(rank)) fail("deadlock of rank " + std::to_string(rank));
        }
        for (int channel = 0; channel < static_cast<int>(sends_.size()); ++channel) {
          if (received(channel) < sent(channel)) fail("a message that nobody receives");
        }
        break;
      }
      for (int a = 0; a < n_; ++a) {
        for (int b = a + 1; b < n_; ++b) {
          if (enabled(a) && enabled(b) && conflict(next(a), next(b))) {
            fail("ranks " + std::to_string(a) + " and " + std::to_string(b) + " at once");
          }
        }
      }
      if (verdict_.wrong || !seen_.insert(key()).second) break;
      if (seen_.size() > max_states_) {
        verdict_.complete = false;
        break;
      }
      for (int rank = 0; rank < n_ && !verdict_.wrong && verdict_.complete; ++rank) {
        if (!enabled(rank)) continue;
        const Undo here = now();
        move(rank);
        visit();
        restore(here);
      }
      break;
    }
    restore(undo);
  }

  uint64_t key() const {
    uint64_t k = hash_;
    for (size_t at : at_) k = (k ^ at) * 0x9e3779b97f4a7c15 + 0x1234567;
    return k ^ (k >> 31);
  }

  static uint64_t mark(int64_t address, uint64_t code) {
    uint64_t x = (static_cast<uint64_t>(address) * 0x9e3779b97f4a7c15 ^ code) * 0xbf58476d1ce4e5b9;
    x ^= x >> 27;
    x *= 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }

  void put(int64_t address, uint64_t code) {
    if (memory_[address] == code) return;
    written_.push_back({address, memory_[address]});
    hash_ ^= mark(address, memory_[address]) ^ mark(address, code);
    memory_[address] = code;
  }

  void restore(const Undo& undo) {
    while (written_.size() > undo.memory) {
      memory_[written_.back().first] = written_.back().second;
      written_.pop_back();
    }
    while (stored_.size() > undo.cells) {
      cells_[stored_.back().first] = stored_.back().second;
      stored_.pop_back();
    }
    at_ = undo.at;
    entered_ = undo.entered;
    encoded_ = undo.encoded;
    hash_ = undo.hash;
  }

  // A byte holds a symbol and which of its bytes.
  static uint64_t code(int symbol, int64_t byte) {
    return symbol == Symbols::kNothing ? 0
                                       : static_cast<uint64_t>(symbol) << 16 | static_cast<uint64_t>(byte);
  }
  void store(int64_t address, int symbol, int64_t bytes) {
    for (int64_t b = 0; b < bytes; ++b) put(address + b, code(symbol, b));
  }
  int load(int64_t address, int64_t bytes) const {
    const int symbol = static_cast<int>(memory_[address] >> 16);
    if (symbols_[symbol].bytes != bytes) return Symbols::kNothing;
    for (int64_t b = 0; b < bytes; ++b) {
      if (memory_[address + b] != code(symbol, b)) return Symbols::kNothing;
    }
    return symbol;
  }

  // What is sent and not received yet stays as it is.
  void check_writes(const Move& move) {
    for (size_t channel = 0; channel < sends_.size(); ++channel) {
      const auto at = static_cast<int>(channel);
      for (int64_t number = received(at); number < sent(at); ++number) {
        const Span& sent = sends_[channel][number]->spans[0];
        for (const Span& span : move.spans) {
          if (span.write && overlap(span, sent)) fail("writes what is being sent");
        }
      }
    }
  }

  void receive(const Move& move) {
    const Move& send = *sends_[move.cell][received(move.cell)];
    const Span &to = move.spans[0], &from = send.spans[0];
    set_cell(received_at(move.cell), received(move.cell) + 1);
    if (send.call != move.call || from.end - from.begin != to.end - to.begin) return fail("another message");
    for (int64_t b = 0; b < from.end - from.begin; ++b) put(to.begin + b, memory_[from.begin + b]);
  }

  void move(int rank) {
    const Move& move = next(rank);
    check_writes(move);
    switch (move.kind) {
      case Move::Kind::caller_writes:
        caller_writes(rank, move.call);
        break;
      case Move::Kind::enter:
        entered_[move.call][rank] = true;
        break;
      case Move::Kind::gate:
      case Move::Kind::meet:
      case Move::Kind::wait:
        break;
      case Move::Kind::combine:
        if (move.asks >= 0 && !entered_[move.call][move.asks]) fail("nobody has shown where an input lies");
        combine(rank, move);
        break;
      case Move::Kind::signal:
        set_cell(move.cell, move.word);
        break;
      case Move::Kind::send:
        set_cell(sent_at(move.cell), sent(move.cell) + 1);
        break;
      case Move::Kind::recv:
        receive(move);
        break;
      case Move::Kind::complete:
      case Move::Kind::drain:
        break;
      case Move::Kind::caller_takes_back:
        take_back(rank, move.call);
        break;
    }
    ++at_[rank];
  }

  void caller_writes(int rank, int c) {
    const Place& place = places_[c][rank];
    const int64_t bytes = item(*calls_[c]);
    for (int64_t b = 0; b < place.out_bytes; ++b) put(place.out + b, 0);
    for (int64_t i = 0; i < place.in_bytes / bytes; ++i) {
      store(place.in + i * bytes, symbols_.raw(rank, i, bytes), bytes);
    }
  }

  void combine(int rank, const Move& move) {
    const Step& step = *move.step;
    if (step.count == 0) return;
    const Plan& plan = *calls_[move.call];
    const Format from = move.operands[step.num_dsts].format;
    if (step.dst_format == Format::wire && step.num_srcs == 1 && from == Format::wire)
      return copy_tiles(move);
    const bool copy = step.num_srcs == 1 && from == step.dst_format;
    const auto factors = factors_of(plan.call);
    const bool right_divisor = plan.divisor == factors.divisor && plan.prescale == factors.prescale;
    const bool divides = move.transcode ? move.transcode->divides : step.dst_format == Format::final;
    const int64_t bytes = bytes_of(plan, step.dst_format, 1);
    std::vector<int> terms(step.num_srcs), results;
    std::vector<int> tiles(step.num_srcs);
    for (int64_t i = 0; i < step.count; ++i) {
      for (int s = 0; s < step.num_srcs; ++s) {
        const Format format = move.operands[step.num_dsts + s].format;
        const int64_t source = move.spans[step.num_dsts + s].begin, size = bytes_of(plan, format, 1);
        if (format == Format::wire) {
          if (i % kTile == 0) tiles[s] = load(source + i / kTile * size, size);
          terms[s] = symbols_.decode(tiles[s], i % kTile, partial(plan));
        } else {
          terms[s] = load(source + i * size, size);
          if (!copy && format == Format::raw && terms[s]) terms[s] = symbols_.lift(terms[s], partial(plan));
        }
      }
      int result = tree(terms, 0, step.num_srcs);
      if (!copy && divides && result) result = symbols_.divide(result, right_divisor);
      if (!copy && step.dst_format == Format::final && result) result = symbols_.round(result, bytes);
      results.push_back(result);
    }
    if (step.dst_format == Format::wire) results = encode(rank, move, results);
    for (int d = 0; d < step.num_dsts; ++d) {
      for (size_t i = 0; i < results.size(); ++i) {
        store(move.spans[d].begin + static_cast<int64_t>(i) * bytes, results[i], bytes);
      }
    }
  }

  void copy_tiles(const Move& move) {
    const Step& step = *move.step;
    const int64_t bytes = tile(*calls_[move.call]);
    for (int64_t t = 0; t * kTile < step.count; ++t) {
      int symbol = load(move.spans[step.num_dsts].begin + t * bytes, bytes);
      // Elements that the tile has, and the copy leaves.
      if (static_cast<int64_t>(symbols_[symbol].elements.size()) > step.count - t * kTile) symbol = 0;
      for (int d = 0; d < step.num_dsts; ++d) store(move.spans[d].begin + t * bytes, symbol, bytes);
    }
  }

  // Tiles of what is computed. An encode must know the place of each element: in the rank's input, for its
  // residual, and in the data, for its random bits.
  std::vector<int> encode(int rank, const Move& move, const std::vector<int>& elements) {
    const Plan& plan = *calls_[move.call];
    const Transcode& how = *move.transcode;
    std::vector<int> tiles;
    for (int64_t begin = 0; begin < static_cast<int64_t>(elements.size()); begin += kTile) {
      const int64_t end = std::min<int64_t>(begin + kTile, static_cast<int64_t>(elements.size()));
      const std::vector<int> part(elements.begin() + begin, elements.begin() + end);
      const int64_t shift = move.trip * how.stride + begin;
      bool sane = true;
      for (size_t k = 0; k < part.size() && sane; ++k) {
        for (const auto& [source, element] : symbols_[part[k]].terms) {
          sane = sane && element == how.element + shift + static_cast<int64_t>(k);
          const auto [index, last] = place_of(plan.call, source, element);
          sane =
              sane && index == how.index + shift + static_cast<int64_t>(k) && (k > 0 || index % kTile == 0);
          // A tile ends where the next one begins, or the data.
          if (k + 1 == part.size()) sane = sane && (k + 1 == kTile || last);
        }
      }
      tiles.push_back(symbols_.encode(part, rank, how.turn, sane, tile(plan)));
      note_encode(rank, move.call,
                  {how.element + shift, how.element + shift + end - begin, how.turn, tiles.back()});
    }
    return tiles;
  }

  // An input element's number in the data, and whether it is the last of its block.
  std::pair<int64_t, bool> place_of(const Call& call, int rank, int64_t element) const {
    int64_t tiles = 0;
    switch (call.world.collective) {
      case Collective::all_reduce:
        return {element, element + 1 == call.counts[0]};
      case Collective::all_gather:
        return {element, element + 1 == call.counts[rank]};
      case Collective::reduce_scatter:
        for (int64_t count : call.counts) {
          if (element < count) return {tiles * kTile + element, element + 1 == count};
          element -= count;
          tiles += (count + kTile - 1) / kTile;
        }
        break;
      case Collective::broadcast:
      case Collective::reduce:
      case Collective::gather:
      case Collective::scatter:
      case Collective::all_to_all:
      case Collective::barrier:
      case Collective::send_recv:
        break;  // without codecs
    }
    return {-1, false};
  }

  void note_encode(int rank, int call, const Encoded& made) {
    for (const Encoded& other : encoded_[call][rank]) {
      if (other.begin >= made.end || made.begin >= other.end) continue;
      if (calls_[call]->encodes_once) fail("an element encoded twice");
      if (other.turn == made.turn && other.symbol != made.symbol) fail("random bits used twice");
    }
    encoded_[call][rank].push_back(made);
  }

  int tree(const std::vector<int>& terms, int begin, int end) {
    if (end - begin == 1) return terms[begin];
    int half = 1;
    while (half * 2 < end - begin) half *= 2;
    return symbols_.sum(tree(terms, begin, begin + half), tree(terms, begin + half, end));
  }

  // The caller looks at what it got, and uses its buffers for something else.
  void take_back(int rank, int c) {
    const Plan& plan = *calls_[c];
    const Place& place = places_[c][rank];
    const int64_t bytes = item(plan);
    if (exchange_asked(c)) {
      for (int peer = 0; peer < n_; ++peer) {
        const bool barrier = plan.call.world.collective == Collective::barrier;
        if (!entered_[c][peer] && (barrier || mapped(rank, peer))) fail("no full exchange");
      }
    }
    for (int64_t i = 0; i < place.in_bytes / bytes; ++i) {
      const int64_t address = place.in + i * bytes;
      const bool output = address >= place.out && address < place.out + place.out_bytes;
      if (!output && load(address, bytes) != symbols_.raw(rank, i, bytes)) fail("input changed");
    }
    std::vector<int>& result = results_[c][rank];
    result.clear();
    for (int64_t i = 0; i < place.out_bytes / bytes; ++i)
      result.push_back(load(place.out + i * bytes, bytes));
    for (size_t i = 0; i < result.size(); ++i) {
      if (!is_right(plan.call, rank, static_cast<int64_t>(i), result[i])) {
        fail("rank " + std::to_string(rank) + " element " + std::to_string(i) + " of call " +
             std::to_string(c));
        break;
      }
    }
    if (plan.call.world.collective == Collective::all_reduce ||
        plan.call.world.collective == Collective::all_gather) {
      for (int other = 0; other < n_; ++other) {
        const bool done = at_[other] > 0 && other != rank && took_back(other, c);
        if (done && results_[c][other] != result) fail("ranks differ");
      }
    }
    for (int64_t b = 0; b < place.in_bytes; ++b) put(place.in + b, 0);
    for (int64_t b = 0; b < place.out_bytes; ++b) put(place.out + b, 0);
  }

  bool took_back(int rank, int c) const {
    for (size_t i = 0; i < at_[rank]; ++i) {
      if (moves_[rank][i].kind == Move::Kind::caller_takes_back && moves_[rank][i].call == c) return true;
    }
    return false;
  }

  // Element i of this rank's output.
  bool is_right(const Call& call, int rank, int64_t i, int symbol) {
    const World& world = call.world;
    const int64_t bytes = static_cast<int64_t>(size_of(call.dtype));
    auto block_of = [&](int64_t& index) {
      int block = 0;
      while (index >= call.counts[block]) index -= call.counts[block++];
      return block;
    };
    switch (world.collective) {
      case Collective::all_reduce:
      case Collective::reduce:
        return is_sum(symbol, i);
      case Collective::reduce_scatter:
        return is_sum(symbol, before(call, rank) + i);
      case Collective::all_gather:
      case Collective::gather: {
        int64_t index = i;
        const int source = block_of(index);
        return symbol == symbols_.raw(source, index, bytes) || is_decoded(call, symbol, source, index);
      }
      case Collective::broadcast:
      case Collective::send_recv:
        return symbol == symbols_.raw(world.root, i, bytes);
      case Collective::scatter:
        return symbol == symbols_.raw(world.root, before(call, rank) + i, bytes);
      case Collective::all_to_all: {
        int64_t index = i;
        int source = 0;
        while (index >= call.counts[source * n_ + rank]) index -= call.counts[source++ * n_ + rank];
        for (int to = 0; to < rank; ++to) index += call.counts[source * n_ + to];
        return symbol == symbols_.raw(source, index, bytes);
      }
      case Collective::barrier:
        return true;
    }
    return false;
  }

  bool is_sum(int id, int64_t element) {
    const Symbol& symbol = symbols_[id];
    if (symbol.type != Symbol::Type::final || !symbol.sane || symbol.divided != 1) return false;
    if (static_cast<int>(symbol.terms.size()) != n_) return false;
    for (int rank = 0; rank < n_; ++rank) {
      if (symbol.terms[rank] != std::pair{rank, element}) return false;
    }
    return !balanced_ || symbol.shape == balanced_shape(0, n_);
  }

  int balanced_shape(int begin, int end) {
    if (end - begin == 1) return -1 - begin;
    int half = 1;
    while (half * 2 < end - begin) half *= 2;
    return symbols_.shape(balanced_shape(begin, begin + half), balanced_shape(begin + half, end));
  }

  // What a codec left of an element that was only moved.
  bool is_decoded(const Call& call, int id, int rank, int64_t element) const {
    const Symbol& symbol = symbols_[id];
    return call.codec.kind != CodecKind::none && symbol.type == Symbol::Type::final && symbol.sane &&
           symbol.divided == 0 && symbol.terms == std::vector{std::pair{rank, element}};
  }

  const bool balanced_;
  const size_t max_states_;
  Symbols symbols_;
  std::vector<bool> grows_;  // by cell

  std::vector<size_t> at_;
  std::vector<uint64_t> memory_;
  std::vector<int64_t> cells_;                              // then by channel: how many were sent, received
  std::vector<std::vector<bool>> entered_;                  // by call and rank
  std::vector<std::vector<std::vector<Encoded>>> encoded_;  // by call and rank
  std::vector<std::vector<std::vector<int>>> results_;      // by call and rank, once taken back
  uint64_t hash_ = 0;
  std::vector<std::pair<int64_t, uint64_t>> written_;
  std::vector<std::pair<int, int64_t>> stored_;
  std::unordered_set<uint64_t> seen_;
  Verdict verdict_;
};

}  // namespace

Verdict explore(const std::vector<const Plan*>& calls, bool balanced, size_t max_states) {
  return Search(calls, balanced, max_states).run();
}

}  // namespace explore
