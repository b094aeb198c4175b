// What an operand of a step holds.
#pragma once

#include <cstdint>

namespace pycomm {

// raw: the caller's elements as they came (leaves). partial: elements of accumulator(dtype), already scaled.
// final: elements of dtype, rounded and finished. wire: what a codec made of them.
enum class Format : uint8_t { raw, partial, final, wire };

}  // namespace pycomm
