#include "common/dtype.h"

#include <array>
#include <bit>

#include "common/error.h"
#include "common/words.h"

namespace pycomm {
namespace {

struct TypeInfo {
  enum class Of : uint8_t { floats, integers, bools, complex_numbers };
  DType dtype;
  const char* name;
  size_t size;
  Of of;
};

// In the order of the enumerators.
constexpr auto kTypes = [] {
  using enum TypeInfo::Of;
  return std::to_array<TypeInfo>({
      {DType::float32, "float32", 4, floats},
      {DType::float64, "float64", 8, floats},
      {DType::float16, "float16", 2, floats},
      {DType::bfloat16, "bfloat16", 2, floats},
      {DType::float8_e4m3fn, "float8_e4m3fn", 1, floats},
      {DType::float8_e5m2, "float8_e5m2", 1, floats},
      {DType::int8, "int8", 1, integers},
      {DType::int16, "int16", 2, integers},
      {DType::int32, "int32", 4, integers},
      {DType::int64, "int64", 8, integers},
      {DType::uint8, "uint8", 1, integers},
      {DType::uint16, "uint16", 2, integers},
      {DType::uint32, "uint32", 4, integers},
      {DType::uint64, "uint64", 8, integers},
      {DType::bool_, "bool", 1, bools},
      {DType::complex64, "complex64", 8, complex_numbers},
      {DType::complex128, "complex128", 16, complex_numbers},
  });
}();
static_assert(kTypes.size() == kNumDTypes && [] {
  for (size_t i = 0; i < kTypes.size(); ++i) {
    if (static_cast<size_t>(kTypes[i].dtype) != i) return false;
  }
  return true;
}());

constexpr auto kOps = std::to_array<const char*>({"sum", "prod", "min", "max", "avg", "band", "bor", "bxor"});
static_assert(kOps.size() == kNumOps);

// Other names of the types: those of C, torch and nccl-tests ("float" is 32 bits, unlike Python's own type
// float), of JAX, and of the papers that define the formats.
struct Alias {
  std::string_view alias;
  DType dtype;
};
constexpr Alias kTypeAliases[] = {
    {"float", DType::float32},
    {"fp32", DType::float32},
    {"f32", DType::float32},
    {"single", DType::float32},
    {"double", DType::float64},
    {"fp64", DType::float64},
    {"f64", DType::float64},
    {"half", DType::float16},
    {"fp16", DType::float16},
    {"f16", DType::float16},
    {"bf16", DType::bfloat16},
    {"fp8_e4m3", DType::float8_e4m3fn},
    {"fp8_e4m3fn", DType::float8_e4m3fn},
    {"f8e4m3", DType::float8_e4m3fn},
    {"f8e4m3fn", DType::float8_e4m3fn},
    {"e4m3", DType::float8_e4m3fn},
    {"e4m3fn", DType::float8_e4m3fn},
    {"fp8_e5m2", DType::float8_e5m2},
    {"f8e5m2", DType::float8_e5m2},
    {"e5m2", DType::float8_e5m2},
    {"bool_", DType::bool_},
};

// Names that other libraries give the operators. They are not accepted, only suggested: one word for one
// thing.
struct Meant {
  std::string_view word;
  Op op;
};
constexpr Meant kMeant[] = {
    {"mean", Op::avg},         {"average", Op::avg},   {"add", Op::sum},          {"plus", Op::sum},
    {"mul", Op::prod},         {"multiply", Op::prod}, {"times", Op::prod},       {"and", Op::band},
    {"or", Op::bor},           {"xor", Op::bxor},      {"bitwise_and", Op::band}, {"bitwise_or", Op::bor},
    {"bitwise_xor", Op::bxor},
};

const TypeInfo& info(DType dtype) { return kTypes[static_cast<size_t>(dtype)]; }

bool is_complex(DType dtype) { return info(dtype).of == TypeInfo::Of::complex_numbers; }
bool is_float(DType dtype) { return info(dtype).of == TypeInfo::Of::floats; }
bool is_integer(DType dtype) { return info(dtype).of == TypeInfo::Of::integers; }

// "a, b, c": the operators of a type, or the types of an operator.
template <class Each, class Wanted>
std::string list(int count, Wanted wanted) {
  std::string names;
  for (int i = 0; i < count; ++i) {
    const auto each = static_cast<Each>(i);
    if (wanted(each)) names += (names.empty() ? "" : ", ") + std::string(name(each));
  }
  return names;
}

constexpr auto kAll = [](auto) { return true; };

}  // namespace

size_t size_of(DType dtype) { return info(dtype).size; }

DType accumulator(DType dtype) {
  const bool narrow = is_float(dtype) && size_of(dtype) < 4;
  return narrow ? DType::float32 : dtype;
}

const char* name(DType dtype) { return info(dtype).name; }

const char* name(Op op) { return kOps[static_cast<size_t>(op)]; }

DType parse_dtype(std::string_view text) {
  // torch prints "torch.bfloat16", and configuration files have "BF16".
  const std::string word = lower(text.substr(text.rfind('.') + 1));
  std::array<std::string_view, kNumDTypes> names;
  for (int i = 0; i < kNumDTypes; ++i) {
    names[i] = kTypes[i].name;
    if (word == names[i]) return static_cast<DType>(i);
  }
  for (const Alias& each : kTypeAliases) {
    if (word == each.alias) return each.dtype;
  }
  throw TypeError("dtype '" + std::string(text) + "' is not supported" + did_you_mean(word, names) +
                  "; use one of " + list<DType>(kNumDTypes, kAll));
}

Op parse_op(std::string_view text) {
  std::array<std::string_view, kNumOps> names;
  for (int i = 0; i < kNumOps; ++i) {
    names[i] = kOps[i];
    if (text == kOps[i]) return static_cast<Op>(i);
  }
  std::string_view word = text;
  for (const Meant& each : kMeant) {
    if (lower(text) == each.word) word = name(each.op);
  }
  throw ValueError("op '" + std::string(text) + "' is unknown" + did_you_mean(word, names) + "; use one of " +
                   list<Op>(kNumOps, kAll));
}

bool supports(DType dtype, Op op) {
  switch (op) {
    case Op::sum:
    case Op::prod:
      return dtype != DType::bool_;
    case Op::min:
    case Op::max:
      return !is_complex(dtype);
    case Op::avg:
      return is_float(dtype) || is_complex(dtype);
    case Op::band:
    case Op::bor:
    case Op::bxor:
      return is_integer(dtype) || dtype == DType::bool_;
  }
  return false;
}

Op any_op(DType dtype) { return supports(dtype, Op::sum) ? Op::sum : Op::bor; }

void require(DType dtype, Op op) {
  if (supports(dtype, op)) return;
  throw TypeError("op '" + std::string(name(op)) + "' makes no sense on " + name(dtype) + "; " + name(dtype) +
                  " takes " + list<Op>(kNumOps, [&](Op other) { return supports(dtype, other); }) +
                  ", and '" + name(op) + "' takes " +
                  list<DType>(kNumDTypes, [&](DType other) { return supports(other, op); }));
}

Average average(DType dtype, int num_ranks) {
  switch (dtype) {
    case DType::float32:
    case DType::float64:
    case DType::bfloat16:  // has the range of float32, in which it is summed
    case DType::complex64:
    case DType::complex128: {
      const double scale = 1.0 / static_cast<double>(std::bit_ceil(static_cast<unsigned>(num_ranks)));
      return {scale, num_ranks * scale};
    }
    case DType::float16:
    case DType::float8_e4m3fn:
    case DType::float8_e5m2:
    case DType::int8:
    case DType::int16:
    case DType::int32:
    case DType::int64:
    case DType::uint8:
    case DType::uint16:
    case DType::uint32:
    case DType::uint64:
    case DType::bool_:
      break;
  }
  return {1.0, static_cast<double>(num_ranks)};
}

}  // namespace pycomm
