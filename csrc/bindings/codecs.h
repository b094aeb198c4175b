// Arguments of the codecs' kernels and of calls with codecs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/codec.h"

namespace pycomm::bindings {

// The instruction set of this name or, without one, the set in use. Throws ValueError for one that the
// machine lacks.
const kernels::Isa& isa_argument(const std::optional<std::string>& name);

// A sequence of (begin, end, id), or None for one tensor. Throws ValueError for what codec.h does not allow.
std::vector<kernels::Segment> parse_segments(const pybind11::object& segments);

void require_codec_dtype(DType dtype, const char* name);  // float32, float16, bfloat16; throws TypeError

// Throws ValueError unless a record can hold k of `count` elements, whose indices have 32 bits.
void require_topk(int64_t k, int64_t count);

void add_codecs(pybind11::module_& module);

}  // namespace pycomm::bindings
