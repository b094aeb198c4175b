// bfloat16 coded without loss: against a decoder that follows the header's text bit by bit, codes against
// Huffman's own algorithm, and hostile bytes.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <queue>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "kernels/lossless.h"

using namespace pycomm;
using namespace pycomm::kernels;

namespace {

using Elements = std::vector<uint16_t>;
using Bytes = std::vector<uint8_t>;

constexpr size_t kBlock = 65536;

// The wire has no byte more than it needs, so that AddressSanitizer sees any access past its end.
Bytes encoded(const Elements& x) {
  const size_t room = static_cast<size_t>(lossless_bound(static_cast<int64_t>(x.size())));
  const auto wire = std::make_unique<uint8_t[]>(room);
  const size_t bytes = lossless_encode(x.data(), x.size(), wire.get());
  CHECK(bytes <= room);
  return {wire.get(), wire.get() + bytes};
}

bool comes_back(const Elements& x) {
  const Bytes wire = encoded(x);
  Elements y(x.size(), 0x5a5a);
  return lossless_decode(wire.data(), wire.size(), y.data(), y.size()) == wire.size() && x == y;
}

enum class Kind { gaussian, anything, constant, two, skewed, patches, all_alike };
constexpr Kind kKinds[] = {Kind::gaussian, Kind::anything, Kind::constant, Kind::two,
                           Kind::skewed,   Kind::patches,  Kind::all_alike};

Elements elements(size_t count, Kind kind, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Elements x(count);
  for (size_t i = 0; i < count; ++i) {
    const auto any = static_cast<uint16_t>(random());
    const auto rest = static_cast<uint16_t>(any & 0x807f);
    const auto gaussian = static_cast<uint16_t>(std::bit_cast<uint32_t>(normal(random)) >> 16);
    switch (kind) {
      case Kind::gaussian:
        x[i] = gaussian;
        break;
      case Kind::anything:
        x[i] = any;
        break;
      case Kind::constant:
        x[i] = 0;
        break;
      case Kind::two:
        x[i] = static_cast<uint16_t>(rest | (any & 0x80));
        break;
      // 2^-k of them have exponent k, up to 31: codes of more than 11 bits, were they not limited.
      case Kind::skewed:
        x[i] =
            static_cast<uint16_t>(rest | std::countr_zero(static_cast<uint32_t>(random()) | 1u << 31) << 7);
        break;
      // Streams of one block that are shorter than others by far.
      case Kind::patches:
        x[i] = i / 10000 % 2 ? gaussian : 0;
        break;
      case Kind::all_alike:
        x[i] = static_cast<uint16_t>(rest | (i & 0xff) << 7);
        break;
    }
  }
  return x;
}

uint32_t word(const uint8_t* at) {
  return at[0] | at[1] << 8 | at[2] << 16 | static_cast<uint32_t>(at[3]) << 24;
}

// The code of a coded block, and where its streams' sizes are.
struct Header {
  std::vector<int> bits = std::vector<int>(256, -1);  // -1: the exponent does not occur
  const uint8_t* sizes;
};
Header header_of(const uint8_t* block, size_t n) {
  Header header;
  const uint8_t* at = block + n;
  const int least = *at++, largest = *at++;
  for (int e = least; e <= largest; ++e) {
    header.bits[e] = (at[(e - least) / 2] >> ((e - least) % 2 ? 4 : 0) & 15) - 1;
  }
  header.sizes = at + (largest - least + 2) / 2;
  return header;
}

// The exponent whose code the bits from `bit` on begin with; moves `bit`.
int next_exponent(const std::vector<int>& bits, const uint8_t* stream, size_t& bit) {
  uint32_t begun = 0, first = 0;  // the code so far; the first code of this length
  for (int length = 0;; ++length) {
    for (int e = 0, code = static_cast<int>(first); e < 256; ++e) {
      if (bits[e] != length) continue;
      if (code++ == static_cast<int>(begun)) return e;
    }
    first = (first + static_cast<uint32_t>(std::ranges::count(bits, length))) * 2;
    begun = begun * 2 + (stream[bit / 8] >> bit % 8 & 1);
    ++bit;
  }
}

Elements by_the_text(const Bytes& wire, size_t count) {
  Elements x;
  const uint8_t* at = wire.data();
  while (x.size() < count) {
    const size_t n = std::min(kBlock, count - x.size());
    const size_t bytes = word(at);
    const uint8_t* const block = at + 4;
    at = block + bytes;
    if (bytes == 2 * n) {
      for (size_t i = 0; i < n; ++i) x.push_back(static_cast<uint16_t>(block[2 * i] | block[2 * i + 1] << 8));
      continue;
    }
    const Header header = header_of(block, n);
    const uint8_t* stream = header.sizes + 12;
    const size_t quarter = (n + 3) / 4;
    for (size_t s = 0, i = 0; s < 4; ++s) {
      size_t bit = 0;
      for (const size_t end = std::min(n, (s + 1) * quarter); i < end; ++i) {
        const int exponent = next_exponent(header.bits, stream, bit);
        x.push_back(static_cast<uint16_t>((block[i] & 0x80) << 8 | exponent << 7 | (block[i] & 0x7f)));
      }
      stream += s < 3 ? word(header.sizes + 4 * s) : (bit + 7) / 8;
    }
    CHECK(stream == at);
  }
  CHECK(at == wire.data() + wire.size());
  return x;
}

// The bits of all symbols under Huffman's code, and its longest code.
std::pair<size_t, int> huffman(const std::vector<size_t>& counts) {
  using Node = std::pair<size_t, int>;  // symbols, height
  std::priority_queue<Node, std::vector<Node>, std::greater<>> nodes;
  for (const size_t count : counts) {
    if (count) nodes.emplace(count, 0);
  }
  size_t bits = 0;
  while (nodes.size() > 1) {
    const auto [a, high] = nodes.top();
    nodes.pop();
    const auto [b, higher] = nodes.top();
    nodes.pop();
    bits += a + b;
    nodes.emplace(a + b, 1 + std::max(high, higher));
  }
  return {bits, nodes.top().second};
}

}  // namespace

TEST(every_bit_pattern_comes_back) {
  Elements x(65536);
  std::iota(x.begin(), x.end(), uint16_t{0});
  CHECK(comes_back(x));  // as it is: all exponents are as frequent
  std::vector<Elements> by_exponent(256);
  for (uint32_t e = 0; e < 256; ++e) {  // now coded, each pattern among many of another exponent
    for (uint32_t rest = 0; rest < 256; ++rest) {
      by_exponent[e].push_back(static_cast<uint16_t>((rest & 0x80) << 8 | e << 7 | (rest & 0x7f)));
    }
    by_exponent[e].resize(4096, static_cast<uint16_t>((e ^ 1) << 7));
    CHECK(encoded(by_exponent[e]).size() < 2 * 4096);
    CHECK(comes_back(by_exponent[e]));
  }
}

TEST(every_length_and_kind_comes_back) {
  for (const Kind kind : kKinds) {
    for (size_t count = 0; count <= 1025; ++count) CHECK(comes_back(elements(count, kind, 1)));
    for (const size_t count : {kBlock - 1, kBlock, kBlock + 1, 3 * kBlock + 77}) {
      CHECK(comes_back(elements(count, kind, 2)));
    }
  }
}

TEST(elements_lie_anywhere) {
  const Elements x = elements(5000, Kind::gaussian, 3);
  Bytes from(2 * x.size() + 1), to(from.size());
  std::memcpy(from.data() + 1, x.data(), 2 * x.size());
  Bytes wire(static_cast<size_t>(lossless_bound(5000)) + 1);
  const size_t bytes = lossless_encode(from.data() + 1, x.size(), wire.data() + 1);
  CHECK(std::equal(wire.begin() + 1, wire.begin() + 1 + static_cast<std::ptrdiff_t>(bytes),
                   encoded(x).begin()));
  CHECK_EQ(lossless_decode(wire.data() + 1, wire.size() - 1, to.data() + 1, x.size()), bytes);
  CHECK(to == from);
}

TEST(the_wire_is_as_the_header_says) {
  for (const Kind kind : kKinds) {
    for (const size_t count : {size_t{1}, size_t{40}, size_t{1000}, kBlock + 501}) {
      const Elements x = elements(count, kind, 4);
      CHECK(by_the_text(encoded(x), count) == x);
    }
  }
}

TEST(sizes) {
  CHECK_EQ(lossless_bound(0), 0);
  CHECK_EQ(lossless_bound(1), 6);
  CHECK_EQ(lossless_bound(65536), 131076);
  CHECK_EQ(lossless_bound(65537), 131082);
  CHECK_EQ(lossless_bound(int64_t{5} << 30), (int64_t{10} << 30) + (int64_t{5} << 30) / 65536 * 4);
  // What cannot be made smaller takes the bound.
  for (const size_t count : {size_t{1}, size_t{65536}, size_t{200000}}) {
    const Elements x = elements(count, Kind::anything, 5);
    CHECK_EQ(static_cast<int64_t>(encoded(x).size()), lossless_bound(static_cast<int64_t>(count)));
  }
  // The entropy of a Gaussian's exponents is 2.56 bits; a code of whole bits needs at most 0.2 more here.
  const double ratio = static_cast<double>(encoded(elements(1 << 20, Kind::gaussian, 6)).size()) / (2 << 20);
  CHECK(ratio > (8 + 2.5) / 16);
  CHECK(ratio < (8 + 2.76) / 16);
  // Zeros: their signs and mantissas, and 20 bytes for a block.
  CHECK_EQ(encoded(elements(kBlock, Kind::constant, 7)).size(), kBlock + 4 + 2 + 1 + 12);
}

// Of all codes with at most 11 bits none is shorter: Huffman's is the shortest, if it has no more.
TEST(codes_are_the_shortest) {
  int limited = 0;
  for (const Kind kind : kKinds) {
    for (uint32_t seed = 0; seed < 20; ++seed) {
      const Elements x = elements(3000 + 1000 * seed, kind, 100 + seed);
      const Bytes wire = encoded(x);
      if (word(wire.data()) == 2 * x.size()) continue;
      std::vector<size_t> counts(256);
      for (const uint16_t each : x) ++counts[each >> 7 & 0xff];
      const std::vector<int> bits = header_of(wire.data() + 4, x.size()).bits;
      size_t ours = 0;
      double share = 0;
      for (int e = 0; e < 256; ++e) {
        CHECK_EQ(bits[e] >= 0, counts[e] > 0);
        if (counts[e] == 0) continue;
        ours += counts[e] * static_cast<size_t>(bits[e]);
        share += 1.0 / (1 << bits[e]);
        CHECK(bits[e] <= 11);
      }
      CHECK_EQ(share, 1.0);
      const auto [best, longest] = huffman(counts);
      if (longest <= 11) {
        CHECK_EQ(ours, best);
      } else {  // the limit costs little
        ++limited;
        CHECK(ours > best);
        CHECK(static_cast<double>(ours) < 1.02 * static_cast<double>(best));
      }
    }
  }
  CHECK(limited > 5);
}

// Whatever the bytes are: an error or some elements, and nothing past any end.
TEST(hostile_bytes) {
  std::mt19937 random(8);
  int refused = 0, taken = 0;
  for (int trial = 0; trial < 30000; ++trial) {
    const Kind kind = kKinds[random() % std::size(kKinds)];
    const size_t count = 1 + random() % (trial % 100 ? 600 : 3000);
    const Elements x = elements(count, kind, random());
    const Bytes wire = encoded(x);
    size_t bytes = wire.size();
    if (random() % 4 == 0) bytes = random() % (bytes + 1);
    const auto damaged = std::make_unique<uint8_t[]>(bytes);
    std::copy_n(wire.begin(), bytes, damaged.get());
    // In the first words, in the code and the sizes, or anywhere.
    const size_t begins[] = {0, std::min(bytes, 4 + count), 0};
    const size_t ends[] = {std::min<size_t>(bytes, 4), std::min(bytes, 4 + count + 40), bytes};
    for (auto damage = random() % 4; damage > 0; --damage) {
      const auto where = random() % 3;
      if (begins[where] == ends[where]) continue;
      const size_t at = begins[where] + random() % (ends[where] - begins[where]);
      damaged[at] = static_cast<uint8_t>(random() % 2 ? random() : damaged[at] + 1);
    }
    const auto y = std::make_unique<uint16_t[]>(count);
    try {
      const size_t read = lossless_decode(damaged.get(), bytes, y.get(), count);
      CHECK(read <= bytes);
      ++taken;
    } catch (const ValueError&) {
      ++refused;
    }
  }
  CHECK(refused > 3000);
  CHECK(taken > 3000);
}

// A code that is whole, and streams of random bits under random sizes.
TEST(hostile_streams) {
  std::mt19937 random(9);
  int refused = 0;
  for (int trial = 0; trial < 4000; ++trial) {
    const size_t count = 1 + random() % 4000;
    const Elements like = elements(4096, kKinds[trial % 2 ? 4 : 0], random());
    const Bytes wire = encoded(like);
    const Header header = header_of(wire.data() + 4, like.size());
    Bytes forged(4 + count);
    const uint8_t* const code = wire.data() + 4 + like.size();
    forged.insert(forged.end(), code, header.sizes);
    for (int s = 0; s < 3; ++s) {
      const auto size = static_cast<uint32_t>(random() % (count / 4 + 2));
      for (int i = 0; i < 4; ++i) forged.push_back(static_cast<uint8_t>(size >> 8 * i));
    }
    for (size_t left = random() % (count + 8); left > 0; --left)
      forged.push_back(static_cast<uint8_t>(random()));
    const auto bytes = static_cast<uint32_t>(forged.size() - 4);
    for (int i = 0; i < 4; ++i) forged[i] = static_cast<uint8_t>(bytes >> 8 * i);
    const auto y = std::make_unique<uint16_t[]>(count);
    try {
      lossless_decode(forged.data(), forged.size(), y.get(), count);
    } catch (const ValueError&) {
      ++refused;
    }
  }
  CHECK(refused > 3000);
}

TEST(errors_say_what_is_wrong) {
  const Elements x = elements(1000, Kind::gaussian, 10);
  const auto error_of = [&](const std::function<void(Bytes&)>& damage, size_t count = 1000) -> std::string {
    Bytes wire = encoded(x);
    damage(wire);
    Elements y(count);
    try {
      lossless_decode(wire.data(), wire.size(), y.data(), count);
    } catch (const ValueError& error) {
      return error.what();
    }
    return "";
  };
  const auto says = [&](const char* what, const std::function<void(Bytes&)>& damage, size_t count = 1000) {
    const std::string error = error_of(damage, count);
    CHECK(error.find("codec lossless") != std::string::npos);
    CHECK(error.find(what) != std::string::npos);
  };
  const size_t code = 4 + x.size();
  CHECK_EQ(error_of([](Bytes&) {}), "");
  says("they end before element 0", [](Bytes& wire) { wire.resize(3); });
  says("they end in element 0's block", [](Bytes& wire) { wire.pop_back(); });
  says("a block of 900 bytes", [](Bytes& wire) {
    wire[0] = 900 % 256;
    wire[1] = 900 / 256;
  });
  says("a block of 1000 bytes", [](Bytes& wire) {  // with no room for a code
    wire = Bytes(4 + 1000);
    wire[0] = 1000 % 256;
    wire[1] = 1000 / 256;
  });
  says("its least exponent is 255", [&](Bytes& wire) { wire[code] = 255; });
  says("a code of 14 bits", [&](Bytes& wire) { wire[code + 2] = 15; });
  for (const int bits : {-1, 1}) {  // too few codes, and too many
    says("its code is not whole",
         [&](Bytes& wire) { wire[code + 2] = static_cast<uint8_t>((wire[code + 2] & 0xf0) | (bits + 1)); });
  }
  const auto zeros_and_a_byte = [&](Bytes& wire) {
    wire = encoded(Elements(1000));
    ++wire[0];
    wire.push_back(0);
  };
  says("it goes on after its end", zeros_and_a_byte);
  says("a stream of ", [&](Bytes& wire) {
    const size_t sizes = static_cast<size_t>(header_of(wire.data() + 4, x.size()).sizes - wire.data());
    wire[sizes + 3] = 0x7f;
  });
  says("a stream does not end where its codes do", [&](Bytes& wire) {
    const size_t sizes = static_cast<size_t>(header_of(wire.data() + 4, x.size()).sizes - wire.data());
    --wire[sizes];
  });
}
