// transcode() and the functions of shared_int against codec_reference.h, and against themselves with other
// cuts of the data.
//
// Tests: kernels/shared_int.cc.
#include <array>
#include <random>
#include <string>

#include "check.h"
#include "codec_reference.h"
#include "common/error.h"
#include "isas.h"
#include "kernels/cpu/codec_kernels.h"
#include "kernels/cpu/isa.h"

using namespace pycomm;
using namespace pycomm::kernels;
using reference::Floats;
using reference::Wire;

namespace {

std::vector<Codec> codecs() {
  std::vector<Codec> all;
  for (int k = 1; k < kNumCodecs; ++k) {
    const auto kind = static_cast<CodecKind>(k);
    for (const Rounding rounding : {Rounding::nearest, Rounding::stochastic}) {
      if (kind == CodecKind::sign && rounding == Rounding::stochastic) continue;
      const Codec codec{.kind = kind, .rounding = rounding, .seed = 0x123456789abcdef0};
      all.push_back(codec);
      if (kind == CodecKind::mxfp8) (all.emplace_back(codec)).ceil_scale = true;
      if (kind == CodecKind::int4) (all.emplace_back(codec)).hadamard = true;
    }
  }
  return all;
}

std::string describe(const Codec& c) {
  return std::string(name(c.kind)) + (c.rounding == Rounding::stochastic ? " stochastic" : "") +
         (c.ceil_scale ? " ceil" : "") + (c.hadamard ? " hadamard" : "");
}

// Bytes at an odd address, where nothing may be written before or after them.
class Guarded {
 public:
  explicit Guarded(size_t bytes, int shift = 3) : shift_(shift), bytes_(bytes), all_(bytes + 64, 0xa5) {}
  template <class T>
  explicit Guarded(const std::vector<T>& from, int shift = 3) : Guarded(from.size() * sizeof(T), shift) {
    if (bytes_) std::memcpy(data(), from.data(), bytes_);
  }
  void* data() { return all_.data() + shift_; }
  template <class T>
  std::vector<T> take() {
    std::vector<T> to(bytes_ / sizeof(T));
    if (bytes_) std::memcpy(to.data(), data(), bytes_);
    for (size_t i = 0; i < all_.size(); ++i) {
      const bool ours = i >= static_cast<size_t>(shift_) && i < static_cast<size_t>(shift_) + bytes_;
      if (!ours && all_[i] != 0xa5) check::fail(__FILE__, __LINE__, "bytes written around an operand");
    }
    return to;
  }

 private:
  int shift_;
  size_t bytes_;
  std::vector<uint8_t> all_;
};

struct Source {
  Format format;
  Guarded bytes;
};

// What k sources become.
void run(const Codec& codec, std::vector<Source>& sources, Format to, DType dtype, std::vector<Guarded>& dsts,
         size_t count, const Encoding& encoding, const Isa& isa, double prescale = 1, double divisor = 1,
         bool stream = false) {
  std::vector<const void*> srcs;
  std::vector<Format> formats;
  std::vector<void*> to_dsts;
  for (Source& s : sources) srcs.push_back(s.bytes.data()), formats.push_back(s.format);
  for (Guarded& d : dsts) to_dsts.push_back(d.data());
  transcode({.codec = &codec,
             .dtype = dtype,
             .dsts = to_dsts.data(),
             .srcs = srcs.data(),
             .src_formats = formats.data(),
             .num_dsts = static_cast<int>(dsts.size()),
             .num_srcs = static_cast<int>(srcs.size()),
             .dst_format = to,
             .stream = stream,
             .count = count,
             .prescale = prescale,
             .divisor = divisor,
             .encoding = encoding},
            isa);
}

Wire encoded(const Codec& codec, const Floats& x, const Encoding& encoding, const Isa& isa = chosen_isa(),
             int shift = 3) {
  std::vector<Source> sources;
  sources.push_back({Format::raw, Guarded(x, shift)});
  std::vector<Guarded> dsts(
      1, Guarded(static_cast<size_t>(wire_bytes(codec.kind, static_cast<int64_t>(x.size()))), shift));
  run(codec, sources, Format::wire, DType::float32, dsts, x.size(), encoding, isa);
  return dsts[0].take<uint8_t>();
}

Floats decoded(const Codec& codec, const Wire& wire, size_t count, const Isa& isa = chosen_isa()) {
  std::vector<Source> sources;
  sources.push_back({Format::wire, Guarded(wire)});
  std::vector<Guarded> dsts(1, Guarded(count * sizeof(float)));
  run(codec, sources, Format::partial, DType::float32, dsts, count, {}, isa);
  return dsts[0].take<float>();
}

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Values of one magnitude, with zeros, ties and, if asked for, whatever is special.
Floats values(size_t count, double magnitude, bool special, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  const float most = std::numeric_limits<float>::max(), inf = std::numeric_limits<float>::infinity();
  const std::array<float, 12> odd = {0.0f,     -0.0f, 1e-45f, -3e-39f, 1.17549435e-38f, most, -most, 65519.0f,
                                     65520.0f, inf,   -inf,   NAN};
  Floats x(count);
  for (float& value : x) {
    value = static_cast<float>(normal(random) * magnitude);
    if (random() % 16 == 0) value = static_cast<float>(std::nearbyint(value / magnitude * 2) / 2 * magnitude);
    if (special && random() % 200 == 0) value = odd[random() % odd.size()];
  }
  if (special) {  // blocks of zeros, of denormals, of the largest values
    for (size_t i = 0; i < count; ++i) {
      const size_t block = i / 64 % 23;
      if (block == 5) x[i] = 0;
      if (block == 9) x[i] = static_cast<float>(i % 7) * 1e-40f;
      if (block == 13) x[i] = i % 3 ? most : -most / 3;
      if (block == 17) x[i] = static_cast<float>(i % 64) * 1e-37f;
    }
  }
  return x;
}

const std::vector<double> kMagnitudes = {1, 1e-30, 1e30, 3e-36, 1e38, 1e-44};

void against_reference(const Codec& codec, const Floats& x, const Encoding& encoding) {
  const Wire expected = reference::encode(codec, x, encoding);
  CHECK_EQ(wire_bytes(codec.kind, static_cast<int64_t>(x.size())), expected.size());
  const Floats back = reference::decode(codec, expected, static_cast<int64_t>(x.size()));
  for (const Isa* isa : isas()) {
    const Wire wire = encoded(codec, x, encoding, *isa, 1 + static_cast<int>(x.size() % 7));
    if (wire != expected) {
      size_t at = 0;
      while (wire[at] == expected[at]) ++at;
      check::fail(__FILE__, __LINE__,
                  describe(codec) + ", " + std::to_string(x.size()) + " elements, " + isa->name + ": byte " +
                      std::to_string(at) + " is " + std::to_string(wire[at]) + ", not " +
                      std::to_string(expected[at]));
    }
    if (!same_bits(decoded(codec, expected, x.size(), *isa), back)) {
      check::fail(__FILE__, __LINE__, describe(codec) + " decodes otherwise, " + isa->name);
    }
  }
}

}  // namespace

// The vectors that come with Random123 (kat_vectors, philox4x32 10).
TEST(every_tile_code_has_kernels_in_every_instruction_set) {
  for (const Isa* isa : isas()) {
    for (int code = 0; code < kNumTileCodes; ++code) {
      CHECK(isa->codec->encode[code][0] != nullptr);
      CHECK(isa->codec->encode[code][1] != nullptr);
      CHECK(isa->codec->sum_decode[code] != nullptr);
    }
  }
}

TEST(philox_known_answers) {
  struct Case {
    uint32_t counter[4], key[2], expected[4];
  };
  const Case cases[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Case& c : cases) {
    const auto pair = [](const uint32_t* w) { return uint64_t{w[1]} << 32 | w[0]; };
    for (const Isa* isa : isas()) {
      std::array<uint8_t, 256> bytes{};
      isa->codec->random(bytes.data(), 16, pair(c.key), pair(c.counter), pair(c.counter + 2), bytes.data(),
                         bytes.size());
      CHECK(std::memcmp(bytes.data(), c.expected, 16) == 0);
    }
  }
}

TEST(philox_counts_over_words) {
  for (const Isa* isa : isas()) {
    for (const uint64_t first : {uint64_t{0}, uint64_t{0xffffffd0}, uint64_t{0x12345678ffffffb0}}) {
      std::vector<uint8_t> bytes(144 * 16);
      isa->codec->random(bytes.data(), 144, 77, first, 0xfedcba9876543210, bytes.data(), bytes.size());
      for (uint64_t i = 0; i < 144; ++i) {
        const uint64_t counter = first + i;
        const auto drawn = reference::philox(
            {77, 0},
            {{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0x76543210, 0xfedcba98}});
        CHECK(std::memcmp(bytes.data() + 16 * i, drawn.word, 16) == 0);
      }
    }
  }
}

TEST(names_and_sizes) {
  for (int k = 1; k < kNumCodecs; ++k) {
    const auto kind = static_cast<CodecKind>(k);
    CHECK(parse_codec(name(kind)) == kind);
    for (int64_t count = 0; count < 3000; ++count) {
      int64_t bytes = 0;
      for (int64_t rest = count; rest > 0; rest -= 1024)
        bytes += reference::bytes_of_tile(kind, std::min<int64_t>(rest, 1024));
      CHECK_EQ(wire_bytes(kind, count), bytes);
    }
    CHECK_EQ(tile_bytes(kind), wire_bytes(kind, kTile));
    CHECK_EQ(tile_bytes(kind) % 16, 0);
  }
  CHECK_THROWS(ValueError, parse_codec("int7"));
  CHECK_THROWS(ValueError, parse_codec("none"));
}

TEST(magnitudes) {
  for (const Codec& codec : codecs()) {
    for (const double magnitude : kMagnitudes) {
      against_reference(codec, values(3000, magnitude, false, 1), {.step = 7, .turn = 260, .rank = 5});
    }
  }
}

TEST(special_values) {
  for (const Codec& codec : codecs()) {
    for (uint32_t seed = 0; seed < 4; ++seed) {
      for (const double magnitude : {1.0, 1e-35, 3e37}) {
        against_reference(codec, values(5000, magnitude, true, seed),
                          {.step = 0xffffffff, .turn = 255, .rank = 0xffffff});
      }
    }
  }
}

TEST(every_length) {
  for (const Codec& codec : codecs()) {
    for (size_t count = 0; count < 4100; count += count < 70 ? 1 : 61) {
      against_reference(codec, values(count, 1, count % 2 == 0, static_cast<uint32_t>(count)),
                        {.index = 1024 * static_cast<int64_t>(count)});
    }
  }
}

TEST(segments) {
  const std::vector<std::vector<Segment>> lists = {
      {{0, 1, 3}, {256, 256, 9}, {256, 1280, 4}, {1536, 1537, 0xffffff}, {2048, 3000, 2}},
      {{512, 700, 1}, {5120, 6000, 2}},
      {{1024, 4000, 0}},
  };
  for (const Codec& codec : codecs()) {
    for (const auto& list : lists) {
      for (const int64_t index : {0, 1024}) {
        against_reference(codec, values(3333, 1, true, 5), {.step = 3, .index = index, .segments = list});
      }
    }
  }
}

// A tensor's elements have the same bits wherever it stands in a bucket, and however the bucket is cut into
// calls.
TEST(bits_do_not_depend_on_chunks_or_bucket) {
  const Floats x = values(10000, 1, true, 8);
  for (const Codec& codec : codecs()) {
    Floats bucket = values(20480, 1, true, 9);
    std::copy(x.begin(), x.end(), bucket.begin() + 768 + 512);
    const Segment alone[] = {{0, 10000, 6}}, together[] = {{0, 100, 2}, {1280, 11280, 6}, {11520, 20000, 7}};
    const Encoding in_bucket{.step = 1, .segments = together};
    const Wire whole = encoded(codec, bucket, in_bucket);
    const Floats of_tensor = decoded(codec, encoded(codec, x, {.step = 1, .segments = alone}), x.size());
    const Floats of_bucket = decoded(codec, whole, bucket.size());
    CHECK(same_bits(of_tensor, Floats(of_bucket.begin() + 1280, of_bucket.begin() + 11280)));

    Wire pieces;
    for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 1024}, {1024, 5120}, {5120, 20480}}) {
      Encoding encoding = in_bucket;
      encoding.index = begin;
      const Wire piece = encoded(codec, Floats(bucket.begin() + begin, bucket.begin() + end), encoding);
      pieces.insert(pieces.end(), piece.begin(), piece.end());
    }
    CHECK(pieces == whole);
  }
}

namespace {

// Source `s` as float32 values, what transcode() takes them for.
Floats source_values(const Codec& codec, Format format, DType dtype, const Floats& x,
                     std::vector<Source>& sources) {
  const size_t n = x.size();
  if (format == Format::wire) {
    const Wire wire = reference::encode(codec, x, {});
    sources.push_back({format, Guarded(wire)});
    return reference::decode(codec, wire, static_cast<int64_t>(n));
  }
  if (format == Format::partial || dtype == DType::float32) {
    sources.push_back({format, Guarded(x)});
    return x;
  }
  std::vector<uint16_t> raw(n);
  Floats back(n);
  for (size_t i = 0; i < n; ++i) {
    raw[i] = static_cast<uint16_t>(table_of(dtype)->encode(x[i]));
    back[i] = static_cast<float>(table_of(dtype)->decode(raw[i]));
  }
  sources.push_back({format, Guarded(raw)});
  return back;
}

float tree(const std::vector<Floats>& of, size_t i, size_t begin, size_t end) {
  if (end - begin == 1) return of[begin][i];
  const size_t half = std::bit_floor(end - begin - 1);
  return reference::narrow(double{tree(of, i, begin, begin + half)} + tree(of, i, begin + half, end));
}

}  // namespace

TEST(sums_of_any_formats) {
  std::mt19937 random(4);
  const Format kinds[] = {Format::raw, Format::partial, Format::wire};
  for (const Codec& codec : codecs()) {
    for (int trial = 0; trial < 24; ++trial) {
      const DType dtype = std::array{DType::float32, DType::float16, DType::bfloat16}[trial % 3];
      const size_t count = random() % 3 == 0 ? 2048 : random() % 2500, k = 1 + random() % (trial % 4 ? 3 : 9);
      const double prescale = random() % 2 ? 1 : 0.3, divisor = random() % 2 ? 1 : 3;
      std::vector<Source> sources;
      std::vector<Floats> parts;
      for (size_t s = 0; s < k; ++s) {
        const Format format = kinds[random() % 3];
        Floats x = source_values(codec, format, dtype, values(count, 1, trial % 5 == 0, random()), sources);
        if (format == Format::raw) {
          for (float& value : x) value = reference::narrow(double{value} * static_cast<float>(prescale));
        }
        parts.push_back(x);
      }
      Floats sum(count);
      for (size_t i = 0; i < count; ++i) sum[i] = reference::quiet(tree(parts, i, 0, k));
      Floats mean = sum;
      for (float& value : mean) value = reference::quiet(reference::narrow(value / divisor));

      const bool copies = k == 1 && sources[0].format == Format::wire;
      const Encoding encoding{.step = 9, .turn = 1, .rank = 2, .index = 4096};
      for (const Isa* isa : isas()) {
        std::vector<Guarded> partial(1 + trial % 2, Guarded(count * 4)),
            final(1 + trial % 3, Guarded(count * size_of(dtype)));
        std::vector<Guarded> wire(
            1 + trial % 2, Guarded(static_cast<size_t>(wire_bytes(codec.kind, static_cast<int64_t>(count)))));
        const bool stream = trial % 2;
        run(codec, sources, Format::partial, dtype, partial, count, {}, *isa, prescale, divisor, stream);
        for (Guarded& d : partial) CHECK(same_bits(d.take<float>(), sum));
        run(codec, sources, Format::final, dtype, final, count, {}, *isa, prescale, divisor, stream);
        for (Guarded& d : final) {
          if (dtype == DType::float32) {
            CHECK(same_bits(d.take<float>(), mean));
          } else {
            std::vector<uint16_t> expected(count);
            for (size_t i = 0; i < count; ++i)
              expected[i] = static_cast<uint16_t>(table_of(dtype)->encode(mean[i]));
            CHECK(d.take<uint16_t>() == expected);
          }
        }
        run(codec, sources, Format::wire, dtype, wire, count, encoding, *isa, prescale, divisor);
        const Wire expected =
            copies ? sources[0].bytes.take<uint8_t>() : reference::encode(codec, mean, encoding);
        for (Guarded& d : wire) CHECK(d.take<uint8_t>() == expected);
      }
    }
  }
}

TEST(final_in_place) {
  const Codec codec{.kind = CodecKind::int8};
  for (const size_t count : {1024, 3000}) {
    const Floats x = values(count, 1, false, 2), y = values(count, 1, false, 3);
    const Wire wire = reference::encode(codec, y, {});
    Guarded sum(x);
    Guarded source(wire);
    void* const dst = sum.data();
    const void* const srcs[] = {sum.data(), source.data()};
    const Format formats[] = {Format::raw, Format::wire};
    transcode({.codec = &codec,
               .dtype = DType::float32,
               .dsts = &dst,
               .srcs = srcs,
               .src_formats = formats,
               .num_dsts = 1,
               .num_srcs = 2,
               .dst_format = Format::final,
               .count = count});
    const Floats back = reference::decode(codec, wire, static_cast<int64_t>(count)), got = sum.take<float>();
    for (size_t i = 0; i < count; ++i) CHECK_EQ(got[i], reference::narrow(double{x[i]} + back[i]));
  }
}

TEST(residuals) {
  const Segment list[] = {{0, 1000, 1}, {1024, 2222, 2}, {2304, 3000, 3}};
  for (const Codec& codec : codecs()) {
    for (const float k : {1.0f, 0.37f}) {
      for (const bool segmented : {false, true}) {
        Encoding encoding{.step = 4};
        if (segmented) encoding.segments = list;
        const Floats x = values(3000, 1, true, 6), e = values(3000, 0.1, false, 7);
        Floats v(x.size()), expected(x.size());
        for (size_t i = 0; i < x.size(); ++i)
          v[i] = reference::narrow(double{x[i]} + reference::narrow(double{k} * e[i]));
        const Wire wire = reference::encode(codec, v, encoding);
        const Floats d = reference::decode(codec, wire, 3000);
        for (size_t i = 0; i < x.size(); ++i) {
          const float left = reference::narrow(reference::narrow(double{v[i]} - d[i]) / k);
          expected[i] = !reference::place(encoding, static_cast<int64_t>(i)).inside ? 0
                        : std::isfinite(d[i])                                       ? left
                                                                                    : e[i];
        }
        for (const Isa* isa : isas()) {
          for (const bool in_place : {false, true}) {
            Guarded now(e, 4), next(e.size() * 4, 5);
            encoding.residual = static_cast<const float*>(now.data());
            encoding.next_residual =
                in_place ? static_cast<float*>(now.data()) : static_cast<float*>(next.data());
            encoding.residual_scale = k;
            CHECK(encoded(codec, x, encoding, *isa) == wire);
            CHECK(same_bits((in_place ? now : next).take<float>(), expected));
          }
        }
      }
    }
  }
}

// OCP Microscaling Formats v1.0: the shared scale is 2^(floor(log2 amax) - 8), what exceeds 448 of it
// saturates, ties go to even, and a NaN scale is 255.
// One value that is not finite, anywhere, once it is rounded; in the destination, whole or past the cache.
TEST(whether_a_result_is_finite) {
  const Codec codec{.kind = CodecKind::int8};
  const auto is_finite = [&](DType dtype, const Floats& x, bool stream, const Isa& isa) {
    std::vector<char> out(x.size() * 4 + 64);
    void* dst = out.data() + (64 - reinterpret_cast<uintptr_t>(out.data()) % 64);
    const void* src = x.data();
    const Format partial = Format::partial;
    bool finite = true;
    transcode({.codec = &codec,
               .dtype = dtype,
               .dsts = &dst,
               .srcs = &src,
               .src_formats = &partial,
               .num_dsts = 1,
               .num_srcs = 1,
               .dst_format = Format::final,
               .stream = stream,
               .count = x.size(),
               .finite = &finite},
              isa);
    return finite;
  };
  for (const Isa* isa : isas()) {
    for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
      const float most = dtype == DType::float16 ? 65504.0F : 3e38F;
      for (const size_t count : {size_t{1}, size_t{7}, size_t{33}, size_t{1024}, size_t{2100}}) {
        for (const bool stream : {false, true}) {
          Floats x(count, most);
          CHECK(is_finite(dtype, x, stream, *isa));
          std::vector<float> wrong = {INFINITY, -INFINITY, NAN, -NAN};
          if (dtype == DType::float16) wrong.push_back(65520.0F);  // rounds to Inf
          if (dtype == DType::bfloat16) wrong.push_back(3.4e38F);
          for (const float value : wrong) {
            for (size_t at = 0; at < count; at += at < 70 ? 1 : 97) {
              x[at] = value;
              CHECK(!is_finite(dtype, x, stream, *isa));
              x[at] = -most;
            }
          }
          CHECK(is_finite(dtype, x, stream, *isa));
        }
        Floats x(count, most), residual(count), next(count);
        std::vector<uint16_t> halves(count);
        void* data = x.data();
        if (dtype != DType::float32) {
          data = halves.data();
          const uint16_t largest = dtype == DType::float16 ? 0x7bff : 0x7f61;
          std::ranges::fill(halves, largest);
        }
        CHECK(add_residual(dtype, data, count, residual.data(), next.data(), 1, *isa));
        residual[count / 2] = 3e38F;  // more than there is room for
        CHECK(!add_residual(dtype, data, count, residual.data(), next.data(), 1, *isa));
      }
    }
  }
}

TEST(mxfp8_rules) {
  const Codec codec{.kind = CodecKind::mxfp8};
  Floats x(32);
  x[0] = 511;  // 2^8 * 1.996: the scale is 1
  x[1] = 448;
  x[2] = -449;
  x[3] = 17;        // between 16 and 18
  x[4] = 19;        // between 18 and 20
  x[5] = -0x1p-9f;  // the smallest subnormal
  x[6] = 0x1p-10f;
  const Wire wire = encoded(codec, x, {});
  CHECK_EQ(wire[0], 127);
  const uint8_t expected[] = {0x7e, 0x7e, 0xfe, 0x58, 0x5a, 0x81, 0x00};
  CHECK(std::memcmp(wire.data() + 32, expected, sizeof expected) == 0);
  x[0] = NAN;
  CHECK_EQ(encoded(codec, x, {})[0], 255);
}

TEST(error_does_not_depend_on_magnitude) {
  for (const Codec& codec : codecs()) {
    if (codec.kind == CodecKind::fp16) continue;
    std::vector<double> errors;
    for (int power = -100; power <= 100; power += 20) {
      Floats x = values(1 << 15, 1, false, 3);
      for (float& value : x) value = std::ldexp(value, power);
      const Floats back = decoded(codec, encoded(codec, x, {}), x.size());
      double error = 0, norm = 0;
      for (size_t i = 0; i < x.size(); ++i) {
        error += std::pow(std::ldexp(double{back[i]} - x[i], -power), 2);
        norm += std::pow(std::ldexp(double{x[i]}, -power), 2);
      }
      errors.push_back(error / norm);
    }
    for (const double error : errors) CHECK_EQ(error, errors[0]);  // powers of two: exactly
  }
}

TEST(stochastic_rounding_is_unbiased_and_keeps_what_is_representable) {
  for (const Codec& codec : codecs()) {
    if (codec.rounding != Rounding::stochastic || codec.hadamard) continue;
    const Floats x = values(256, 1, false, 12);
    std::vector<double> mean(x.size());
    double worst = 0, step = 0;
    const int rounds = 2000;
    for (uint32_t round = 0; round < rounds; ++round) {
      const Floats back = decoded(codec, encoded(codec, x, {.step = round}), x.size());
      for (size_t i = 0; i < x.size(); ++i) {
        mean[i] += back[i] / rounds;
        step = std::max(step, std::fabs(double{back[i]} - x[i]));
      }
    }
    for (size_t i = 0; i < x.size(); ++i) worst = std::max(worst, std::fabs(mean[i] - x[i]));
    CHECK(worst < step * (5 * 0.5 / std::sqrt(rounds) + 1.0 / 512));
    // Values on the grid stay, under a scale that they have themselves.
    const Floats once = decoded(codec, encoded(codec, x, {.step = 1}), x.size());
    const Codec nearest{.kind = codec.kind, .ceil_scale = codec.ceil_scale};
    const Floats grid = decoded(nearest, encoded(nearest, once, {}), once.size());
    CHECK(same_bits(decoded(codec, encoded(codec, grid, {.step = 2}), grid.size()),
                    decoded(nearest, encoded(nearest, grid, {}), grid.size())));
  }
}

TEST(shared_int_against_reference) {
  for (const int width : {8, 16, 32}) {
    for (const int world : {1, 2, 5}) {
      const int64_t limit = shared_limit(width, world);
      for (const size_t count : {size_t{0}, size_t{1}, size_t{127}, size_t{1500}, size_t{4096}}) {
        const Segment list[] = {{0, 300, 5}, {512, 5000, 6}};
        const Encoding encoding{.step = 2, .rank = 1, .segments = list};
        const Floats x = values(count, 1, true, 17);
        const size_t blocks = (count + 127) / 128;
        Floats amax(blocks);
        for (size_t i = 0; i < count; ++i) {
          if (!reference::place(encoding, static_cast<int64_t>(i)).inside) continue;
          float& most = amax[i / 128];
          if (!std::isfinite(x[i]) || std::isnan(most)) {
            most = reference::quiet(NAN);
          } else {
            most = std::max(most, std::fabs(x[i]));
          }
        }
        float top = reference::narrow(static_cast<double>(limit));
        while (top > static_cast<double>(limit)) top = std::nextafter(top, 0.0f);
        std::vector<int64_t> q(count);
        Floats back(count);
        for (size_t i = 0; i < count; ++i) {
          float s = reference::narrow(double{amax[i / 128]} / top);
          if (s < 0x1p-126f) s = amax[i / 128] < 0x1p-126f ? 0 : 0x1p-126f;
          const bool inside = reference::place(encoding, static_cast<int64_t>(i)).inside;
          if (s > 0 && inside) {
            double t = reference::narrow(double{x[i]} * reference::narrow(1 / double{s}));
            t = std::clamp<double>(t, -top, top);
            q[i] = static_cast<int64_t>(std::floor(
                t + (2.0 * reference::random_bits(99, encoding, static_cast<int64_t>(i), 8) + 1) / 512));
            CHECK(std::abs(q[i]) <= limit);
          }
          back[i] = reference::quiet(reference::narrow(
              reference::narrow(reference::narrow(static_cast<double>(q[i])) * double{s}) / 2.0));
        }
        for (const Isa* isa : isas()) {
          Guarded raw(x), wire(count * static_cast<size_t>(width) / 8), out(count * 4);
          Floats found(blocks);
          shared_amax(DType::float32, raw.data(), count, found.data(), encoding, *isa);
          CHECK(same_bits(found, amax));
          shared_encode(DType::float32, raw.data(), count, amax.data(), width, limit, 99, encoding,
                        wire.data(), *isa);
          const auto compare = [&](const auto& got) {
            for (size_t i = 0; i < count; ++i) CHECK_EQ(got[i], q[i]);
          };
          if (width == 8) compare(wire.take<int8_t>());
          if (width == 16) compare(wire.take<int16_t>());
          if (width == 32) compare(wire.take<int32_t>());
          shared_decode(wire.data(), count, amax.data(), width, limit, 2, DType::float32, out.data(), *isa);
          CHECK(same_bits(out.take<float>(), back));
        }
      }
    }
  }
  CHECK_EQ(shared_limit(8, 2), 63);
  CHECK_EQ(shared_limit(16, 8), 4095);
  CHECK_EQ(shared_limit(32, 3), 715827882);
  CHECK_EQ(shared_limit(8, 18), 7);
  CHECK_THROWS(ValueError, shared_limit(8, 19));
  CHECK_THROWS(ValueError, shared_limit(4, 1));
}
