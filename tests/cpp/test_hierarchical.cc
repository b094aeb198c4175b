// What hierarchical algorithms send between nodes. (That they are right is proved with all others.)
#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "schedule/cursor.h"
#include "schedule/lower/layout.h"
#include "schedule/lower/lower.h"

using namespace pycomm;
using namespace pycomm::schedule;

namespace {

const std::vector<std::vector<int>> kNodes = {{0, 0, 1, 1},         {0, 1, 0, 1},    {0, 1, 2, 3},
                                              {0, 0, 0, 1},         {0, 1, 1, 1, 0}, {0, 0, 0, 1, 1, 1, 1},
                                              {2, 0, 1, 0, 2, 1, 0}};

Plan all_to_all(const std::vector<int>& nodes, int64_t count, const Geometry& geometry) {
  Call call{.world = {.collective = Collective::all_to_all,
                      .size = static_cast<int>(nodes.size()),
                      .nodes = nodes}};
  call.counts = uniform_counts(call.world, count);
  return make_plan("hierarchical", call, geometry);
}

struct Sent {
  int64_t messages = 0, elements = 0;
};

// What a rank sends to each other one.
std::map<int, Sent> sent_by(const Program& program) {
  std::map<int, Sent> sent;
  Cursor().walk(program, [&](const Step& step, int64_t) {
    if (step.kind == Step::Kind::send) {
      ++sent[step.peer].messages;
      sent[step.peer].elements += step.count;
    }
    return true;
  });
  return sent;
}

}  // namespace

// Each rank hears from each other node once in a trip, from one rank, and gets no element twice.
TEST(blocks_of_an_all_to_all_cross_together) {
  constexpr int64_t kLine = 16;
  for (const std::vector<int>& nodes : kNodes) {
    const int n = static_cast<int>(nodes.size());
    for (const int64_t trips : {1, 5}) {
      const int64_t width = 8 * kLine;
      const Plan plan =
          all_to_all(nodes, trips * width, {.bank_bytes = 1 << 20, .trip_bytes = 4 * width * n});
      std::map<std::pair<int, int>, Sent> heard;  // destination, node
      for (int rank = 0; rank < n; ++rank) {
        for (const auto& [to, sent] : sent_by(plan.programs[rank])) {
          Sent& from_node = heard[{to, nodes[rank]}];
          CHECK_EQ(from_node.messages, 0);  // by no other rank of that node
          from_node = sent;
        }
      }
      for (int to = 0; to < n; ++to) {
        for (const int node : nodes) {
          if (node == nodes[to]) continue;
          const Sent& sent = heard[{to, node}];
          CHECK_EQ(sent.messages, trips);
          CHECK_EQ(sent.elements, trips * width * std::ranges::count(nodes, node));
        }
      }
    }
  }
}

// A rank sends as many elements as the file says, and with a codec on message links their wire form.
TEST(the_least_crosses) {
  constexpr int64_t kShare = 8 * kTile;
  const struct {
    Collective collective;
    int64_t count;                                           // of a block
    int64_t shares;                                          // of kShare, that a rank sends
  } cases[] = {{Collective::all_reduce, 6 * kShare, 2 * 2},  // S = 6 shares on N = 3 nodes of L = 2 ranks
               {Collective::reduce_scatter, kShare, 2},      // half of it
               {Collective::all_gather, kShare, 2}};
  for (const auto& c : cases) {
    for (const bool coded : {false, true}) {
      Call call{.world = {.collective = c.collective, .size = 6, .nodes = {0, 1, 2, 0, 1, 2}}};
      call.counts = uniform_counts(call.world, c.count);
      if (coded) call.codec = {.kind = CodecKind::int8, .links = Links::wire};
      const Plan plan = make_plan("hierarchical", call, {.bank_bytes = 8 << 20});
      for (const Program& program : plan.programs) {
        int64_t bytes = 0;
        Cursor().walk(program, [&](const Step& step, int64_t) {
          if (step.kind == Step::Kind::send) {
            bytes += operand_bytes(call, program.operands[step.operand].format, step.count);
          }
          return true;
        });
        CHECK_EQ(bytes, c.shares * (coded ? wire_bytes(CodecKind::int8, kShare) : kShare * 4));
      }
    }
  }
}

// Where nodes are alike, local rank l speaks to local rank l.
TEST(ranks_of_like_nodes_speak_to_their_like) {
  const Plan plan = all_to_all({0, 1, 0, 1, 0, 1}, 100, {.bank_bytes = 1 << 20});
  for (int rank = 0; rank < 6; ++rank) {
    const auto sent = sent_by(plan.programs[rank]);
    CHECK_EQ(sent.size(), size_t{1});
    CHECK_EQ(sent.begin()->first, rank ^ 1);
  }
}

// Ranks share what crosses, whatever the nodes: no rank collects for two destinations more than another.
TEST(ranks_of_unlike_nodes_share_what_crosses) {
  for (const std::vector<int>& nodes : kNodes) {
    const int n = static_cast<int>(nodes.size());
    const Plan plan = all_to_all(nodes, 64, {.bank_bytes = 1 << 20});
    for (int rank = 0; rank < n; ++rank) {
      const auto mates = static_cast<size_t>(std::ranges::count(nodes, nodes[rank]));
      const size_t others = n - mates, destinations = sent_by(plan.programs[rank]).size();
      CHECK(destinations == others / mates || destinations == others / mates + 1);
    }
  }
}

TEST(a_count_for_each_pair_is_refused) {
  Call call{.world = {.collective = Collective::all_to_all, .size = 3, .nodes = {0, 0, 1}}};
  call.counts = {1, 1, 1, 1, 2, 1, 1, 1, 1};
  const auto refused = [&] {
    try {
      make_plan("hierarchical", call, {.bank_bytes = 1 << 20});
      return false;
    } catch (const ValueError& error) {
      const std::string what = error.what();
      return what.find("blocks of one length") != std::string::npos &&
             what.find("direct, pairwise") != std::string::npos;
    }
  };
  CHECK(refused());
  call.counts.assign(9, 1);
  CHECK(!refused());
  call.ragged = true;  // this rank's row and column are alike, others' may not be
  CHECK(refused());
}
