#include "schedule/algorithms.h"

#include "common/error.h"
#include "schedule/algorithms/all.h"

namespace pycomm::schedule {

namespace {
using enum Collective;
// Where nothing is summed, nothing is out of balance.
constexpr Algorithm kAlgorithms[] = {
    // name, collective, function, balanced
    {"one_shot", all_reduce, one_shot, true},
    {"two_shot", all_reduce, two_shot, true},
    {"ring", all_reduce, ring, false},
    {"tree", all_reduce, tree, false},
    {"recursive_doubling", all_reduce, recursive_doubling, true},
    {"halving_doubling", all_reduce, halving_doubling, true},
    {"direct", reduce_scatter, direct, true},
    {"ring", reduce_scatter, ring, false},
    {"recursive_halving", reduce_scatter, recursive_halving, false},
    {"direct", all_gather, direct, true},
    {"ring", all_gather, ring, true},
    {"recursive_doubling", all_gather, recursive_doubling, true},
    {"direct", broadcast, direct, true},
    {"binomial", broadcast, binomial, true},
    {"pipelined_tree", broadcast, pipelined_tree, true},
    {"direct", reduce, direct, true},
    {"two_shot", reduce, two_shot, true},
    {"binomial", reduce, binomial, false},
    {"pipelined_tree", reduce, pipelined_tree, false},
    {"direct", gather, direct, true},
    {"direct", scatter, direct, true},
    {"direct", all_to_all, direct, true},
    {"pairwise", all_to_all, pairwise, true},
    {"dissemination", barrier, dissemination, true},
    {"direct", send_recv, direct, true},
};
}  // namespace

std::span<const Algorithm> algorithms() { return kAlgorithms; }

std::vector<std::string> algorithm_names(Collective collective) {
  std::vector<std::string> names;
  for (const Algorithm& algorithm : kAlgorithms)
    if (algorithm.collective == collective) names.push_back(algorithm.name);
  return names;
}

const Algorithm& find_algorithm(Collective collective, const std::string& wanted) {
  std::string known;
  for (const Algorithm& algorithm : kAlgorithms) {
    if (algorithm.collective != collective) continue;
    if (algorithm.name == wanted) return algorithm;
    known += std::string(known.empty() ? "" : ", ") + algorithm.name;
  }
  throw ValueError(std::string(name(collective)) + " has no algorithm \"" + wanted + "\"; it has " + known);
}

}  // namespace pycomm::schedule
