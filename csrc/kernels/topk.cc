#include "kernels/topk.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "common/error.h"
#include "kernels/codec_tiles.h"
#include "kernels/copy.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/topk_kernels.h"

namespace pycomm::kernels {
namespace {

constexpr int64_t kHeader = 16;
constexpr size_t kTileCount = static_cast<size_t>(kTile);

uint32_t magnitude(float x) { return std::bit_cast<uint32_t>(x) & 0x7fffffff; }

float canonical(float x) { return x == x ? x : std::bit_cast<float>(0x7fc00000); }

struct Threshold {
  uint32_t magnitude;
  size_t above;  // how many values are larger
};

// Finds the magnitude of the value of this rank; the largest value has rank 1. A histogram of the leading
// bits gives these bits, then one of the next bits, over the values that share the leading ones, and so on.
Threshold find_threshold(const float* values, size_t count, size_t rank) {
  constexpr int kCopies = 4;  // consecutive values in one bin do not wait for each other
  uint32_t prefix = 0, mask = 0;
  size_t above = 0;
  std::vector<std::array<uint32_t, kCopies>> histogram;
  for (const int shift : {20, 9, 0}) {
    const uint32_t bins = shift == 0 ? 1u << 9 : 1u << 11;
    histogram.assign(bins, {});
    for (size_t i = 0; i < count; ++i) {
      const uint32_t bits = magnitude(values[i]);
      histogram[bits >> shift & (bins - 1)][i % kCopies] += (bits & mask) == prefix;
    }
    const auto size = [&](uint32_t bin) {
      return std::accumulate(histogram[bin].begin(), histogram[bin].end(), size_t{0});
    };
    uint32_t bin = bins - 1;
    for (; above + size(bin) < rank; --bin) above += size(bin);
    prefix |= bin << shift;
    mask |= (bins - 1) << shift;
  }
  return {prefix, above};
}

// The elements that may be among the k largest, in order of their indices.
class Candidates {
 public:
  Candidates(size_t k, size_t count)
      : k_(k),
        room_(std::min(2 * k, count) + kTileCount),
        indices_(std::make_unique_for_overwrite<uint32_t[]>(room_)),
        values_(std::make_unique_for_overwrite<float[]>(room_)) {}

  void restart(uint32_t least) {
    least_ = least;
    size_ = 0;
  }
  size_t size() const { return size_; }
  const uint32_t* indices() const { return indices_.get(); }
  const float* values() const { return values_.get(); }

  void scan(const TopkKernels& kernels, const float* x, size_t n, size_t index) {
    if (size_ + n > room_) reduce();
    size_ += kernels.scan(x, n, least_, static_cast<uint32_t>(index), indices_.get() + size_,
                          values_.get() + size_);
  }

  // Keeps the k largest. A later element must exceed the smallest of them.
  void reduce() {
    if (size_ <= k_) return;
    const Threshold threshold = find_threshold(values_.get(), size_, k_);
    size_t ties = k_ - threshold.above, kept = 0;
    for (size_t i = 0; i < size_; ++i) {  // without a branch, which could not be predicted
      const uint32_t bits = magnitude(values_[i]);
      const bool tie = (bits == threshold.magnitude) & (ties > 0);
      indices_[kept] = indices_[i];
      values_[kept] = values_[i];
      kept += (bits > threshold.magnitude) | tie;
      ties -= tie;
    }
    size_ = kept;
    least_ = threshold.magnitude + 1;
  }

 private:
  size_t k_, room_, size_ = 0;
  uint32_t least_ = 0;
  std::unique_ptr<uint32_t[]> indices_;
  std::unique_ptr<float[]> values_;
};

// The values to select from, tile by tile. They are read in place if they need no conversion.
class Values {
 public:
  Values(const TopkArgs& args, const Isa& isa) : args_(args), isa_(isa) {}

  const float* load(size_t begin, size_t n) {
    if (args_.dtype == DType::float32 && !args_.residual && !args_.next_residual)
      return static_cast<const float*>(args_.x) + begin;
    isa_.codec->sum_load(tile_.x, nullptr, at(args_.x, static_cast<int64_t>(begin * size_of(args_.dtype))),
                         args_.dtype, n, 1);
    if (args_.residual)
      isa_.codec->add_residual(tile_.x, tile_.x, args_.residual + begin, n, args_.residual_scale);
    return tile_.x;
  }

 private:
  const TopkArgs& args_;
  const Isa& isa_;
  FloatTile tile_;
};

// A magnitude that probably a few more than k values reach. It comes from a sample: cache lines at even
// distances. 0 if a sample would not save work.
uint32_t guess_least(Values& values, size_t k, size_t count) {
  constexpr size_t kLines = 4096, kPerLine = 16, kSample = kLines * kPerLine;
  if (count < 8 * kSample) return 0;
  const double expected = static_cast<double>(k) / static_cast<double>(count) * kSample;
  const double rank = expected + 5 * std::sqrt(expected) + 8;
  if (rank > kSample / 4.0) return 0;
  std::vector<float> sample(kSample);
  for (size_t line = 0; line < kLines; ++line) {
    const float* x = values.load(count / kLines * line, kPerLine);
    std::memcpy(sample.data() + line * kPerLine, x, kPerLine * sizeof *x);
  }
  for (float& x : sample) x = canonical(x);
  return find_threshold(sample.data(), kSample, static_cast<size_t>(rank)).magnitude;
}

// Reads a record, whose bytes may be anything and at any address.
struct Record {
  uint32_t entries;
  const unsigned char *indices, *values;

  Record(const void* record, size_t capacity)
      : entries(read<uint32_t>(record, 0)),
        indices(static_cast<const unsigned char*>(record) + kHeader),
        values(indices + capacity * sizeof(uint32_t)) {}
  uint32_t index(size_t i) const { return read<uint32_t>(indices, i); }
  float value(size_t i) const { return read<float>(values, i); }

 private:
  template <class T>
  static T read(const void* from, size_t i) {
    T value;
    std::memcpy(&value, static_cast<const unsigned char*>(from) + i * sizeof value, sizeof value);
    return value;
  }
};

void write(const Candidates& found, const TopkArgs& args, const Isa& isa) {
  const auto count = static_cast<uint32_t>(found.size());
  auto* record = static_cast<unsigned char*>(args.record);
  std::memset(record, 0, kHeader);
  std::memcpy(record, &count, sizeof count);
  unsigned char* indices = record + kHeader;
  unsigned char* values = indices + args.capacity * sizeof(uint32_t);
  const size_t bytes = count * sizeof(uint32_t), rest = (args.capacity - count) * sizeof(uint32_t);
  copy_bytes(indices, found.indices(), bytes, false, isa);
  std::memset(indices + bytes, 0, rest);
  copy_bytes(values, found.values(), bytes, false, isa);
  std::memset(values + bytes, 0, rest);
}

}  // namespace

int64_t topk_record_bytes(int64_t capacity) {
  return kHeader + capacity * static_cast<int64_t>(sizeof(uint32_t) + sizeof(float));
}

void topk_encode(const TopkArgs& args, const Isa& isa) {
  const size_t k = std::min(args.capacity, args.count);
  Candidates candidates(k, args.count);
  Values values(args, isa);
  const auto select = [&](uint32_t least) {
    candidates.restart(least);
    for (size_t begin = 0; begin < args.count; begin += kTileCount) {
      const size_t n = std::min(args.count - begin, kTileCount);
      const float* v = values.load(begin, n);
      if (k > 0) candidates.scan(*isa.topk, v, n, begin);
      if (args.next_residual) isa.topk->keep_residual(args.next_residual + begin, v, n, args.residual_scale);
    }
    candidates.reduce();
  };
  // A residual that is overwritten cannot be read a second time, as it must be when the guess is too high.
  const uint32_t guess =
      args.residual && args.residual == args.next_residual ? 0 : guess_least(values, k, args.count);
  select(guess);
  if (candidates.size() < k) select(0);
  write(candidates, args, isa);
  if (args.next_residual) {
    for (size_t i = 0; i < candidates.size(); ++i) {
      std::memset(args.next_residual + candidates.indices()[i], 0, sizeof(float));
    }
  }
}

void topk_decode_add(const void* record, size_t capacity, float* sum, size_t count) {
  const Record from(record, capacity);
  if (from.entries > capacity) {
    throw ValueError("a top-k record of " + std::to_string(from.entries) + " entries, with room for " +
                     std::to_string(capacity) + ": it was not made with this k");
  }
  int64_t last = -1;
  for (size_t i = 0; i < from.entries; ++i) {
    const uint32_t index = from.index(i);
    if (index <= last || index >= count) {
      throw ValueError("a top-k record's entry " + std::to_string(i) + " has index " + std::to_string(index) +
                       " after " + std::to_string(last) + ", of " + std::to_string(count) +
                       " elements: it was not made from data of this length");
    }
    last = index;
  }
  for (size_t i = 0; i < from.entries; ++i) {
    float* to = sum + from.index(i);  // may be unaligned
    float old;
    std::memcpy(&old, to, sizeof old);
    const float result = canonical(old + from.value(i));
    std::memcpy(to, &result, sizeof result);
  }
}

bool topk_finite(const void* record, size_t capacity, DType dtype, const void* x, const Isa& isa) {
  const Record from(record, capacity);
  const auto* elements = static_cast<const unsigned char*>(x);
  for (size_t i = 0; i < from.entries; ++i) {
    if (!isa.codec->finite(elements + from.index(i) * size_of(dtype), dtype, 1)) return false;
  }
  return true;
}

}  // namespace pycomm::kernels
