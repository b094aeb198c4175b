// What the kernels and the calls with codecs take from Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/codec.h"

namespace pycomm::bindings {

// The instruction set of this name, or the one that is chosen. Throws ValueError if the machine lacks it.
const kernels::Isa& isa_argument(const std::optional<std::string>& name);

// A sequence of (begin, end, id), or None for one tensor. Throws ValueError for what codec.h does not allow.
std::vector<kernels::Segment> parse_segments(const pybind11::object& segments);

void require_codec_dtype(DType dtype, const char* name);  // float32, float16, bfloat16; throws TypeError

// Throws ValueError unless a record can be made of k of `count` elements.
void require_topk(int64_t k, int64_t count);

void add_codecs(pybind11::module_& module);

}  // namespace pycomm::bindings
