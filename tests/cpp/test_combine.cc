// The kernels against an independent reference: one element at a time, recursively, in float64 or in wide
// integers, with the small floats as sorted tables of their values.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "check.h"
#include "common/dtype.h"
#include "float_table.h"
#include "isas.h"
#include "kernels/combine.h"
#include "placed.h"

using namespace pycomm;
using namespace pycomm::kernels;

namespace {

using Byte = unsigned char;
using Bytes = std::vector<Byte>;

// ---- the reference ----

bool is_complex(DType d) { return d == DType::complex64 || d == DType::complex128; }
bool is_floating(DType d) { return d < DType::int8 || is_complex(d); }
bool is_signed(DType d) { return d >= DType::int8 && d <= DType::int64; }
bool in_float64(DType d) { return d == DType::float64 || d == DType::complex128; }

// To the precision results are accumulated in. Rounding a float64 sum, product or quotient of float32 numbers
// to float32 is rounding the exact one. (volatile: gcc 12 at -O2 makes one vector of two such roundings, and
// then none.)
double rounded(bool wide, double x) {
  volatile float narrow = static_cast<float>(x);
  return wide ? x : static_cast<double>(narrow);
}

struct Number {
  double re = 0, im = 0;
  __int128 whole = 0;
};

template <class T>
T load(const Byte* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
template <class T>
void save(Byte* p, T value) {
  std::memcpy(p, &value, sizeof value);
}

__int128 wrap(__int128 x, DType dtype) {
  if (is_floating(dtype)) return 0;
  const __int128 range = static_cast<__int128>(1) << (8 * size_of(dtype));
  x %= range;
  if (x < 0) x += range;
  return is_signed(dtype) && x >= range / 2 ? x - range : x;
}

uint64_t load_bits(const Byte* p, size_t size) {
  uint64_t bits = 0;
  std::memcpy(&bits, p, size);  // little endian
  return bits;
}

Number decode(DType dtype, const Byte* p) {
  Number x;
  if (const Table* table = table_of(dtype)) {
    x.re = table->decode(static_cast<uint32_t>(load_bits(p, size_of(dtype))));
  } else if (is_floating(dtype)) {
    x.re = in_float64(dtype) ? load<double>(p) : load<float>(p);
    if (is_complex(dtype)) x.im = in_float64(dtype) ? load<double>(p + 8) : load<float>(p + 4);
  } else {
    x.whole = wrap(static_cast<__int128>(load_bits(p, size_of(dtype))), dtype);
  }
  return x;
}

void encode_real(bool wide, double x, Byte* p) {
  if (wide) {
    save<uint64_t>(p, std::isnan(x) ? 0x7ff8000000000000 : std::bit_cast<uint64_t>(x));
  } else {
    save<uint32_t>(p, std::isnan(x) ? 0x7fc00000 : std::bit_cast<uint32_t>(static_cast<float>(x)));
  }
}

void encode(DType dtype, const Number& x, Byte* p) {
  if (const Table* table = table_of(dtype)) {
    const uint32_t code = table->encode(x.re);
    std::memcpy(p, &code, size_of(dtype));
  } else if (is_floating(dtype)) {
    encode_real(in_float64(dtype), x.re, p);
    if (is_complex(dtype)) encode_real(in_float64(dtype), x.im, p + size_of(dtype) / 2);
  } else {
    const auto bits = static_cast<uint64_t>(x.whole);
    std::memcpy(p, &bits, size_of(dtype));
  }
}

double extreme(double a, double b, bool low) {
  if (std::isnan(a) || std::isnan(b)) return std::nan("");
  if (a == b) return std::signbit(a) == low ? a : b;
  return (a < b) == low ? a : b;
}

Number apply(DType dtype, Op op, const Number& a, const Number& b) {
  const auto round = [&](double x) { return rounded(in_float64(dtype), x); };
  Number r;
  switch (op) {
    case Op::sum:
    case Op::avg:
      r = {round(a.re + b.re), round(a.im + b.im), wrap(a.whole + b.whole, dtype)};
      break;
    case Op::prod:
      if (is_complex(dtype)) {
        r.re = round(round(a.re * b.re) - round(a.im * b.im));
        r.im = round(round(a.re * b.im) + round(a.im * b.re));
      } else {
        const auto product = static_cast<uint64_t>(a.whole) * static_cast<uint64_t>(b.whole);
        r = {round(a.re * b.re), 0, wrap(static_cast<__int128>(product), dtype)};
      }
      break;
    case Op::min:
      r = {extreme(a.re, b.re, true), 0, a.whole < b.whole ? a.whole : b.whole};
      break;
    case Op::max:
      r = {extreme(a.re, b.re, false), 0, a.whole < b.whole ? b.whole : a.whole};
      break;
    case Op::band:
      r.whole = wrap(a.whole & b.whole, dtype);
      break;
    case Op::bor:
      r.whole = wrap(a.whole | b.whole, dtype);
      break;
    case Op::bxor:
      r.whole = wrap(a.whole ^ b.whole, dtype);
      break;
  }
  return r;
}

Number tree(DType dtype, Op op, const Number* leaves, size_t k) {
  if (k == 1) return leaves[0];
  const size_t left = std::bit_floor(k - 1);
  return apply(dtype, op, tree(dtype, op, leaves, left), tree(dtype, op, leaves + left, k - left));
}

// ---- cases ----

struct Case {
  DType dtype;
  Op op;
  std::vector<Format> srcs;
  Format dst;
  double prescale = 1, divisor = 1;

  DType held(Format f) const { return f == Format::partial ? accumulator(dtype) : dtype; }
  size_t dst_size() const { return size_of(held(dst)); }
  bool is_copy() const { return srcs.size() == 1 && srcs[0] == dst; }
  std::string title() const {
    return std::string(name(dtype)) + " " + name(op) + " k=" + std::to_string(srcs.size()) + " first " +
           check::show(srcs[0]) + " -> " + check::show(dst) + " prescale " + check::show(prescale);
  }
};

std::mt19937_64 random_bits(1);

// Small numbers for most, arbitrary bits (so NaN with payloads, infinities, subnormals) for some, and the
// zeros.
void fill(DType dtype, Byte* p, size_t count) {
  const size_t parts = is_complex(dtype) ? 2 : 1, size = size_of(dtype) / parts;
  for (size_t i = 0; i < count * parts; ++i, p += size) {
    const uint64_t bits = random_bits(), kind = random_bits() % 16;
    std::memcpy(p, &bits, size);
    if (dtype == DType::bool_) {
      *p = static_cast<Byte>(bits & 1);
    } else if (is_floating(dtype) && kind != 0) {
      const double sign = bits & 1 ? -1 : 1;
      double x = sign * static_cast<double>(bits >> 4 & 0xffff) / 4096;
      if (kind == 1) x = sign * 0.0;
      if (kind == 2) x = sign * (bits & 2 ? std::numeric_limits<double>::infinity() : 448 + (bits >> 8 & 31));
      if (kind == 3) x = in_float64(dtype) ? sign * 1.7e308 : sign * 3.4e38;
      if (kind == 4)
        x = sign * std::ldexp(bits >> 8 & 7, in_float64(dtype) ? -1074 : table_of(dtype) ? -25 : -149);
      Number number;
      number.re = x;
      encode(parts == 2 ? (in_float64(dtype) ? DType::float64 : DType::float32) : dtype, number, p);
    }
  }
}

std::vector<Bytes> make_sources(const Case& c, size_t count) {
  std::vector<Bytes> sources;
  for (Format f : c.srcs) {
    sources.emplace_back(count * size_of(c.held(f)));
    fill(c.held(f), sources.back().data(), count);
  }
  return sources;
}

Bytes reference(const Case& c, const std::vector<Bytes>& sources, size_t count) {
  if (c.is_copy()) return sources[0];
  Bytes result(count * c.dst_size());
  const DType acc = accumulator(c.dtype);
  const auto round = [&](double x) { return rounded(in_float64(c.dtype), x); };
  std::vector<Number> leaves(c.srcs.size());
  for (size_t i = 0; i < count; ++i) {
    for (size_t j = 0; j < leaves.size(); ++j) {
      const DType held = c.held(c.srcs[j]);
      leaves[j] = decode(held, sources[j].data() + i * size_of(held));
      if (c.srcs[j] == Format::raw) {
        leaves[j].re = round(leaves[j].re * round(c.prescale));
        leaves[j].im = round(leaves[j].im * round(c.prescale));
      }
    }
    Number x = tree(acc, c.op, leaves.data(), leaves.size());
    if (c.dst == Format::final) x.re = round(x.re / c.divisor), x.im = round(x.im / c.divisor);
    encode(c.held(c.dst), x, result.data() + i * c.dst_size());
  }
  return result;
}

// Equal bits, save that a partial NaN is any NaN.
bool same(const Case& c, const Byte* got, const Byte* want, size_t count) {
  if (std::memcmp(got, want, count * c.dst_size()) == 0) return true;
  if (c.dst != Format::partial || !is_floating(c.dtype) || c.is_copy()) return false;
  const DType held = c.held(c.dst);
  const bool wide = in_float64(held);
  const size_t size = wide ? 8 : 4;
  for (size_t at = 0; at < count * c.dst_size(); at += size) {
    if (std::memcmp(got + at, want + at, size) == 0) continue;
    const bool nans = wide ? std::isnan(load<double>(got + at)) && std::isnan(load<double>(want + at))
                           : std::isnan(load<float>(got + at)) && std::isnan(load<float>(want + at));
    if (!nans) return false;
  }
  return true;
}

void call(CombineFn fn, const Case& c, const std::vector<void*>& dsts, const std::vector<const void*>& srcs,
          size_t count, bool stream) {
  fn(CombineArgs{.dsts = dsts.data(),
                 .srcs = srcs.data(),
                 .src_formats = c.srcs.data(),
                 .num_dsts = static_cast<int>(dsts.size()),
                 .num_srcs = static_cast<int>(srcs.size()),
                 .dst_format = c.dst,
                 .stream = stream,
                 .count = count,
                 .prescale = c.prescale,
                 .divisor = c.divisor});
}

constexpr size_t kLongest = 4099;

// Every length, with the number of destinations, the alignment and `stream` varied along.
void check_lengths(const Case& c, const std::vector<Bytes>& sources, const Bytes& want,
                   const std::vector<size_t>& lengths) {
  for (bool aligned : {true, false}) {
    std::vector<Placed> placed;
    std::vector<const void*> srcs;
    for (size_t j = 0; j < sources.size(); ++j) {
      placed.emplace_back(sources[j].size(), aligned ? 0 : (j * 7 + 1) % 64);
      std::memcpy(placed[j].data, sources[j].data(), sources[j].size());
      srcs.push_back(placed[j].data);
    }
    for (const std::string& isa : isa_names()) {
      const CombineFn fn = find_combine(c.dtype, c.op, *find_isa(isa));
      for (size_t count : lengths) {
        const size_t m = 1 + (count + aligned) % 3, bytes = count * c.dst_size();
        std::vector<Placed> outs;
        std::vector<void*> dsts;
        for (size_t d = 0; d < m; ++d) {
          outs.emplace_back(bytes, aligned ? 0 : (count + d * 5) % 64);
          dsts.push_back(outs[d].data);
        }
        call(fn, c, dsts, srcs, count, count % 4 == 3);
        for (size_t d = 0; d < m; ++d) {
          if (!same(c, outs[d].data, want.data(), count) || !outs[d].guarded(bytes)) {
            check::fail(__FILE__, __LINE__,
                        c.title() + " " + isa + " count " + std::to_string(count) + " dst " +
                            std::to_string(d) + " of " + std::to_string(m));
            return;
          }
        }
      }
    }
  }
}

// The destinations are the first and the last source themselves, then one apart.
void check_in_place(const Case& c, const std::vector<Bytes>& sources, const Bytes& want, size_t count) {
  for (Format f : c.srcs) {
    if (size_of(c.held(f)) != c.dst_size()) return;
  }
  for (const std::string& isa : isa_names()) {
    for (bool stream : {false, true}) {
      for (size_t m : {1, 2, 3}) {
        std::vector<Bytes> copies = sources;
        Bytes apart(count * c.dst_size());
        std::vector<const void*> srcs;
        for (Bytes& copy : copies) srcs.push_back(copy.data());
        std::vector<void*> dsts = {copies.back().data()};
        if (m == 2 && copies.size() > 1) dsts = {copies.front().data(), copies.back().data()};
        if (m == 3) dsts.insert(dsts.begin(), apart.data());
        call(find_combine(c.dtype, c.op, *find_isa(isa)), c, dsts, srcs, count, stream);
        for (const void* dst : dsts) {
          if (!same(c, static_cast<const Byte*>(dst), want.data(), count)) {
            check::fail(__FILE__, __LINE__, c.title() + " " + isa + " in place, m=" + std::to_string(m));
          }
        }
      }
    }
  }
}

std::vector<size_t> all_lengths() {
  std::vector<size_t> lengths;
  for (size_t n = 0; n <= 70; ++n) lengths.push_back(n);
  for (size_t n : {255, 256, 257, 1023, 4099}) lengths.push_back(n);
  return lengths;
}

void check_case(const Case& c) {
  const std::vector<Bytes> sources = make_sources(c, kLongest);
  const Bytes want = reference(c, sources, kLongest);
  check_lengths(c, sources, want, all_lengths());
  check_in_place(c, sources, want, kLongest);
}

void check_pair(DType dtype, Op op) {
  constexpr Format raw = Format::raw, partial = Format::partial, final = Format::final;
  for (size_t k : {1, 2, 3, 4, 5, 7, 8, 9, 17}) {
    const std::vector<Format> raws(k, raw), partials(k, partial);
    std::vector<Format> mixed = raws;
    for (size_t j = 0; j < k; j += 2) mixed[j] = partial;
    const double divisor = op == Op::avg ? static_cast<double>(k) : 1;
    check_case({dtype, op, raws, final, 1, divisor});
    check_case({dtype, op, raws, partial});
    check_case({dtype, op, partials, partial});
    check_case({dtype, op, partials, final, 1, divisor});
    check_case({dtype, op, mixed, final, 1, divisor});
    if (op == Op::avg) {
      const auto [scale, rest] = average(dtype, static_cast<int>(k));
      check_case({dtype, op, raws, final, scale, rest});
      check_case({dtype, op, raws, partial, scale});
      check_case({dtype, op, mixed, final, scale, rest});
    }
    if (op == Op::sum && is_floating(dtype)) {
      check_case({dtype, op, raws, final, 0.3});
      check_case({dtype, op, mixed, partial, -0.7});
    }
  }
  check_case({dtype, op, {raw}, raw});
  check_case({dtype, op, {final}, final});
}

constexpr std::array kWideFloats = {DType::float32, DType::float64};
constexpr std::array kHalfFloats = {DType::float16, DType::bfloat16};
constexpr std::array kFloat8 = {DType::float8_e4m3fn, DType::float8_e5m2};
constexpr std::array kSigned = {DType::int8, DType::int16, DType::int32, DType::int64};
constexpr std::array kUnsigned = {DType::uint8, DType::uint16, DType::uint32, DType::uint64};
constexpr std::array kBools = {DType::bool_};
constexpr std::array kComplex = {DType::complex64, DType::complex128};
static_assert(kWideFloats.size() + kHalfFloats.size() + kFloat8.size() + kSigned.size() + kUnsigned.size() +
                      kBools.size() + kComplex.size() ==
                  kNumDTypes,
              "a dtype stands in none of these: no test compares its kernels");

void check_dtypes(std::span<const DType> dtypes) {
  for (DType dtype : dtypes) {
    for (int o = 0; o < kNumOps; ++o) {
      if (supports(dtype, static_cast<Op>(o))) check_pair(dtype, static_cast<Op>(o));
    }
  }
}

// One source to one destination of another format, for the conversion tests.
template <class To, class From>
std::vector<To> convert(const std::string& isa, DType dtype, const std::vector<From>& values, Format from,
                        Format to) {
  std::vector<To> results(values.size());
  const Case c{dtype, Op::sum, {from}, to};
  call(find_combine(dtype, Op::sum, *find_isa(isa)), c, {results.data()}, {values.data()}, values.size(),
       false);
  return results;
}

template <class Code>
void check_decode(DType dtype) {
  std::vector<Code> codes;
  for (uint32_t code = 0; code < 1u << (8 * sizeof(Code)); ++code) codes.push_back(static_cast<Code>(code));
  for (const std::string& isa : isa_names()) {
    const auto got = convert<float>(isa, dtype, codes, Format::raw, Format::partial);
    const auto back = convert<Code>(isa, dtype, codes, Format::raw, Format::final);
    for (size_t i = 0; i < codes.size(); ++i) {
      const double want = table_of(dtype)->decode(codes[i]);
      if (std::isnan(want)) {
        CHECK(std::isnan(got[i]));
        CHECK_EQ(back[i], table_of(dtype)->nan);
      } else {
        CHECK_EQ(std::bit_cast<uint32_t>(got[i]), std::bit_cast<uint32_t>(static_cast<float>(want)));
        CHECK_EQ(back[i], codes[i]);
      }
    }
  }
}

// Every value of the format, every midpoint between neighbours (the overflow's threshold too), and the floats
// just beside them, of both signs.
template <class Code>
void check_encode(DType dtype) {
  const Table& table = *table_of(dtype);
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> values = {inf,
                               -inf,
                               std::nanf(""),
                               -std::nanf("1"),
                               std::bit_cast<float>(0x7f800001u),
                               std::numeric_limits<float>::max(),
                               std::numeric_limits<float>::denorm_min()};
  for (size_t code = 0; code + 1 < table.values.size(); ++code) {
    for (double x : {table.values[code], (table.values[code] + table.values[code + 1]) / 2}) {
      const auto exact = static_cast<float>(x);
      for (float near : {exact, std::nextafterf(exact, inf), std::nextafterf(exact, -inf)}) {
        values.push_back(near);
        values.push_back(-near);
      }
    }
  }
  for (const std::string& isa : isa_names()) {
    const auto got = convert<Code>(isa, dtype, values, Format::partial, Format::final);
    for (size_t i = 0; i < values.size(); ++i) {
      const uint32_t want = table.encode(values[i]);
      if (got[i] != want) {
        check::fail(__FILE__, __LINE__,
                    std::string(name(dtype)) + " " + isa + " of " + check::show(values[i]) + ": " +
                        check::show(got[i]) + " against " + check::show(want));
      }
    }
  }
}

}  // namespace

TEST(every_supported_pair_has_a_kernel) {
  CHECK(!isa_names().empty());
  for (int d = 0; d < kNumDTypes; ++d) {
    for (int o = 0; o < kNumOps; ++o) {
      const auto dtype = static_cast<DType>(d);
      const auto op = static_cast<Op>(o);
      CHECK_EQ(find_combine(dtype, op) != nullptr, supports(dtype, op));
      for (const std::string& isa : isa_names()) {
        CHECK_EQ(find_combine(dtype, op, *find_isa(isa)) != nullptr, supports(dtype, op));
      }
    }
  }
  CHECK(find_isa("sse9") == nullptr);
}

TEST(wide_floats) { check_dtypes(kWideFloats); }
TEST(half_floats) { check_dtypes(kHalfFloats); }
TEST(float8) { check_dtypes(kFloat8); }
TEST(signed_integers) { check_dtypes(kSigned); }
TEST(unsigned_integers) { check_dtypes(kUnsigned); }
TEST(bools) { check_dtypes(kBools); }
TEST(complex_numbers) { check_dtypes(kComplex); }

TEST(many_sources) {
  for (size_t k : {33, 64, 100, 1000}) {
    check_case({DType::float32, Op::sum, std::vector<Format>(k, Format::raw), Format::final});
    check_case({DType::bfloat16, Op::sum, std::vector<Format>(k, Format::raw), Format::final});
  }
}

TEST(conversions_decode) {
  for (DType dtype : kFloat8) check_decode<uint8_t>(dtype);
  for (DType dtype : kHalfFloats) check_decode<uint16_t>(dtype);
}

TEST(conversions_encode) {
  for (DType dtype : kFloat8) check_encode<uint8_t>(dtype);
  for (DType dtype : kHalfFloats) check_encode<uint16_t>(dtype);
}

// Known answers, so that the tables above are not all there is to trust.
TEST(conversions_known) {
  const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
  const std::vector<float> x = {1.f,    -2.f, 448.f, 464.f,        464.0001f,
                                -500.f, inf,  nan,   0.001953125f, 0.0009765625f};
  const std::vector<uint8_t> e4m3 = {0x38, 0xc0, 0x7e, 0x7e, 0x7f, 0x7f, 0x7f, 0x7f, 0x01, 0x00};
  const std::vector<float> y = {1.f, 57344.f, 61439.f, 61440.f, -inf, nan, -0.f};
  const std::vector<uint8_t> e5m2 = {0x3c, 0x7b, 0x7b, 0x7c, 0xfc, 0x7e, 0x80};
  const std::vector<float> z = {1.f, 65504.f, 65519.f, 65520.f, 5.9604645e-8f, nan};
  const std::vector<uint16_t> half = {0x3c00, 0x7bff, 0x7bff, 0x7c00, 0x0001, 0x7e00};
  for (const std::string& isa : isa_names()) {
    CHECK(convert<uint8_t>(isa, DType::float8_e4m3fn, x, Format::partial, Format::final) == e4m3);
    CHECK(convert<uint8_t>(isa, DType::float8_e5m2, y, Format::partial, Format::final) == e5m2);
    CHECK(convert<uint16_t>(isa, DType::float16, z, Format::partial, Format::final) == half);
  }
}
