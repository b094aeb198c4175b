// How the caches of a machine are read, on made-up machines.
#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "check.h"
#include "common/caches.h"

using namespace pycomm;

namespace {

class Machine {
 public:
  Machine() {
    char name[] = "/tmp/pycomm-caches-XXXXXX";
    root_ = mkdtemp(name);
  }
  ~Machine() { std::filesystem::remove_all(root_); }
  Machine& cache(int index, const char* level, const char* type, const char* size, const char* sharers) {
    const std::string directory =
        root_ + "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    std::filesystem::create_directories(directory);
    for (const auto& [file, text] :
         {std::pair{"level", level}, {"type", type}, {"size", size}, {"shared_cpu_list", sharers}})
      std::ofstream(directory + file) << text << "\n";
    return *this;
  }
  Caches read() const { return read_caches(root_); }

 private:
  std::string root_;
};

constexpr int64_t kKiB = 1024, kMiB = kKiB * kKiB;

}  // namespace

TEST(three_levels) {
  Machine machine;
  machine.cache(0, "1", "Data", "32K", "0").cache(1, "1", "Instruction", "32K", "0");
  machine.cache(2, "2", "Unified", "1024K", "0,8").cache(3, "3", "Unified", "32768K", "0-7,16-23");
  const Caches found = machine.read();
  CHECK_EQ(found.l2, kMiB);
  CHECK_EQ(found.last, 32 * kMiB);
  CHECK_EQ(found.sharers, 16);
}

TEST(the_last_level_is_the_last_one_whatever_it_is_called) {
  Machine machine;
  machine.cache(0, "2", "Unified", "2M", "0")
      .cache(1, "4", "Unified", "48M", "0-3")
      .cache(2, "3", "Unified", "8M", "0");
  CHECK_EQ(machine.read().last, 48 * kMiB);
  CHECK_EQ(machine.read().sharers, 4);
}

TEST(nothing_said_is_a_default) {
  const Caches found = Machine().read();
  CHECK_EQ(found.l2, Caches().l2);
  CHECK_EQ(found.last, Caches().last);
  CHECK_EQ(found.sharers, sysconf(_SC_NPROCESSORS_CONF));
}

TEST(what_no_processor_has_is_bounded) {
  Machine huge;
  huge.cache(2, "2", "Unified", "1G", "0").cache(3, "3", "Unified", "4096G", "0");
  CHECK_EQ(huge.read().l2, 4 * kMiB);
  CHECK_EQ(huge.read().last, 64 * kMiB);
  Machine tiny;
  tiny.cache(2, "2", "Unified", "4K", "0").cache(3, "3", "Unified", "1K", "");
  CHECK_EQ(tiny.read().l2, 256 * kKiB);
  CHECK_EQ(tiny.read().last, 256 * kKiB);
  CHECK_EQ(tiny.read().sharers, 1);
  Machine nonsense;
  nonsense.cache(2, "two", "Unified", "512K", "0").cache(3, "3", "Unified", "lots", "9-1,-,x");
  CHECK_EQ(nonsense.read().l2, Caches().l2);
  CHECK_EQ(nonsense.read().last, Caches().last);
  CHECK(nonsense.read().sharers >= 1);
}

TEST(the_bound_of_non_temporal_stores_is_shared) {
  const Caches eight{.l2 = kMiB, .last = 32 * kMiB, .sharers = 8};
  CHECK_EQ(past_cache_bytes(1, eight), 12 * kMiB);
  CHECK_EQ(past_cache_bytes(2, eight), 12 * kMiB);
  CHECK_EQ(past_cache_bytes(4, eight), 6 * kMiB);
  CHECK_EQ(past_cache_bytes(64, eight), 3 * kMiB);
  const Caches lonely{.l2 = kMiB, .last = 32 * kMiB, .sharers = 1};
  CHECK_EQ(past_cache_bytes(64, lonely), 12 * kMiB);
}
