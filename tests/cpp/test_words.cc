// Suggestions for words that a user probably meant.
#include <array>
#include <string>
#include <string_view>

#include "check.h"
#include "common/words.h"

using namespace pycomm;

namespace {
constexpr std::array<std::string_view, 5> kWords = {"ring", "tree", "two_shot", "one_shot", "direct"};
}

TEST(a_word_with_a_slip_is_found) {
  CHECK_EQ(nearest("rign", kWords), "ring");          // two letters swapped
  CHECK_EQ(nearest("twoshot", kWords), "two_shot");   // one left out
  CHECK_EQ(nearest("directt", kWords), "direct");     // one added
  CHECK_EQ(nearest("one-shot", kWords), "one_shot");  // one changed
  CHECK_EQ(nearest("TREE", kWords), "tree");
  CHECK_EQ(nearest("two_sho", kWords), "two_shot");  // not one_shot, which is further
}

TEST(a_word_that_another_begins_with_is_one_letter_away) {
  CHECK_EQ(nearest("direct_copy", kWords), "direct");
  CHECK_EQ(nearest("two", kWords), "two_shot");
}

TEST(what_is_too_far_is_no_word) {
  CHECK_EQ(nearest("butterfly", kWords), "");
  CHECK_EQ(nearest("xy", kWords), "");
  CHECK_EQ(nearest("ring", {}), "");
  CHECK_EQ(did_you_mean("butterfly", kWords), "");
  CHECK_EQ(did_you_mean("rng", kWords), " (did you mean 'ring'?)");
}

TEST(lower_leaves_what_is_no_letter) {
  CHECK_EQ(lower("All_Reduce-9"), "all_reduce-9");
  CHECK_EQ(lower("\xc3\x84"), "\xc3\x84");  // an umlaut in UTF-8
}
