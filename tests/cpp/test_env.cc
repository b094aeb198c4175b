#include <cmath>
#include <initializer_list>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "check.h"
#include "common/env.h"
#include "common/error.h"
#include "common/hash.h"

using namespace pycomm;

namespace {

Env read(const std::map<std::string, std::string>& variables) {
  return read_env([&](const char* name) {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  });
}

std::string error_of(const std::string& variable, const std::string& value) {
  try {
    read({{variable, value}});
  } catch (const ValueError& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST(defaults) {
  for (const Env& env :
       {read({}), read({{"PYCOMM_DEBUG", ""}, {"PYCOMM_ISA", ""}, {"PYCOMM_TIMEOUT", ""}})}) {
    CHECK(env.debug == LogLevel::warn);
    CHECK_EQ(env.isa, std::string());
    CHECK_EQ(env.timeout_s, 600.0);
    CHECK(env.spin_us > 0);
    CHECK(env.single_copy);
    CHECK_EQ(env.progress_core, 0);
    CHECK(!env.verify);
  }
}

TEST(values) {
  CHECK(read({{"PYCOMM_DEBUG", "WARN"}}).debug == LogLevel::warn);
  CHECK(read({{"PYCOMM_DEBUG", "INFO"}}).debug == LogLevel::info);
  CHECK(read({{"PYCOMM_DEBUG", "TRACE"}}).debug == LogLevel::trace);
  for (const char* isa : {"baseline", "avx2", "avx512", "neon"})
    CHECK_EQ(read({{"PYCOMM_ISA", isa}}).isa, isa);
  CHECK_EQ(read({{"PYCOMM_TIMEOUT", "2.5"}}).timeout_s, 2.5);
  CHECK_EQ(read({{"PYCOMM_SPIN_US", "7"}}).spin_us, 7.0);
  CHECK(read({{"PYCOMM_SINGLE_COPY", "1"}}).single_copy);
  CHECK_EQ(read({{"PYCOMM_PROGRESS_CORE", "3"}}).progress_core, 3);
  CHECK_EQ(read({{"PYCOMM_PROGRESS_CORE", "-1"}}).progress_core, -1);
  CHECK(read({{"PYCOMM_VERIFY", "1"}}).verify);
}

TEST(zero_means_off) {
  CHECK(read({{"PYCOMM_DEBUG", "0"}}).debug == LogLevel::off);
  CHECK_EQ(read({{"PYCOMM_ISA", "0"}}).isa, "baseline");
  CHECK(std::isinf(read({{"PYCOMM_TIMEOUT", "0"}}).timeout_s));
  CHECK_EQ(read({{"PYCOMM_SPIN_US", "0"}}).spin_us, 0.0);
  CHECK(!read({{"PYCOMM_SINGLE_COPY", "0"}}).single_copy);
  CHECK(!read({{"PYCOMM_VERIFY", "0"}}).verify);
}

TEST(bad_values_are_errors_that_name_variable_value_and_what_is_allowed) {
  const std::map<std::string, std::string> allowed = {
      {"PYCOMM_DEBUG", "WARN, INFO, TRACE"}, {"PYCOMM_ISA", "avx2"},         {"PYCOMM_TIMEOUT", "seconds"},
      {"PYCOMM_SPIN_US", "microseconds"},    {"PYCOMM_SINGLE_COPY", "0, 1"}, {"PYCOMM_VERIFY", "0, 1"}};
  for (const auto& [variable, words] : allowed)
    for (const char* value : {"nonsense", "-1", "1x", " 1", "nan", "inf", "1e999"}) {
      const std::string error = error_of(variable, value);
      CHECK(error.find(variable) != std::string::npos);
      CHECK(error.find(std::string("'") + value + "'") != std::string::npos);
      CHECK(error.find(words) != std::string::npos);
    }
  for (const char* value : {"nonsense", "1x", " 1", "1.5", "99999999999"})
    CHECK(error_of("PYCOMM_PROGRESS_CORE", value).find("-1 for the last") != std::string::npos);
  CHECK(error_of("PYCOMM_DEBUG", "info") != "");
  CHECK(error_of("PYCOMM_VERIFY", "2") != "");
}

TEST(hash_depends_on_every_bit_and_the_order) {
  CHECK(Hasher().add(1).add(2).digest() != Hasher().add(2).add(1).digest());
  CHECK(Hasher().add("ab").add("c").digest() != Hasher().add("a").add("bc").digest());
  CHECK(Hasher().add("").digest() != Hasher().digest());
  CHECK(Hasher(1).digest() != Hasher(2).digest());
  char bytes[21] = "twenty bytes of text";
  const uint64_t before = hash_bytes(bytes, 20);
  CHECK_EQ(hash_bytes(bytes, 20), before);
  for (int bit = 0; bit < 160; ++bit) {
    bytes[bit / 8] ^= static_cast<char>(1 << bit % 8);
    CHECK(hash_bytes(bytes, 20) != before);
    bytes[bit / 8] ^= static_cast<char>(1 << bit % 8);
  }
  CHECK(hash_bytes(bytes, 19) != before);
}

TEST(misspelt_names_are_found) {
  const auto found = [](std::initializer_list<const char*> entries) {
    std::vector<const char*> environment(entries);
    environment.push_back(nullptr);
    return misspelt(environment.data());
  };
  const std::pair<const char*, const char*> wrong[] = {
      {"PYCOMM_TIMOUT=5", "PYCOMM_TIMEOUT"}, {"PYCOMM_TIMEOUT_S=5", "PYCOMM_TIMEOUT"},
      {"PYCOMM_SPIN=3", "PYCOMM_SPIN_US"},   {"PYCOMM_DEBGU=INFO", "PYCOMM_DEBUG"},
      {"pycomm_debug=INFO", "PYCOMM_DEBUG"}, {"PYCOMM_SINGLECOPY=0", "PYCOMM_SINGLE_COPY"}};
  for (const auto& [entry, meant] : wrong) {
    const auto texts = found({"PATH=/bin", entry});
    CHECK_EQ(texts.size(), 1u);
    const std::string name(entry, std::string_view(entry).find('='));
    CHECK(texts[0].find(name + ",") != std::string::npos);
    CHECK(texts[0].find("did you mean " + std::string(meant) + "?") != std::string::npos);
  }
  CHECK(found({"PYCOMM_DEBUG=INFO", "PYCOMM_RANK=0", "PYCOMM_SIZE=1", "PYCOMM_JOB=j", "PYCOMM_TAKEN=1",
               "PYCOMM_MY_DATA=/data", "PYCOMM=1", "=", "NCCL_DEBUG=INFO", "MY_PYCOMM_TIMOUT=1"})
            .empty());
}
