// The word that a user may have meant who wrote another one: for error messages.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

namespace pycomm {

// The first of `words` with the fewest letters to change, add, leave out or swap with the next one; empty
// where that would be more than a third of its letters. Upper and lower case count as the same, and a word
// that begins with the text, or that the text begins with, is one letter away.
std::string_view nearest(std::string_view text, std::span<const std::string_view> words);
// " (did you mean 'WORD'?)", or nothing where no word is near.
std::string did_you_mean(std::string_view text, std::span<const std::string_view> words);
std::string lower(std::string_view text);

}  // namespace pycomm
