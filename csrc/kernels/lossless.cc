#include "kernels/lossless.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>

#include "common/error.h"
#include "kernels/copy.h"

namespace pycomm::kernels {
namespace {

constexpr size_t kBlock = 1 << 16, kStreams = 4, kExponents = 256, kElement = 2;
constexpr int kMaxBits = 11;
constexpr size_t kWord = sizeof(uint64_t);  // what loads and stores of codes touch

template <class T>
T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
void store(uint8_t* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

// The elements of each stream of a block: [begin, begin + count).
struct Part {
  size_t begin, count;
};
Part part_of(size_t n, size_t stream) {
  const size_t quarter = (n + kStreams - 1) / kStreams, begin = std::min(n, stream * quarter);
  return {begin, std::min(n - begin, quarter)};
}

// ---- the code ----

using Counts = std::array<uint32_t, kExponents>;

// The exponents that occur, and how many bits each takes: 0 if it is the only one.
struct Code {
  struct Symbol {
    uint8_t exponent, bits;
    uint16_t code;  // its first bit is the lowest
  };
  std::array<Symbol, kExponents> symbols;  // ascending
  size_t size = 0;

  void assign_codes();
};

void Code::assign_codes() {
  std::array<uint32_t, kMaxBits + 1> next{}, used{};
  for (size_t i = 0; i < size; ++i) ++used[symbols[i].bits];
  used[0] = 0;  // a symbol without bits is alone
  for (int bits = 1; bits <= kMaxBits; ++bits) next[bits] = (next[bits - 1] + used[bits - 1]) * 2;
  for (size_t i = 0; i < size; ++i) {
    Symbol& symbol = symbols[i];
    uint32_t code = next[symbol.bits]++;
    symbol.code = 0;
    for (int bit = 0; bit < symbol.bits; ++bit, code >>= 1) {
      symbol.code = static_cast<uint16_t>(symbol.code << 1 | (code & 1));
    }
  }
}

// Package-merge: the symbols and pairs of the previous list make the next one, kMaxBits times; a symbol's bits
// are the number of lists in which it is among the first that are taken.
Code code_of(const Counts& counts) {
  Code code;
  for (size_t e = 0; e < kExponents; ++e) {
    if (counts[e]) code.symbols[code.size++] = {static_cast<uint8_t>(e), 0, 0};
  }
  std::array<Code::Symbol*, kExponents> rarest;
  for (size_t i = 0; i < code.size; ++i) rarest[i] = &code.symbols[i];
  const auto count = [&](size_t i) { return counts[rarest[i]->exponent]; };
  std::sort(rarest.begin(), rarest.begin() + code.size, [&](const Code::Symbol* a, const Code::Symbol* b) {
    return counts[a->exponent] != counts[b->exponent] ? counts[a->exponent] < counts[b->exponent] : a < b;
  });
  using List = std::array<uint32_t, 2 * kExponents>;
  List list{}, last{};
  std::array<std::array<bool, 2 * kExponents>, kMaxBits> is_symbol;
  size_t length = 0;
  for (auto& mark : is_symbol) {
    std::swap(list, last);
    const size_t pairs = length / 2;
    length = code.size + pairs;
    for (size_t i = 0, symbol = 0, pair = 0; i < length; ++i) {
      const uint32_t sum = pair < pairs ? last[2 * pair] + last[2 * pair + 1] : 0;
      mark[i] = pair == pairs || (symbol < code.size && count(symbol) <= sum);
      list[i] = mark[i] ? count(symbol++) : sum;
      if (!mark[i]) ++pair;
    }
  }
  size_t taken = 2 * code.size - 2;
  for (size_t level = kMaxBits; level-- > 0;) {
    const auto symbols =
        static_cast<size_t>(std::count(is_symbol[level].begin(), is_symbol[level].begin() + taken, true));
    for (size_t i = 0; i < symbols; ++i) ++rarest[i]->bits;
    taken = 2 * (taken - symbols);
  }
  code.assign_codes();
  return code;
}

// `exponents`: from the least to the largest.
size_t header_bytes(size_t exponents) { return 2 + (exponents + 1) / 2 + (kStreams - 1) * sizeof(uint32_t); }

[[noreturn]] void refuse(const std::string& why) {
  throw ValueError("bytes that codec lossless has not made: " + why);
}

// ---- encode ----

uint8_t* write_header(const Code& code, const std::array<size_t, kStreams>& sizes, uint8_t* to) {
  const uint8_t least = code.symbols[0].exponent, largest = code.symbols[code.size - 1].exponent;
  *to++ = least;
  *to++ = largest;
  const size_t nibbles = size_t{1} + largest - least;
  std::memset(to, 0, (nibbles + 1) / 2);
  for (size_t i = 0; i < code.size; ++i) {
    const size_t at = code.symbols[i].exponent - least;
    to[at / 2] = static_cast<uint8_t>(to[at / 2] | (code.symbols[i].bits + 1) << (at % 2 * 4));
  }
  to += (nibbles + 1) / 2;
  for (size_t s = 0; s + 1 < kStreams; ++s, to += sizeof(uint32_t))
    store(to, static_cast<uint32_t>(sizes[s]));
  return to;
}

struct Bits {
  uint64_t code;
  uint32_t length;
};
Bits joined(Bits first, Bits then) {
  return {first.code | then.code << first.length, first.length + then.length};
}

class Codes {
 public:
  explicit Codes(const Code& code) {
    for (size_t i = 0; i < code.size; ++i) {
      codes_[code.symbols[i].exponent] = code.symbols[i].code;
      lengths_[code.symbols[i].exponent] = code.symbols[i].bits;
    }
  }
  Bits at(uint8_t exponent) const { return {codes_[exponent], lengths_[exponent]}; }

 private:
  std::array<uint16_t, kExponents> codes_;
  std::array<uint8_t, kExponents> lengths_;
};

// Writes up to kWord bytes past the end of the stream.
void write_stream(const uint8_t* exponents, size_t count, const Codes& codes, uint8_t* to) {
  uint64_t pending = 0;
  uint32_t length = 0;
  const auto put = [&](Bits bits) {
    pending |= bits.code << length;
    length += bits.length;
    store(to, pending);
    to += length / 8;
    pending >>= length / 8 * 8;
    length %= 8;
  };
  const auto at = [&](size_t i) { return codes.at(exponents[i]); };
  size_t i = 0;
  for (; i + 4 <= count; i += 4) {  // 44 bits at most
    put(joined(joined(at(i), at(i + 1)), joined(at(i + 2), at(i + 3))));
  }
  for (; i < count; ++i) put(at(i));
}

void split(const uint8_t* __restrict x, size_t n, uint8_t* __restrict rest, uint8_t* __restrict exponents) {
  for (size_t i = 0; i < n; ++i) {
    const auto element = load<uint16_t>(x + i * kElement);
    rest[i] = static_cast<uint8_t>((element >> 8 & 0x80) | (element & 0x7f));
    exponents[i] = static_cast<uint8_t>(element >> 7);
  }
}

// Each stream is counted by itself: so its size is known before it is written.
void count_exponents(const uint8_t* exponents, size_t n, std::array<Counts, kStreams>& counts) {
  for (Counts& each : counts) each.fill(0);
  const size_t together = part_of(n, kStreams - 1).count;
  const uint8_t* begin[kStreams];
  for (size_t s = 0; s < kStreams; ++s) begin[s] = exponents + part_of(n, s).begin;
  for (size_t i = 0; i < together; ++i) {
    for (size_t s = 0; s < kStreams; ++s) ++counts[s][begin[s][i]];
  }
  for (size_t s = 0; s < kStreams; ++s) {
    for (size_t i = together; i < part_of(n, s).count; ++i) ++counts[s][begin[s][i]];
  }
}

// Returns the bytes after the block's first word.
size_t encode_block(const uint8_t* x, size_t n, uint8_t* exponents, uint8_t* to) {
  split(x, n, to, exponents);
  std::array<Counts, kStreams> counts;
  count_exponents(exponents, n, counts);
  Counts all{};
  for (const Counts& each : counts) {
    for (size_t e = 0; e < kExponents; ++e) all[e] += each[e];
  }
  const Code code = code_of(all);
  std::array<size_t, kStreams> sizes{};
  size_t total =
      n + header_bytes(size_t{1} + code.symbols[code.size - 1].exponent - code.symbols[0].exponent);
  for (size_t s = 0; s < kStreams; ++s) {
    for (size_t i = 0; i < code.size; ++i) {
      sizes[s] += size_t{counts[s][code.symbols[i].exponent]} * code.symbols[i].bits;
    }
    sizes[s] = (sizes[s] + 7) / 8;
    total += sizes[s];
  }
  if (total + kWord > n * kElement) {
    copy_bytes(to, x, n * kElement);
    return n * kElement;
  }
  const Codes codes(code);
  to = write_header(code, sizes, to + n);
  for (size_t s = 0; s < kStreams; to += sizes[s], ++s) {  // in order: each writes past its end
    write_stream(exponents + part_of(n, s).begin, part_of(n, s).count, codes, to);
  }
  return total;
}

// ---- decode ----

// What the next bits of a stream hold. From the lowest byte on: how many bits that takes; how many exponents;
// the exponents, six at most.
using Entry = uint64_t;
constexpr int kMostAtOnce = 6;
uint32_t bits_in(Entry entry) { return entry & 0xff; }
uint32_t count_in(Entry entry) { return entry >> 8 & 0xff; }
Entry exponents_in(Entry entry) { return entry >> 16; }

// The 2^k entries for the next k bits begin at index 2^k. Each is made of one for fewer bits: the first code
// takes some, and what the bits after it hold is known by then. If that is six exponents already, the entry
// holds the first one alone. Lookups are of kMaxBits.
class Table {
 public:
  explicit Table(const Code& code) {
    entries_[1] = 0;
    for (int k = 1; k <= kMaxBits; ++k) {
      std::fill_n(&entries_[size_t{1} << k], size_t{1} << k, 0);
      for (size_t i = 0; i < code.size; ++i) {
        const Code::Symbol& symbol = code.symbols[i];
        bits_[symbol.exponent] = symbol.bits;
        if (symbol.bits > k) continue;
        const Entry* const shorter = &entries_[size_t{1} << (k - symbol.bits)];
        Entry* const longer = &entries_[(size_t{1} << k) + symbol.code];
        for (size_t j = 0; j < size_t{1} << (k - symbol.bits); ++j) {
          const Entry rest = count_in(shorter[j]) == kMostAtOnce ? 0 : shorter[j];
          longer[j << symbol.bits] = (rest & ~Entry{0xffff}) << 8 | Entry{symbol.exponent} << 16 |
                                     ((rest & 0xffff) + 0x100 + symbol.bits);
        }
      }
    }
  }
  Entry at(uint64_t bits) const { return entries_[(size_t{1} << kMaxBits) + (bits & ((1 << kMaxBits) - 1))]; }
  uint8_t bits_of(uint8_t exponent) const { return bits_[exponent]; }

 private:
  std::array<Entry, size_t{2} << kMaxBits> entries_;
  std::array<uint8_t, kExponents> bits_;
};

struct Stream {
  size_t bit;    // where it goes on, from the begin of the block's streams
  uint8_t* out;  // where its next exponent goes
  size_t left;   // exponents
};

constexpr int kLookups = 5;  // 55 bits, of the 57 at least that a load gives
constexpr size_t kRoom = (kLookups - 1) * kMostAtOnce + kWord;  // what they write at most

// Decodes these streams in turn, as long as none of them is near an end.
template <size_t N>
void decode_together(const Table& table, const uint8_t* codes, size_t bytes, Stream* streams) {
  if (bytes < kWord) return;
  const size_t last = (bytes - kWord) * 8 + 7;
  std::array<Stream, N> s;
  std::copy_n(streams, N, s.begin());
  const auto can_go_on = [&] {
    bool all = true;
    for (const Stream& each : s) all = all & (each.bit <= last) & (each.left >= kRoom);
    return all;
  };
  while (can_go_on()) {
    uint64_t bits[N];
    for (size_t i = 0; i < N; ++i) bits[i] = load<uint64_t>(codes + s[i].bit / 8) >> s[i].bit % 8;
    for (int lookup = 0; lookup < kLookups; ++lookup) {
      for (size_t i = 0; i < N; ++i) {
        const Entry entry = table.at(bits[i]);
        store(s[i].out, exponents_in(entry));
        bits[i] >>= bits_in(entry);
        s[i].bit += bits_in(entry);
        s[i].out += count_in(entry);
        s[i].left -= count_in(entry);
      }
    }
  }
  std::copy_n(s.begin(), N, streams);
}

void decode_rest(const Table& table, const uint8_t* codes, size_t bytes, Stream& s) {
  for (; s.left > 0; --s.left) {
    const size_t at = s.bit / 8;
    if (at > bytes) refuse("a stream ends too soon");
    uint64_t bits = 0;
    std::memcpy(&bits, codes + at, std::min(bytes - at, kWord));
    const auto exponent = static_cast<uint8_t>(exponents_in(table.at(bits >> s.bit % 8)));
    *s.out++ = exponent;
    s.bit += table.bits_of(exponent);
  }
}

void merge(const uint8_t* __restrict rest, const uint8_t* __restrict exponents, size_t n,
           uint8_t* __restrict x) {
  for (size_t i = 0; i < n; ++i) {
    store(x + i * kElement,
          static_cast<uint16_t>((rest[i] & 0x80) << 8 | exponents[i] << 7 | (rest[i] & 0x7f)));
  }
}

// Reads the code of a block; moves `from` to the streams' sizes. There are two bytes at least.
Code read_code(const uint8_t*& from, const uint8_t* end) {
  const uint8_t least = from[0], largest = from[1];
  if (least > largest)
    refuse("its least exponent is " + std::to_string(least) + ", its largest " + std::to_string(largest));
  const size_t exponents = size_t{1} + largest - least;
  if (static_cast<size_t>(end - from) < header_bytes(exponents)) refuse("a block ends in its code");
  from += 2;
  Code code;
  uint32_t share = 0;  // of the 2^kMaxBits words that its codes begin: all, in a code that is whole
  for (size_t i = 0; i < exponents; ++i) {
    const int nibble = from[i / 2] >> (i % 2 * 4) & 0xf;
    if (nibble == 0) continue;
    if (nibble > kMaxBits + 1) refuse("a code of " + std::to_string(nibble - 1) + " bits");
    code.symbols[code.size++] = {static_cast<uint8_t>(least + i), static_cast<uint8_t>(nibble - 1), 0};
    share += 1u << (kMaxBits + 1 - nibble);
  }
  if (share != 1u << kMaxBits) refuse("its code is not whole");
  from += (exponents + 1) / 2;
  code.assign_codes();
  return code;
}

void decode_block(const uint8_t* from, size_t bytes, size_t n, uint8_t* exponents, uint8_t* x) {
  if (bytes < n + header_bytes(1)) refuse("a block of " + std::to_string(bytes) + " bytes");
  const uint8_t *const rest = from, *const end = from + bytes;
  from += n;
  const Code code = read_code(from, end);
  std::array<Stream, kStreams> streams;
  std::array<size_t, kStreams> ends;
  const uint8_t* const codes = from + (kStreams - 1) * sizeof(uint32_t);
  const auto room = static_cast<size_t>(end - codes);
  for (size_t s = 0, begin = 0; s < kStreams; begin = ends[s++]) {
    const size_t left = room - begin;
    const size_t size = s + 1 < kStreams ? load<uint32_t>(from + s * sizeof(uint32_t)) : left;
    if (size > left) refuse("a stream of " + std::to_string(size) + " bytes");
    ends[s] = begin + size;
    streams[s] = {begin * 8, exponents + part_of(n, s).begin, part_of(n, s).count};
  }
  if (code.size == 1) {
    std::memset(exponents, code.symbols[0].exponent, n);
    if (room > 0) refuse("it goes on after its end");
  } else {
    const Table table(code);
    decode_together<kStreams>(table, codes, room, streams.data());
    for (size_t s = 0; s < kStreams; ++s) {
      decode_together<1>(table, codes, room, &streams[s]);
      decode_rest(table, codes, room, streams[s]);
      if ((streams[s].bit + 7) / 8 != ends[s]) refuse("a stream does not end where its codes do");
    }
  }
  merge(rest, exponents, n, x);
}

}  // namespace

int64_t lossless_bound(int64_t count) {
  const auto block = static_cast<int64_t>(kBlock);
  return count * static_cast<int64_t>(kElement) + (count + block - 1) / block * 4;
}

size_t lossless_encode(const void* x, size_t count, void* wire) {
  const auto* from = static_cast<const uint8_t*>(x);
  auto* const begin = static_cast<uint8_t*>(wire);
  const auto exponents = std::make_unique_for_overwrite<uint8_t[]>(std::min(count, kBlock));
  uint8_t* to = begin;
  for (size_t i = 0; i < count; i += kBlock) {
    const size_t bytes = encode_block(from + i * kElement, std::min(count - i, kBlock), exponents.get(),
                                      to + sizeof(uint32_t));
    store(to, static_cast<uint32_t>(bytes));
    to += sizeof(uint32_t) + bytes;
  }
  return static_cast<size_t>(to - begin);
}

size_t lossless_decode(const void* wire, size_t bytes, void* x, size_t count) {
  const auto* const begin = static_cast<const uint8_t*>(wire);
  auto* to = static_cast<uint8_t*>(x);
  const auto exponents = std::make_unique_for_overwrite<uint8_t[]>(std::min(count, kBlock));
  size_t at = 0;
  for (size_t i = 0; i < count; i += kBlock) {
    const size_t n = std::min(count - i, kBlock);
    if (bytes - at < sizeof(uint32_t)) refuse("they end before element " + std::to_string(i));
    const size_t size = load<uint32_t>(begin + at);
    at += sizeof(uint32_t);
    if (size > bytes - at) refuse("they end in element " + std::to_string(i) + "'s block");
    if (size == n * kElement) {
      copy_bytes(to + i * kElement, begin + at, size);
    } else {
      decode_block(begin + at, size, n, exponents.get(), to + i * kElement);
    }
    at += size;
  }
  return at;
}

}  // namespace pycomm::kernels
