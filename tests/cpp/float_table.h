// An independent implementation of the 16- and 8-bit floats: sorted tables of their values, in float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/dtype.h"

// A small float as the table of its non-negative values, by code. The last entry is the value that would come
// next; a number that rounds to it becomes `overflow`.
struct Table {
  int bits;
  uint32_t overflow, nan;
  std::vector<double> values;

  Table(int exponent, int mantissa, uint32_t overflow_code, uint32_t nan_code)
      : bits(exponent + mantissa + 1), overflow(overflow_code), nan(nan_code) {
    const int bias = (1 << (exponent - 1)) - 1;
    for (uint32_t code = 0; code <= overflow; ++code) {
      const int e = static_cast<int>(code >> mantissa);
      const double fraction = std::ldexp(code & ((1u << mantissa) - 1), -mantissa);
      values.push_back(e == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, e - bias));
    }
  }

  double decode(uint32_t code) const {
    const uint32_t sign = 1u << (bits - 1), magnitude = code & (sign - 1);
    double value = magnitude < overflow ? values[magnitude] : std::nan("");
    if (magnitude == overflow && overflow != nan) value = std::numeric_limits<double>::infinity();
    return code & sign ? -value : value;
  }

  uint32_t encode(double x) const {
    if (std::isnan(x)) return nan;
    const double size = std::fabs(x);
    uint32_t code = overflow;
    if (size < values.back()) {
      code = static_cast<uint32_t>(std::upper_bound(values.begin(), values.end(), size) - values.begin()) - 1;
      const double below = size - values[code], above = values[code + 1] - size;
      if (above < below || (above == below && code % 2 == 1)) ++code;
    }
    if (code == nan) return nan;
    return std::signbit(x) ? code | 1u << (bits - 1) : code;
  }
};

// Null for what is no small float.
inline const Table* table_of(pycomm::DType dtype) {
  using pycomm::DType;
  static const Table float16(5, 10, 0x7c00, 0x7e00), bfloat16(8, 7, 0x7f80, 0x7fc0);
  static const Table e4m3(4, 3, 0x7f, 0x7f), e5m2(5, 2, 0x7c, 0x7e);
  switch (dtype) {
    case DType::float16:
      return &float16;
    case DType::bfloat16:
      return &bfloat16;
    case DType::float8_e4m3fn:
      return &e4m3;
    case DType::float8_e5m2:
      return &e5m2;
    case DType::float32:
    case DType::float64:
    case DType::int8:
    case DType::int16:
    case DType::int32:
    case DType::int64:
    case DType::uint8:
    case DType::uint16:
    case DType::uint32:
    case DType::uint64:
    case DType::bool_:
    case DType::complex64:
    case DType::complex128:
      break;
  }
  return nullptr;
}
