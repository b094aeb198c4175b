#include "common/dtype.h"

#include "common/error.h"

namespace pycomm {
namespace {

struct TypeInfo {
  const char* name;
  size_t size;
};

constexpr TypeInfo kTypes[kNumDTypes] = {
    {"float32", 4},     {"float64", 8},     {"float16", 2}, {"bfloat16", 2}, {"float8_e4m3fn", 1},
    {"float8_e5m2", 1}, {"int8", 1},        {"int16", 2},   {"int32", 4},    {"int64", 8},
    {"uint8", 1},       {"uint16", 2},      {"uint32", 4},  {"uint64", 8},   {"bool", 1},
    {"complex64", 8},   {"complex128", 16},
};

constexpr const char* kOps[kNumOps] = {"sum", "prod", "min", "max", "avg", "band", "bor", "bxor"};

const TypeInfo& info(DType dtype) { return kTypes[static_cast<size_t>(dtype)]; }

bool is_complex(DType dtype) { return dtype == DType::complex64 || dtype == DType::complex128; }
bool is_float(DType dtype) { return dtype <= DType::float8_e5m2; }
bool is_integer(DType dtype) { return dtype >= DType::int8 && dtype <= DType::uint64; }

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
  for (int i = 0; i < kNumDTypes; ++i) {
    if (text == kTypes[i].name) return static_cast<DType>(i);
  }
  throw TypeError("dtype '" + std::string(text) + "' is not supported; use one of " +
                  list<DType>(kNumDTypes, kAll));
}

Op parse_op(std::string_view text) {
  for (int i = 0; i < kNumOps; ++i) {
    if (text == kOps[i]) return static_cast<Op>(i);
  }
  throw ValueError("op '" + std::string(text) + "' is unknown; use one of " + list<Op>(kNumOps, kAll));
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

}  // namespace pycomm
