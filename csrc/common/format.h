// The form in which an operand of a step holds its elements.
#pragma once

#include <cstdint>

namespace pycomm {

// raw: the caller's elements, unchanged (leaves). partial: elements of accumulator(dtype), already scaled.
// final: elements of dtype, rounded and finished. wire: elements encoded by a codec.
enum class Format : uint8_t { raw, partial, final, wire };

}  // namespace pycomm
