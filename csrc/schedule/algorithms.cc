#include "schedule/algorithms.h"

#include <string_view>
#include <vector>

#include "common/error.h"
#include "common/words.h"
#include "schedule/algorithms/all.h"

namespace pycomm::schedule {

namespace {
using enum Collective;
using enum Algorithm::Codecs;
// `balanced` is true where nothing is summed.
constexpr Algorithm kAlgorithms[] = {
    // name, collective, function, balanced, codecs, wire, ragged
    {"one_shot", all_reduce, one_shot, true, any_once},
    {"two_shot", all_reduce, two_shot, true, any_once, /*wire=*/true},
    {"ring", all_reduce, ring, false, any_once},
    {"tree", all_reduce, tree, false, any_once},
    {"recursive_doubling", all_reduce, recursive_doubling, true, none},
    {"halving_doubling", all_reduce, halving_doubling, true, any},
    {"hierarchical", all_reduce, hierarchical, false, any_once, /*wire=*/true},
    {"direct", reduce_scatter, direct, true, any_once, /*wire=*/true},
    {"ring", reduce_scatter, ring, false, any_once, /*wire=*/true},
    {"recursive_halving", reduce_scatter, recursive_halving, false, any, /*wire=*/true},
    {"hierarchical", reduce_scatter, hierarchical, false, any_once, /*wire=*/true},
    {"direct", all_gather, direct, true, any_once, /*wire=*/true},
    {"ring", all_gather, ring, true, any_once},
    {"recursive_doubling", all_gather, recursive_doubling, true, any_once},
    {"hierarchical", all_gather, hierarchical, true, any_once, /*wire=*/true},
    {"direct", broadcast, direct, true, none},
    {"binomial", broadcast, binomial, true, none},
    {"pipelined_tree", broadcast, pipelined_tree, true, none},
    {"hierarchical", broadcast, hierarchical, true, none},
    {"direct", reduce, direct, true, none},
    {"two_shot", reduce, two_shot, true, none},
    {"binomial", reduce, binomial, false, none},
    {"pipelined_tree", reduce, pipelined_tree, false, none},
    {"hierarchical", reduce, hierarchical, false, none},
    {"direct", gather, direct, true, none},
    {"direct", scatter, direct, true, none},
    {"direct", all_to_all, direct, true, none},
    {"pairwise", all_to_all, pairwise, true, none},
    // A rank does not know the lengths of the blocks that other ranks exchange.
    {"hierarchical", all_to_all, hierarchical, true, none, /*wire=*/false, /*ragged=*/false},
    {"dissemination", barrier, dissemination, true, none},
    {"direct", send_recv, direct, true, none},
};
}  // namespace

std::span<const Algorithm> algorithms() { return kAlgorithms; }

std::vector<std::string> algorithm_names(Collective collective) {
  std::vector<std::string> names;
  for (const Algorithm& algorithm : kAlgorithms)
    if (algorithm.collective == collective) names.push_back(algorithm.name);
  return names;
}

std::string algorithms_that(Collective collective, bool (*can)(const Algorithm&)) {
  std::string names;
  for (const Algorithm& algorithm : kAlgorithms) {
    if (algorithm.collective != collective || !can(algorithm)) continue;
    names += std::string(names.empty() ? "" : ", ") + algorithm.name;
  }
  return names;
}

const Algorithm& find_algorithm(Collective collective, const std::string& wanted) {
  std::vector<std::string_view> names;
  for (const Algorithm& algorithm : kAlgorithms) {
    if (algorithm.collective != collective) continue;
    if (algorithm.name == wanted) return algorithm;
    names.emplace_back(algorithm.name);
  }
  throw ValueError(std::string(name(collective)) + " has no algorithm \"" + wanted + "\"" +
                   did_you_mean(wanted, names) + "; it has " +
                   algorithms_that(collective, [](const Algorithm&) { return true; }));
}

}  // namespace pycomm::schedule
