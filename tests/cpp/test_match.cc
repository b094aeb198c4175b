// Which combine and which accept each offer of a schedule meets, and what is said of a schedule that breaks
// the rules.
#include <functional>
#include <string>

#include "check.h"
#include "common/error.h"
#include "schedule/lower/match.h"

using namespace pycomm;
using namespace pycomm::schedule;

namespace {

Call all_reduce_of(int ranks) { return {.world = {.size = ranks}, .counts = {8}}; }

using Write = std::function<void(Builder&)>;

Schedule two_ranks(const Write& first, const Write& second) {
  Schedule schedule;
  schedule.ranks.resize(2);
  Builder a(schedule, 0), b(schedule, 1);
  first(a);
  second(b);
  return schedule;
}

void expect_fault(const Write& first, const Write& second, const std::string& words) {
  try {
    match(two_ranks(first, second), all_reduce_of(2));
    check::fail(__FILE__, __LINE__, "nothing is said, where this should be: " + words);
  } catch (const ValueError& error) {
    if (std::string(error.what()).find(words) == std::string::npos) {
      check::fail(__FILE__, __LINE__, std::string(error.what()) + ", where this should be: " + words);
    }
  }
}

const Write nothing = [](Builder&) {};
const Write copy_of_peer = [](Builder& b) { b.copy(b.out(), Builder::in_of(0)); };

}  // namespace

TEST(offers_of_one_chunk_are_met_in_order) {
  const auto show_twice = [](Builder& b) {
    b.offer(1, b.in());
    b.accept(1, b.in());
    b.offer(1, b.in());
    b.accept(1, b.in());
  };
  const auto read_twice = [](Builder& b) {
    b.copy(b.scratch(), Builder::in_of(0));
    b.copy(b.out(), b.in());
    b.copy(b.scratch({1}), Builder::in_of(0));
  };
  const Matches matches = match(two_ranks(show_twice, read_twice), all_reduce_of(2));
  CHECK_EQ(matches.offers.size(), 2u);
  const Offer &first = matches.offers[0], &second = matches.offers[1];
  CHECK_EQ(first.step, 0);
  CHECK_EQ(first.accept, 1);
  CHECK_EQ(first.use, 0);
  CHECK_EQ(second.step, 2);
  CHECK_EQ(second.accept, 3);
  CHECK_EQ(second.use, 2);
  CHECK(first.read && !first.written);
  CHECK(matches.at_step[0] == (std::vector<std::vector<int>>{{0}, {0}, {1}, {1}}));
  CHECK(matches.at_step[1] == (std::vector<std::vector<int>>{{0}, {}, {1}}));
}

TEST(one_combine_may_read_and_write_what_it_is_offered) {
  const auto show = [](Builder& b) {
    b.offer(1, b.out());
    b.offer(1, b.in());
    b.accept(1, b.in());
    b.accept(1, b.out());
  };
  const auto sum = [](Builder& b) {
    b.combine({b.out(), Builder::out_of(0)}, {Builder::in_of(0), b.in()}, /*final=*/true);
  };
  const Matches matches = match(two_ranks(show, sum), all_reduce_of(2));
  CHECK(matches.offers[0].written && !matches.offers[0].read);
  CHECK(matches.offers[1].read && !matches.offers[1].written);
  CHECK(matches.at_step[1] == (std::vector<std::vector<int>>{{1, 0}}));  // the sources first
}

TEST(a_broken_rule_is_told_with_its_step) {
  const auto show = [](Builder& b) {
    b.offer(1, b.in());
    b.accept(1, b.in());
  };
  CHECK(match(two_ranks(show, copy_of_peer), all_reduce_of(2)).offers.size() == 1);

  expect_fault(
      nothing, copy_of_peer,
      "schedule, rank 1, step 0: uses in@0 block 0 [0, 1)/1 more often than rank 0 offers it to rank 1");
  expect_fault(
      show,
      [](Builder& b) {
        copy_of_peer(b);
        copy_of_peer(b);
      },
      "rank 1, step 1: uses in@0");
  expect_fault(show, nothing, "rank 0, step 0: rank 1 never uses the offer of in@0");
  expect_fault([](Builder& b) { b.offer(1, b.in()); }, copy_of_peer,
               "rank 0, step 0: offers and never accepts in@0");
  expect_fault([](Builder& b) { b.accept(1, b.in()); }, nothing,
               "rank 0, step 0: accepts in@0 block 0 [0, 1)/1 from rank 1 more often than it has offered it");
  expect_fault(  // before it is offered
      [](Builder& b) {
        b.accept(1, b.in());
        b.offer(1, b.in());
      },
      copy_of_peer, "rank 0, step 0: accepts");
  expect_fault([](Builder& b) { b.offer(1, Builder::in_of(1)); }, nothing, "offers another rank's in@1");
  expect_fault([](Builder& b) { b.offer(0, b.in()); }, nothing, "offers to rank 0, which is not one of");
  expect_fault([](Builder& b) { b.offer(2, b.in()); }, nothing, "offers to rank 2, which is not one of");
  expect_fault([](Builder& b) { b.combine({b.out()}, {}); }, nothing, "needs a destination and a source");
  expect_fault([](Builder& b) { b.copy(b.out(), Builder::in_of(2)); }, nothing, "there is no rank 2");
  expect_fault([](Builder& b) { b.copy(b.out(), b.in({0, 3, 2, 4})); }, nothing,
               "not a chunk: in@0 block 0 [3, 2)/4");
  expect_fault([](Builder& b) { b.copy(b.out({1}), b.in()); }, nothing, "`out` has no block 1");
  expect_fault([](Builder& b) { b.copy(b.image({1000}), b.in()); }, nothing, "no such block: image@0");
  CHECK_THROWS(ValueError, match(two_ranks(nothing, nothing), all_reduce_of(3)));
}

TEST(chunks_overlap_whatever_their_fractions) {
  const auto chunk = [](int first, int last, int of) { return Ref{0, Buffer::in, {0, first, last, of}}; };
  CHECK(overlap(chunk(0, 1, 2), chunk(1, 2, 4)));
  CHECK(!overlap(chunk(0, 1, 2), chunk(2, 3, 4)));
  CHECK(overlap(chunk(0, 2, 3), chunk(1, 2, 2)));
  CHECK(!overlap(chunk(0, 1, 1), {0, Buffer::out, {}}));
  CHECK(!overlap(chunk(0, 1, 1), {1, Buffer::in, {}}));
  CHECK(!overlap(chunk(0, 1, 1), {0, Buffer::in, {1}}));
}
