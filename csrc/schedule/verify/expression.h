// Expressions: what a memory location holds in a symbolic run.
//
// An expression is a function of an element's index i, and equal functions have equal ids. A leaf is element
// i of a rank's input; any other node applies an operator to what its operands hold at i + delta. The first
// operand's delta is 0: so the same sum over different parts of the data, wherever it is computed, is one
// expression at different indices.
//
// What an encode makes is an expression too, but of a tile's index: tile t of encode(e, phase) is made of e's
// elements [t * kTile + phase, ...). decode() of it is again an expression of an element's index; it is not
// equal to e, since an encode loses something.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace pycomm::schedule {

using ExprId = int32_t;

// An expression at index i + delta.
struct Term {
  ExprId expr = 0;
  int64_t delta = 0;
  bool operator==(const Term&) const = default;
};

class Expressions {
 public:
  enum class Kind : uint8_t {
    leaf,     // the caller's element, of rank `first.expr`
    lift,     // raw -> accumulator, prescaled
    combine,  // first op second, in the accumulator's type
    finish,   // accumulator -> final: divided, rounded
    divide,   // accumulator -> accumulator: divided
    encode,   // accumulator -> tiles, by rank `second.expr` in turn `second.delta`; phase `first.delta`
    decode,   // tiles -> accumulator
    round,    // accumulator -> final: rounded
    garbage,  // nothing that a result may depend on: reasons_[first.expr] says what
  };

  Term leaf(int rank) { return {intern({Kind::leaf, {rank, 0}, {}}), 0}; }
  Term lift(Term term) { return wrap(Kind::lift, term); }
  Term finish(Term term) { return wrap(Kind::finish, term); }
  Term divide(Term term) { return wrap(Kind::divide, term); }
  Term round(Term term) { return wrap(Kind::round, term); }
  // The tiles, from index 0 on, of the elements that `term` holds from index 0 on.
  Term encode(Term term, int rank, int turn);
  // The elements, from index 0 on, of the tiles that `term` holds from index 0 on.
  Term decode(Term term);
  Term combine(Term a, Term b);
  Term garbage(const std::string& why);
  // The balanced tree over `count` terms: tree(0, count) of kernels/combine.h.
  Term balanced(const Term* terms, size_t count);

  bool is_garbage(ExprId id) const { return nodes_[id].kind == Kind::garbage; }
  // The first element of tile 0 of an encode's term.
  int64_t first_element(Term tiles) const;
  // A rank whose input is in the expression, which must not be garbage.
  int some_rank(ExprId id) const;
  // The encodes in what `term` holds at index 0; the delta of each counts elements, not tiles.
  std::vector<Term> encodes_in(Term term) const;
  // The tile of an encode that holds this element.
  int64_t tile_of(ExprId encode, int64_t element) const;
  // The same without codecs: decode(encode(e)) is e, and round(divide(e)) is finish(e).
  ExprId stripped(ExprId id);
  // Empty if `id` sums, in any order, element i of every rank once, each lifted once, and is finished once;
  // else what is wrong.
  const std::string& reduction_fault(ExprId id, int num_ranks);
  // At index i: "round((in@0[i]) + (in@1[i]))".
  std::string words(Term term, int64_t index) const;

 private:
  struct Node {
    Kind kind;
    Term first, second;
    bool operator==(const Node&) const = default;
  };
  struct Hash {
    size_t operator()(const Node& node) const;
  };
  ExprId intern(const Node& node);
  Term wrap(Kind kind, Term term);
  std::string find_reduction_fault(ExprId id, int num_ranks) const;
  ExprId find_stripped(ExprId id);
  void write_code(std::string& text, const Node& node, int64_t element, int budget) const;
  void write(std::string& text, Term term, int64_t index, int budget) const;

  std::vector<Node> nodes_;
  std::unordered_map<Node, ExprId, Hash> ids_;
  std::vector<std::string> reasons_;
  std::unordered_map<std::string, ExprId> reason_ids_;
  std::unordered_map<ExprId, std::string> faults_;
  std::unordered_map<ExprId, ExprId> stripped_;
};

}  // namespace pycomm::schedule
