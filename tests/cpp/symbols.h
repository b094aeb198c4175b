// The symbolic values that explore.cc computes with.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

namespace explore {

// The value of an element, or of a tile in wire form. Two values have the same bits if their symbols are
// equal.
struct Symbol {
  enum class Type : uint8_t { nothing, raw, partial, final, tile };
  Type type = Type::nothing;
  int64_t bytes = 1;
  std::vector<std::pair<int, int64_t>> terms;  // the summed (rank, element) pairs, sorted
  bool sane = true;                            // converted, scaled and encoded as the call requires
  int divided = 0;                             // how many times
  int shape = 0;                               // how the sum associates
  std::vector<int> elements;                   // of a tile: what was encoded
};

class Symbols {
 public:
  static constexpr int kNothing = 0;
  Symbols() { all_.emplace_back(); }
  const Symbol& operator[](int id) const { return all_[id]; }

  int raw(int rank, int64_t element, int64_t bytes) {
    return make({'r', rank, element}, [&] {
      return Symbol{
          .type = Symbol::Type::raw, .bytes = bytes, .terms = {{rank, element}}, .shape = -1 - rank};
    });
  }
  int lift(int id, int64_t bytes) {
    return make({'l', id}, [&] {
      Symbol result = all_[id];
      result.sane = result.sane && result.type == Symbol::Type::raw;
      result.type = Symbol::Type::partial;
      result.bytes = bytes;
      return result;
    });
  }
  int sum(int a, int b) {
    if (a == kNothing || b == kNothing) return kNothing;
    return make({'s', a, b}, [&] {
      Symbol result = all_[a];
      const Symbol& other = all_[b];
      result.terms.insert(result.terms.end(), other.terms.begin(), other.terms.end());
      std::sort(result.terms.begin(), result.terms.end());
      result.sane = result.sane && other.sane && result.type == Symbol::Type::partial &&
                    other.type == Symbol::Type::partial && result.divided == 0 && other.divided == 0;
      result.shape = shape(result.shape, other.shape);
      return result;
    });
  }
  int divide(int id, bool right_divisor) {
    return make({'v', id, right_divisor}, [&] {
      Symbol result = all_[id];
      result.sane = result.sane && result.type == Symbol::Type::partial && right_divisor;
      ++result.divided;
      return result;
    });
  }
  int round(int id, int64_t bytes) {
    return make({'f', id}, [&] {
      Symbol result = all_[id];
      result.sane = result.sane && result.type == Symbol::Type::partial;
      result.type = Symbol::Type::final;
      result.bytes = bytes;
      return result;
    });
  }
  // `sane`: the encode has its correct place in the data.
  int encode(const std::vector<int>& elements, int rank, int stage, bool sane, int64_t bytes) {
    return make({'e', rank, stage * 2 + sane, elements}, [&] {
      return Symbol{
          .type = Symbol::Type::tile, .bytes = bytes, .terms = {}, .sane = sane, .elements = elements};
    });
  }
  int decode(int tile, size_t element, int64_t bytes) {
    const Symbol& code = all_[tile];
    if (code.type != Symbol::Type::tile || element >= code.elements.size()) return kNothing;
    const int encoded = code.elements[element];
    if (encoded == kNothing) return kNothing;
    return make({'d', tile, static_cast<int64_t>(element)}, [&] {
      Symbol result = all_[encoded];
      result.sane = result.sane && code.sane && result.type == Symbol::Type::partial;
      result.type = Symbol::Type::partial;
      result.bytes = bytes;
      return result;
    });
  }
  int shape(int a, int b) {
    return shapes_.try_emplace({a, b}, static_cast<int>(shapes_.size()) + 1).first->second;
  }

 private:
  // How a symbol is made, and from which others.
  struct Key {
    char how;
    int64_t a, b = 0;
    std::vector<int> elements = {};
    bool operator==(const Key&) const = default;
  };
  struct Hash {
    size_t operator()(const Key& key) const {
      size_t hash = static_cast<size_t>(key.how);
      const auto mix = [&hash](int64_t x) { hash = (hash ^ static_cast<size_t>(x)) * 0x9e3779b97f4a7c15; };
      mix(key.a);
      mix(key.b);
      for (const int element : key.elements) mix(element);
      return hash ^ hash >> 32;
    }
  };
  template <class Build>
  int make(Key key, const Build& build) {
    const auto [at, fresh] = ids_.try_emplace(std::move(key), static_cast<int>(all_.size()));
    if (fresh) all_.push_back(build());
    return at->second;
  }
  std::vector<Symbol> all_;
  std::unordered_map<Key, int, Hash> ids_;
  std::map<std::pair<int, int>, int> shapes_;
};

}  // namespace explore
