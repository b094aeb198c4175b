#include "common/words.h"

#include <algorithm>
#include <vector>

namespace pycomm {
namespace {

// Damerau's distance: a changed, added, removed or swapped letter counts one.
size_t distance(std::string_view a, std::string_view b) {
  std::vector<std::vector<size_t>> d(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) {
    for (size_t j = 0; j <= b.size(); ++j) {
      if (i == 0 || j == 0) {
        d[i][j] = i + j;
        continue;
      }
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
      }
    }
  }
  return d[a.size()][b.size()];
}

size_t near(std::string_view a, std::string_view b) {
  constexpr size_t kLeastPrefix = 3;  // two words may share a shorter beginning by chance
  const size_t common = std::min(a.size(), b.size());
  const bool begins = common >= kLeastPrefix && a.substr(0, common) == b.substr(0, common);
  return begins && a.size() != b.size() ? 1 : distance(a, b);
}

}  // namespace

std::string lower(std::string_view text) {
  std::string result(text);
  for (char& c : result) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return result;
}

std::string_view nearest(std::string_view text, std::span<const std::string_view> words) {
  constexpr size_t kLongest = 64;  // a longer text is no typing mistake, and slow to compare
  std::string_view best;
  if (text.size() > kLongest) return best;
  size_t fewest = kLongest;
  for (const std::string_view word : words) {
    const size_t changes = near(lower(text), lower(word));
    if (changes < fewest && changes <= std::max(word.size() / 3, size_t{1})) {
      best = word;
      fewest = changes;
    }
  }
  return best;
}

std::string did_you_mean(std::string_view text, std::span<const std::string_view> words) {
  const std::string_view word = nearest(text, words);
  return word.empty() ? "" : " (did you mean '" + std::string(word) + "'?)";
}

}  // namespace pycomm
