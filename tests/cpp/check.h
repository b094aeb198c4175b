// A test framework in one header: each tests/cpp/test_*.cc includes it once and is one executable.
//
//     TEST(two_ranks_agree) {
//       CHECK(ready);                          // a failed check is printed and the test goes on
//       CHECK_EQ(sum, 3);                      // prints both values
//       CHECK_THROWS(std::invalid_argument, parse("?"));
//     }
//
// `./test_x` runs all tests in the order of the file, `./test_x part` those whose name contains `part`. The
// exit code is 1 if a check failed, an exception escaped, or nothing matched. Checks may be made from several
// threads.
#pragma once

#include <atomic>
#include <cstring>
#include <exception>
#include <iostream>
#include <mutex>
#include <ostream>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

inline std::atomic<int> failures{0};

inline void fail(const char* file, int line, const std::string& what) {
  static std::mutex one_line_at_a_time;
  std::lock_guard lock(one_line_at_a_time);
  failures.fetch_add(1);
  std::cerr << file << ":" << line << ": " << what << std::endl;
}

// Shows numbers as numbers (uint8_t, too), enums by their value, and everything else as it is streamed.
template <typename T>
std::string show(const T& value) {
  std::ostringstream text;
  text.precision(17);
  if constexpr (std::is_same_v<T, bool>) {
    text << (value ? "true" : "false");
  } else if constexpr (std::is_enum_v<T>) {
    text << +static_cast<std::underlying_type_t<T>>(value);
  } else if constexpr (std::is_arithmetic_v<T>) {
    text << +value;
  } else if constexpr (requires { text << value; }) {
    text << value;
  } else {
    text << "(a value without operator<<)";
  }
  return text.str();
}

template <typename A, typename B>
void equal(const A& a, const B& b, const char* a_text, const char* b_text, const char* file, int line) {
  bool same;
  if constexpr (std::is_integral_v<A> && std::is_integral_v<B>) {
    same = std::cmp_equal(+a, +b);  // by value: comparing a size with a literal gives no warning
  } else {
    same = a == b;
  }
  if (!same) fail(file, line, std::string(a_text) + " == " + b_text + ": " + show(a) + " against " + show(b));
}

inline int run_all(int argc, char** argv) {
  int run = 0;
  for (const Test& test : tests()) {
    if (argc > 1 && !std::strstr(test.name, argv[1])) continue;
    ++run;
    const int before = failures.load();
    try {
      test.run();
    } catch (const std::exception& error) {
      fail(test.name, 0, std::string("exception: ") + error.what());
    } catch (...) {
      fail(test.name, 0, "an exception that is not a std::exception");
    }
    std::cout << (failures.load() == before ? "ok     " : "FAILED ") << test.name << std::endl;
  }
  if (run == 0) std::cerr << "no test matches" << std::endl;
  return run == 0 || failures.load() != 0;
}

}  // namespace check

#define TEST(name)                                                  \
  static void test_##name();                                        \
  static const check::Register register_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(...)                                                     \
  do {                                                                 \
    if (!(__VA_ARGS__)) check::fail(__FILE__, __LINE__, #__VA_ARGS__); \
  } while (false)

#define CHECK_EQ(a, b) check::equal((a), (b), #a, #b, __FILE__, __LINE__)

#define CHECK_THROWS(Type, ...)                                                                          \
  do {                                                                                                   \
    bool thrown = false;                                                                                 \
    try {                                                                                                \
      (void)(__VA_ARGS__);                                                                               \
    } catch (const Type&) {                                                                              \
      thrown = true;                                                                                     \
    } catch (const std::exception& error) {                                                              \
      check::fail(__FILE__, __LINE__,                                                                    \
                  std::string(#__VA_ARGS__ " threw another exception than " #Type ": ") + error.what()); \
      thrown = true;                                                                                     \
    }                                                                                                    \
    if (!thrown) check::fail(__FILE__, __LINE__, #__VA_ARGS__ " did not throw " #Type);                  \
  } while (false)

int main(int argc, char** argv) { return check::run_all(argc, argv); }
