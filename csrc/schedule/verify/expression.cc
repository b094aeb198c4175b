#include "schedule/verify/expression.h"

#include <bit>

#include "common/codec.h"

namespace pycomm::schedule {

size_t Expressions::Hash::operator()(const Node& node) const {
  uint64_t h = static_cast<uint64_t>(node.kind);
  for (uint64_t v : {static_cast<uint64_t>(node.first.expr), static_cast<uint64_t>(node.first.delta),
                     static_cast<uint64_t>(node.second.expr), static_cast<uint64_t>(node.second.delta)}) {
    h = (h ^ v) * 0x9e3779b97f4a7c15;
    h ^= h >> 29;
  }
  return h;
}

ExprId Expressions::intern(const Node& node) {
  const auto [at, fresh] = ids_.try_emplace(node, static_cast<ExprId>(nodes_.size()));
  if (fresh) nodes_.push_back(node);
  return at->second;
}

Term Expressions::wrap(Kind kind, Term term) {
  if (is_garbage(term.expr)) return term;
  return {intern({kind, {term.expr, 0}, {}}), term.delta};
}

// The phase is part of the expression: tiles that begin at other elements have other scales.
Term Expressions::encode(Term term, int rank, int turn) {
  if (is_garbage(term.expr)) return term;
  const int64_t phase = (term.delta % kTile + kTile) % kTile;
  return {intern({Kind::encode, {term.expr, phase}, {rank, turn}}), (term.delta - phase) / kTile};
}

Term Expressions::decode(Term term) {
  if (is_garbage(term.expr)) return term;
  return {intern({Kind::decode, {term.expr, 0}, {}}), first_element(term)};
}

int64_t Expressions::first_element(Term tiles) const {
  return tiles.delta * kTile + nodes_[tiles.expr].first.delta;
}

std::vector<Term> Expressions::encodes_in(Term term) const {
  std::vector<Term> encodes, open = {term};
  while (!open.empty()) {
    const auto [expr, delta] = open.back();
    open.pop_back();
    const Node& node = nodes_[expr];
    switch (node.kind) {
      case Kind::combine:
        open.push_back({node.second.expr, delta + node.second.delta});
        [[fallthrough]];
      case Kind::lift:
      case Kind::finish:
      case Kind::divide:
      case Kind::round:
        open.push_back({node.first.expr, delta});
        break;
      case Kind::decode:
        encodes.push_back({node.first.expr, delta});
        open.push_back({nodes_[node.first.expr].first.expr, delta});
        break;
      case Kind::leaf:
      case Kind::encode:
      case Kind::garbage:
        break;
    }
  }
  return encodes;
}

int64_t Expressions::tile_of(ExprId encode, int64_t element) const {
  const int64_t from = element - nodes_[encode].first.delta;
  return from >= 0 ? from / kTile : -((kTile - 1 - from) / kTile);
}

ExprId Expressions::stripped(ExprId id) {
  const auto known = stripped_.find(id);
  return known != stripped_.end() ? known->second : stripped_[id] = find_stripped(id);
}

ExprId Expressions::find_stripped(ExprId id) {
  const Node node = nodes_[id];
  const auto operand = [&](Term term) { return Term{stripped(term.expr), term.delta}; };
  switch (node.kind) {
    case Kind::leaf:
    case Kind::garbage:
    case Kind::encode:
      return id;
    case Kind::lift:
    case Kind::finish:
    case Kind::divide:
      return intern({node.kind, operand(node.first), {}});
    case Kind::combine:
      return intern({Kind::combine, operand(node.first), operand(node.second)});
    case Kind::decode:
      return stripped(nodes_[node.first.expr].first.expr);
    case Kind::round: {
      const Term whole = operand(node.first);
      const Node& inner = nodes_[whole.expr];
      if (inner.kind == Kind::divide) return intern({Kind::finish, inner.first, {}});
      return inner.kind == Kind::lift ? inner.first.expr : intern({Kind::round, whole, {}});
    }
  }
  return id;
}

Term Expressions::combine(Term a, Term b) {
  if (is_garbage(a.expr)) return a;
  if (is_garbage(b.expr)) return b;
  return {intern({Kind::combine, {a.expr, 0}, {b.expr, b.delta - a.delta}}), a.delta};
}

Term Expressions::garbage(const std::string& why) {
  const auto [at, fresh] = reason_ids_.try_emplace(why, static_cast<ExprId>(reasons_.size()));
  if (fresh) reasons_.push_back(why);
  return {intern({Kind::garbage, {at->second, 0}, {}}), 0};
}

Term Expressions::balanced(const Term* terms, size_t count) {
  if (count == 1) return terms[0];
  const size_t half = std::bit_floor(count - 1);
  return combine(balanced(terms, half), balanced(terms + half, count - half));
}

int Expressions::some_rank(ExprId id) const {
  while (nodes_[id].kind != Kind::leaf) id = nodes_[id].first.expr;
  return nodes_[id].first.expr;
}

const std::string& Expressions::reduction_fault(ExprId id, int num_ranks) {
  const auto [at, fresh] = faults_.try_emplace(id);
  if (fresh) at->second = find_reduction_fault(id, num_ranks);
  return at->second;
}

std::string Expressions::find_reduction_fault(ExprId id, int num_ranks) const {
  if (nodes_[id].kind == Kind::garbage) return "it depends on " + reasons_[nodes_[id].first.expr];
  if (nodes_[id].kind != Kind::finish) return "it is not a finished result";
  std::vector<int> times(num_ranks, 0);
  std::vector<Term> open = {nodes_[id].first};
  while (!open.empty()) {
    const Term term = open.back();
    open.pop_back();
    const Node& node = nodes_[term.expr];
    if (node.kind == Kind::combine) {
      open.push_back({node.second.expr, term.delta + node.second.delta});
      open.push_back({node.first.expr, term.delta});
      continue;
    }
    if (node.kind != Kind::lift) return "it sums what was not converted and scaled exactly once";
    const Node& leaf = nodes_[node.first.expr];
    if (leaf.kind != Kind::leaf) return "it converts or scales twice";
    if (term.delta != 0) return "it sums different elements of the ranks";
    if (++times[leaf.first.expr] > 1) return "it sums rank " + std::to_string(leaf.first.expr) + " twice";
  }
  for (int rank = 0; rank < num_ranks; ++rank) {
    if (times[rank] == 0) return "rank " + std::to_string(rank) + "'s input is missing";
  }
  return {};
}

std::string Expressions::words(Term term, int64_t index) const {
  std::string text;
  write(text, term, index, 160);
  return text;
}

// One element of an encode: "turn 1 of rank 0(in@0[7])".
void Expressions::write_code(std::string& text, const Node& node, int64_t element, int budget) const {
  text += "turn " + std::to_string(node.second.delta) + " of rank " + std::to_string(node.second.expr) + "(";
  write(text, {node.first.expr, 0}, element, budget);
  text += ")";
}

void Expressions::write(std::string& text, Term term, int64_t index, int budget) const {
  if (static_cast<int>(text.size()) > budget) {
    if (!text.ends_with("...")) text += "...";
    return;
  }
  const Node& node = nodes_[term.expr];
  const int64_t i = index + term.delta;
  switch (node.kind) {
    case Kind::leaf:
      text += "in@" + std::to_string(node.first.expr) + "[" + std::to_string(i) + "]";
      break;
    case Kind::lift:
    case Kind::finish:
    case Kind::divide:
    case Kind::round:
      text += node.kind == Kind::lift ? "(" : node.kind == Kind::divide ? "divided(" : "round(";
      write(text, node.first, i, budget);
      text += ")";
      break;
    case Kind::encode:
      write_code(text, node, i * kTile + node.first.delta, budget);
      break;
    case Kind::decode:
      write_code(text, nodes_[node.first.expr], i, budget);
      break;
    case Kind::combine:
      text += "(";
      write(text, node.first, i, budget);
      text += " op ";
      write(text, node.second, i, budget);
      text += ")";
      break;
    case Kind::garbage:
      text += reasons_[node.first.expr];
      break;
  }
}

}  // namespace pycomm::schedule
