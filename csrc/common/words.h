// Suggests the word that a user probably meant: for error messages.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

namespace pycomm {

// The first of `words` that is the fewest edits away from `text`; an edit changes, adds or removes a letter,
// or swaps it with the next. Empty if that takes more edits than a third of the word's letters. Upper and
// lower case are equal, and a word counts as one edit away if it begins with the text or the text with it.
std::string_view nearest(std::string_view text, std::span<const std::string_view> words);
// " (did you mean 'WORD'?)", or "" if no word is near.
std::string did_you_mean(std::string_view text, std::span<const std::string_view> words);
std::string lower(std::string_view text);

}  // namespace pycomm
