// The bodies of cuda::pack() and cuda::unpack(), run on the CPU, against the CPU's kernels: the same bits and
// the same statistics.
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "emulated_grid.h"
#include "kernels/cuda/pack.h"
#include "kernels/pack.h"

using namespace pycomm;
using namespace pycomm::kernels;

namespace {

namespace e = pycomm::kernels::emulated;
using ::emulated::Order;
using Bytes = std::vector<unsigned char>;

constexpr DType kFloats[] = {DType::float32, DType::float16, DType::bfloat16, DType::float8_e4m3fn,
                             DType::float8_e5m2};

std::mt19937_64 random_bits(1);

template <bool kPacks>
struct Emulate {
  const PackArgs& args;
  std::vector<e::ChunkStats>* chunks;
  int64_t most_blocks;
  Order order;
  int* launches;

  template <class B>
  void operator()() const {
    e::make_pack_calls(args, chunks ? chunks->data() : nullptr, [&](const e::PackCall& call) {
      ++*launches;
      ::emulated::run<e::Pack<B, kPacks>>(call, std::min<int64_t>(call.tiles, most_blocks), order);
    });
  }
};

// As pack.cu does it; returns the number of launches.
int emulate(bool packs, const PackArgs& args, Stats* stats, int64_t blocks = 3,
            Order order = Order::shuffled) {
  std::vector<e::ChunkStats> chunks(static_cast<size_t>(e::count_chunks(args.items)));
  for (e::ChunkStats& chunk : chunks) std::memset(static_cast<void*>(&chunk), 0x77, sizeof chunk);
  auto* wanted = stats ? &chunks : nullptr;
  int launches = 0;
  CHECK(packs ? e::pick_bucket(args.dtype, Emulate<true>{args, wanted, blocks, order, &launches})
              : e::pick_bucket(args.dtype, Emulate<false>{args, wanted, blocks, order, &launches}));
  if (stats) {
    ::emulated::run<e::Finish>({chunks.data(), static_cast<int64_t>(chunks.size()), stats}, 1, order);
  }
  return launches;
}

// Moderate numbers, or any bits.
void fill(DType dtype, unsigned char* p, int64_t count, bool any) {
  for (int64_t i = 0; i < count; ++i) {
    uint64_t bits = random_bits();
    if (!any) {
      const float x = (static_cast<float>(bits >> 40) / (1 << 20) - 8) * (bits & 1 ? 1.f : 1e-2f);
      if (dtype == DType::float32) std::memcpy(&bits, &x, 4);
      if (dtype == DType::float16) bits = e::Float16::encode(x);
      if (dtype == DType::bfloat16) bits = e::BFloat16::encode(x);
      if (dtype == DType::float8_e4m3fn) bits = e::Float8E4M3::encode(x);
      if (dtype == DType::float8_e5m2) bits = e::Float8E5M2::encode(x);
    }
    std::memcpy(p + i * size_of(dtype), &bits, size_of(dtype));
  }
}

struct Item {
  DType dtype;
  int64_t count;
  size_t misplaced;  // bytes from a multiple of 64
};

struct List {
  std::vector<Item> items;
  DType bucket;
  double scale = 1;
  size_t misplaced = 0;
  int64_t gap = 0;  // elements between one tensor and the next
  bool any = false;
};

constexpr size_t kGuard = 64;
struct Memory {
  Bytes bytes;
  size_t begin;
  Memory(size_t size, size_t misplaced) : bytes(size + 4 * kGuard, 0xa5) {
    begin =
        kGuard + (kGuard - reinterpret_cast<uintptr_t>(bytes.data()) % kGuard) % kGuard + misplaced % kGuard;
  }
  unsigned char* data() { return bytes.data() + begin; }
};

std::string show(const Stats& s) {
  return check::show(s.sum_squares) + ", " + check::show(s.max_abs) + ", " + check::show(s.nans) + ", " +
         check::show(s.infs);
}

// The same call on copies of the same memory, guards included.
void check_list(const List& list, int64_t blocks = 3, Order order = Order::shuffled) {
  for (bool packs : {true, false}) {
    for (bool counts : {true, false}) {
      std::vector<Memory> tensors;
      int64_t total = 0;
      for (const Item& item : list.items) {
        tensors.emplace_back(item.count * size_of(item.dtype), item.misplaced);
        fill(item.dtype, tensors.back().data(), item.count, list.any);
        total += item.count + list.gap;
      }
      Memory bucket(total * size_of(list.bucket), list.misplaced);
      fill(list.bucket, bucket.data(), total, list.any);
      std::vector<Memory> other_tensors = tensors;
      Memory other_bucket = bucket;
      // A copy lies elsewhere: what counts is its distance from a boundary.
      const auto args = [&](std::vector<Memory>& from, Memory& into, std::vector<PackItem>& items) {
        int64_t offset = 0;
        for (size_t j = 0; j < from.size(); ++j) {
          items.push_back({from[j].data(), list.items[j].dtype, list.items[j].count, offset});
          offset += list.items[j].count + list.gap;
        }
        return PackArgs{items, into.data(), list.bucket, list.scale};
      };
      std::vector<PackItem> items, other_items;
      Stats got{-1, -1, -1, -1}, want{-2, -2, -2, -2};
      const PackArgs one = args(tensors, bucket, items), two = args(other_tensors, other_bucket, other_items);
      emulate(packs, one, counts ? &got : nullptr, blocks, order);
      (packs ? pack : unpack)(two, counts ? &want : nullptr, chosen_isa());
      bool same = bucket.bytes == other_bucket.bytes;
      for (size_t j = 0; j < tensors.size(); ++j) same = same && tensors[j].bytes == other_tensors[j].bytes;
      const bool alike =
          !counts || got == want || (std::isnan(got.sum_squares) && std::isnan(want.sum_squares));
      if (!same || !alike) {
        check::fail(__FILE__, __LINE__,
                    std::string(packs ? "pack " : "unpack ") + name(list.bucket) + " of " +
                        std::to_string(list.items.size()) + ", first " + name(list.items[0].dtype) + " " +
                        std::to_string(list.items[0].count) + (same ? ": " : ": bytes differ, ") + show(got) +
                        " against " + show(want));
        return;
      }
    }
  }
}

}  // namespace

TEST(every_pair_of_types_and_place) {
  for (DType tensor : kFloats) {
    for (DType bucket : kFloats) {
      for (double scale : {1.0, 0.3}) {
        for (bool any : {false, true}) {
          for (size_t misplaced : {0, 1, 2, 4, 8, 16}) {
            check_list({{{tensor, 2085, misplaced}}, bucket, scale, 0, 0, any});
            check_list({{{tensor, 1027, 0}}, bucket, scale, misplaced, 0, any});
          }
        }
      }
    }
  }
}

TEST(every_length) {
  for (int64_t count = 0; count <= 4099; count += count < 140 ? 1 : 31) {
    check_list({{{DType::float32, count, 0}}, DType::bfloat16, 0.7});
    check_list({{{DType::float32, count, 0}, {DType::float16, 3, 2}}, DType::float32, 1, 0, 0, true});
  }
}

TEST(lists_of_tensors) {
  List list{{}, DType::bfloat16, 0.5};
  for (int j = 0; j < 40; ++j) {
    list.items.push_back(
        {kFloats[j % 5], j % 7 == 0 ? 0 : static_cast<int64_t>(random_bits() % 9000), j % 3 ? 0u : 4u});
  }
  for (int64_t gap : {0, 8, 5}) {
    list.gap = gap;
    for (Order order : {Order::forward, Order::backward, Order::shuffled}) {
      for (int64_t blocks : {1, 5, 10'000}) check_list(list, blocks, order);
    }
  }
}

TEST(more_chunks_than_columns) {
  check_list({{{DType::float32, 1'500'001, 0}, {DType::bfloat16, 700'000, 2}}, DType::float32, 0.25}, 100);
}

TEST(hundreds_of_tensors_in_one_launch_and_thousands_in_a_few) {
  std::vector<float> tensor(5), bucket(5000);
  for (int tensors : {1, 448, 449, 1000}) {
    std::vector<PackItem> items;
    for (int j = 0; j < tensors; ++j) items.push_back({tensor.data(), DType::float32, 5, 5 * j});
    Stats got, want;
    const PackArgs args{items, bucket.data(), DType::float32, 2};
    for (float& x : tensor) x = static_cast<float>(random_bits() % 100);
    CHECK_EQ(emulate(true, args, &got), (tensors + 447) / 448);
    const std::vector<float> first = bucket;
    pack(args, &want);
    CHECK(got == want);
    CHECK(std::memcmp(first.data(), bucket.data(), static_cast<size_t>(tensors) * 20) == 0);
  }
}

TEST(what_lies_in_its_place) {
  for (DType dtype : kFloats) {
    for (double scale : {1.0, 0.5}) {
      for (bool counts : {false, true}) {
        for (bool packs : {false, true}) {
          Memory memory(5000 * size_of(dtype), 0);
          fill(dtype, memory.data(), 5000, true);
          Memory other = memory;
          const PackItem item{memory.data(), dtype, 5000, 0}, other_item{other.data(), dtype, 5000, 0};
          Stats got{}, want{};
          const int launches =
              emulate(packs, {{&item, 1}, memory.data(), dtype, scale}, counts ? &got : nullptr);
          (packs ? pack : unpack)({{&other_item, 1}, other.data(), dtype, scale}, counts ? &want : nullptr,
                                  chosen_isa());
          CHECK_EQ(launches, counts || scale != 1 ? 1 : 0);
          CHECK(memory.bytes == other.bytes);
          CHECK(got.max_abs == want.max_abs && got.nans == want.nans && got.infs == want.infs);
        }
      }
    }
  }
}

TEST(nothing) {
  Stats stats{-1, -1, -1, -1};
  float bucket[1];
  CHECK_EQ(emulate(true, {{}, bucket, DType::float32}, &stats), 0);
  CHECK(stats == Stats{});
}
