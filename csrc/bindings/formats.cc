#include "bindings/formats.h"

#include <bit>
#include <string>
#include <string_view>

#include "bindings/dlpack.h"
#include "common/error.h"

namespace pycomm::bindings {

namespace {

struct StructFormat {
  std::string_view code;
  dlpack::Code kind;
  size_t native, standard;  // bytes; 0 if there is no standard size
};
constexpr StructFormat kFormats[] = {
    {"b", dlpack::kInt, 1, 1},
    {"h", dlpack::kInt, sizeof(short), 2},
    {"i", dlpack::kInt, sizeof(int), 4},
    {"l", dlpack::kInt, sizeof(long), 4},
    {"q", dlpack::kInt, sizeof(long long), 8},
    {"n", dlpack::kInt, sizeof(Py_ssize_t), 0},
    {"B", dlpack::kUint, 1, 1},
    {"c", dlpack::kUint, 1, 1},  // a character: bytes of length 1
    {"H", dlpack::kUint, sizeof(unsigned short), 2},
    {"I", dlpack::kUint, sizeof(unsigned int), 4},
    {"L", dlpack::kUint, sizeof(unsigned long), 4},
    {"Q", dlpack::kUint, sizeof(unsigned long long), 8},
    {"N", dlpack::kUint, sizeof(size_t), 0},
    {"?", dlpack::kBool, sizeof(bool), 1},
    {"e", dlpack::kFloat, 2, 2},
    {"f", dlpack::kFloat, 4, 4},
    {"d", dlpack::kFloat, 8, 8},
    {"Zf", dlpack::kComplex, 8, 8},
    {"Zd", dlpack::kComplex, 16, 16},
    {"F", dlpack::kComplex, 8, 8},  // Python's own since 3.14
    {"D", dlpack::kComplex, 16, 16},
};

}  // namespace

DType dtype_of_format(const char* given, Py_ssize_t item, const char* name) {
  const std::string_view format = given ? given : "B";
  const auto what = [&] {
    return std::string("`") + name + "` has the buffer format \"" + std::string(format) + "\" of " +
           std::to_string(item) + " bytes";
  };
  const char order = format.empty() ? '@' : format.front();
  const bool has_order = std::string_view("@^=<>!").find(order) != std::string_view::npos;
  const bool native = !has_order || order == '@' || order == '^';
  constexpr bool kLittle = std::endian::native == std::endian::little;
  const bool swapped = kLittle ? order == '>' || order == '!' : order == '<';
  const std::string_view code = format.substr(has_order && !format.empty() ? 1 : 0);
  for (const StructFormat& known : kFormats) {
    if (code != known.code) continue;
    const size_t size = native ? known.native : known.standard;
    const auto dtype = dlpack::dtype_of(known.kind, static_cast<uint32_t>(8 * size), 1);
    if (!dtype || item != static_cast<Py_ssize_t>(size)) break;
    if (swapped && size > 1) throw ValueError(what() + ", byte-swapped: pass a copy in this machine's order");
    return *dtype;
  }
  throw TypeError(what() + ", which cannot be communicated: pass a NumPy array of what the bytes mean");
}

}  // namespace pycomm::bindings
