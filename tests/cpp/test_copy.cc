// Copies of every length and alignment, with every instruction set, against std::memcpy.
#include <cstring>
#include <random>

#include "check.h"
#include "isas.h"
#include "kernels/copy.h"
#include "placed.h"

using namespace pycomm::kernels;

namespace {

std::vector<unsigned char> random_bytes(size_t count) {
  std::mt19937 random(1);
  std::vector<unsigned char> bytes(count);
  for (unsigned char& b : bytes) b = static_cast<unsigned char>(random());
  return bytes;
}

void check_copy(const std::vector<unsigned char>& source, size_t bytes, size_t from, size_t to) {
  for (const Isa* isa : isas()) {
    for (const bool past : {false, true}) {
      Placed dst(bytes, to);
      copy_bytes(dst.data, source.data() + from, bytes, past, *isa);
      stream_fence();
      CHECK(std::memcmp(dst.data, source.data() + from, bytes) == 0);
      CHECK(dst.guarded(bytes));
    }
  }
}

}  // namespace

TEST(every_short_length) {
  const auto source = random_bytes(1024);
  for (size_t bytes = 0; bytes <= 640; ++bytes) check_copy(source, bytes, bytes % 67, bytes % 64);
}

TEST(every_place_in_a_line) {
  const auto source = random_bytes(8192);
  for (size_t to = 0; to < 64; ++to) {
    for (const size_t from : {size_t{0}, size_t{1}, size_t{16}, size_t{63}, to}) {
      for (const size_t bytes : {256, 257, 383, 384, 4099}) check_copy(source, bytes, from, to);
    }
  }
}

TEST(the_very_same_place_stays_as_it_is) {
  const auto source = random_bytes(5000);
  for (const Isa* isa : isas()) {
    for (const bool past : {false, true}) {
      auto same = source;
      copy_bytes(same.data(), same.data(), same.size(), past, *isa);
      CHECK(same == source);
    }
  }
}
