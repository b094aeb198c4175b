#include "common/caches.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <optional>

namespace pycomm {
namespace {

constexpr int64_t kLeastL2 = 256 << 10, kMostL2 = 4 << 20, kMostLast = 64 << 20;

template <class T>
std::optional<T> read(const std::string& path) {
  std::ifstream file(path);
  T value;
  if (file >> value) return value;
  return std::nullopt;
}

// "512K", "32M"
int64_t parse_size(const std::string& text) {
  int64_t size = 0;
  for (const char c : text) {
    if (c >= '0' && c <= '9' && size < INT64_MAX / 16) {
      size = size * 10 + (c - '0');
    } else {
      return size << (c == 'K' ? 10 : c == 'M' ? 20 : c == 'G' ? 30 : 0);
    }
  }
  return size;
}

// "0-3,8-11"
int count_cores(const std::string& list) {
  int count = 0;
  for (size_t at = 0; at < list.size();) {
    const size_t comma = std::min(list.find(',', at), list.size());
    const std::string range = list.substr(at, comma - at);
    const size_t dash = range.find('-');
    const auto number = [](const std::string& text) { return std::atoi(text.c_str()); };
    count += dash == std::string::npos ? 1 : number(range.substr(dash + 1)) - number(range) + 1;
    at = comma + 1;
  }
  return std::max(count, 1);
}

}  // namespace

Caches read_caches(const std::string& root, int cpu) {
  int64_t l2 = 0, last = 0;
  int last_level = 2;
  int sharers = static_cast<int>(sysconf(_SC_NPROCESSORS_CONF));  // if /sys does not say: all
  for (int index = 0; index < 8; ++index) {
    const std::string directory = root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                                  "/cache/index" + std::to_string(index) + "/";
    const auto level = read<int>(directory + "level");
    const auto type = read<std::string>(directory + "type");
    const auto size = read<std::string>(directory + "size");
    if (!level || !type || !size || *type == "Instruction") continue;
    if (*level == 2) l2 = parse_size(*size);
    if (*level <= last_level) continue;
    last_level = *level;
    last = parse_size(*size);
    sharers = count_cores(read<std::string>(directory + "shared_cpu_list").value_or(""));
  }
  if (root.empty()) {
    if (l2 <= 0) l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (last <= 0) last = sysconf(_SC_LEVEL3_CACHE_SIZE);
  }
  Caches found;
  if (l2 > 0) found.l2 = std::clamp(l2, kLeastL2, kMostL2);
  if (last > 0) found.last = last;
  found.last = std::clamp(found.last, found.l2, kMostLast);
  found.sharers = std::max(sharers, 1);
  return found;
}

int64_t past_cache_bytes(int cores, const Caches& found) {
  return found.last * 3 / 4 / std::clamp(cores, 2, std::max(found.sharers, 2));
}

const Caches& caches() {
  static const Caches found = read_caches();
  return found;
}

}  // namespace pycomm
