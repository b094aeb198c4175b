// Expressions: what a memory location holds in a symbolic run.
//
// An expression is a function of an element index i, kept once (equal functions have equal ids): a leaf is
// element i of a rank's input, a node applies to what its operands hold at i + delta. The first operand's
// delta is 0, so that a result over any part of the data, computed anywhere, is one expression at different
// indices.
//
// What a codec made of elements is an expression as well, but of an index of tiles: tile t of encode(e,
// phase) is made of e's elements [t * kTile + phase, ...), and decode() of that is e's function of elements
// again, with what was lost in it.
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
    garbage,  // nothing that a result may depend on: reasons()[first.expr] says what
  };

  Term leaf(int rank) { return {intern({Kind::leaf, {rank, 0}, {}}), 0}; }
  Term lift(Term term) { return wrap(Kind::lift, term); }
  Term finish(Term term) { return wrap(Kind::finish, term); }
  Term divide(Term term) { return wrap(Kind::divide, term); }
  Term round(Term term) { return wrap(Kind::round, term); }
  // Of elements from `term` at index 0 on: the tiles from index 0 on.
  Term encode(Term term, int rank, int turn);
  // Of tiles from `term` at index 0 on: the elements from index 0 on.
  Term decode(Term term);
  Term combine(Term a, Term b);
  Term garbage(const std::string& why);
  // tree(0, k), as kernels/combine.h says.
  Term balanced(const Term* terms, size_t count);

  bool is_garbage(ExprId id) const { return nodes_[id].kind == Kind::garbage; }
  // The element that tile 0 of an encode's term begins with.
  int64_t first_element(Term tiles) const;
  // A rank whose input is in it; of no garbage.
  int some_rank(ExprId id) const;
  // The encodes in what `term` holds at index 0, each as a term of elements.
  std::vector<Term> encodes_in(Term term) const;
  // The tile of such an encode that has an element.
  int64_t tile_of(ExprId encode, int64_t element) const;
  // The same without codecs: decode(encode(e)) is e, and round(divide(e)) is finish(e).
  ExprId stripped(ExprId id);
  // Empty if `id` sums in any order every rank's element i once, lifted once and finished once; else what is
  // wrong.
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
