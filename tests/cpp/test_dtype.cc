#include <functional>
#include <iterator>
#include <string>
#include <utility>

#include "check.h"
#include "common/dtype.h"
#include "common/error.h"

using namespace pycomm;

namespace {

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST(sizes_and_accumulators) {
  CHECK_EQ(size_of(DType::float32), 4);
  CHECK_EQ(size_of(DType::float64), 8);
  CHECK_EQ(size_of(DType::float16), 2);
  CHECK_EQ(size_of(DType::bfloat16), 2);
  CHECK_EQ(size_of(DType::float8_e4m3fn), 1);
  CHECK_EQ(size_of(DType::float8_e5m2), 1);
  CHECK_EQ(size_of(DType::int8), 1);
  CHECK_EQ(size_of(DType::uint16), 2);
  CHECK_EQ(size_of(DType::int32), 4);
  CHECK_EQ(size_of(DType::uint64), 8);
  CHECK_EQ(size_of(DType::bool_), 1);
  CHECK_EQ(size_of(DType::complex64), 8);
  CHECK_EQ(size_of(DType::complex128), 16);
  for (DType narrow : {DType::float16, DType::bfloat16, DType::float8_e4m3fn, DType::float8_e5m2}) {
    CHECK_EQ(accumulator(narrow), DType::float32);
  }
  for (DType own : {DType::float32, DType::float64, DType::int8, DType::uint16, DType::int64, DType::bool_,
                    DType::complex64, DType::complex128}) {
    CHECK_EQ(accumulator(own), own);
  }
}

TEST(names_parse_back) {
  for (int i = 0; i < kNumDTypes; ++i)
    CHECK_EQ(parse_dtype(name(static_cast<DType>(i))), static_cast<DType>(i));
  for (int i = 0; i < kNumOps; ++i) CHECK_EQ(parse_op(name(static_cast<Op>(i))), static_cast<Op>(i));
  CHECK_EQ(std::string(name(DType::bool_)), "bool");
  CHECK_EQ(std::string(name(DType::float8_e4m3fn)), "float8_e4m3fn");
  CHECK_EQ(std::string(name(DType::complex128)), "complex128");
  CHECK_EQ(std::string(name(Op::bxor)), "bxor");
  CHECK_THROWS(TypeError, parse_dtype("float128"));
  CHECK_THROWS(TypeError, parse_dtype(""));
  CHECK_THROWS(ValueError, parse_op("mean"));
  const std::string dtype_message = message_of([] { parse_dtype("float128"); });
  CHECK(contains(dtype_message, "'float128'") && contains(dtype_message, "bfloat16"));
  const std::string op_message = message_of([] { parse_op("mean"); });
  CHECK(contains(op_message, "'mean'") && contains(op_message, "avg"));
}

TEST(types_have_the_names_that_people_type) {
  for (const char* word : {"float", "fp32", "FP32", "f32", "torch.float32", "single"})
    CHECK_EQ(parse_dtype(word), DType::float32);
  for (const char* word : {"half", "fp16", "f16", "Float16"}) CHECK_EQ(parse_dtype(word), DType::float16);
  for (const char* word : {"bf16", "BF16", "torch.bfloat16"}) CHECK_EQ(parse_dtype(word), DType::bfloat16);
  for (const char* word : {"f8e4m3", "fp8_e4m3", "e4m3"}) CHECK_EQ(parse_dtype(word), DType::float8_e4m3fn);
  CHECK_EQ(parse_dtype("f8e5m2"), DType::float8_e5m2);
  CHECK_EQ(parse_dtype("double"), DType::float64);
}

TEST(errors_say_what_may_have_been_meant) {
  const std::pair<const char*, const char*> ops[] = {
      {"mean", "'avg'"},    {"SUM", "'sum'"}, {"smu", "'sum'"},      {"average", "'avg'"},
      {"maximum", "'max'"}, {"add", "'sum'"}, {"product", "'prod'"}, {"bitwise_or", "'bor'"}};
  for (const auto& [word, meant] : ops) {
    const std::string message = message_of([word = word] { parse_op(word); });
    CHECK(contains(message, std::string("did you mean ") + meant));
  }
  CHECK(!contains(message_of([] { parse_op("softmax"); }), "did you mean"));
  CHECK(contains(message_of([] { parse_dtype("bfloat"); }), "did you mean 'bfloat16'"));
  CHECK(contains(message_of([] { parse_dtype("flaot32"); }), "did you mean 'float32'"));
}

TEST(which_pairs_make_sense) {
  //                              sum prod min max avg band bor bxor
  const char* const floats = "11111000";
  const char* const integers = "11110111";
  const char* const expected[] = {
      floats,     floats,     floats,   floats,   floats,   floats,  // float32 .. float8_e5m2
      integers,   integers,   integers, integers, integers, integers, integers, integers,  // int8 .. uint64
      "00110111",                                                                          // bool
      "11001000", "11001000",                                                              // complex
  };
  static_assert(std::size(expected) == kNumDTypes);
  for (int d = 0; d < kNumDTypes; ++d) {
    for (int o = 0; o < kNumOps; ++o) {
      const auto dtype = static_cast<DType>(d);
      const auto op = static_cast<Op>(o);
      if (supports(dtype, op) != (expected[d][o] == '1')) {
        CHECK_EQ(std::string(name(dtype)) + " " + name(op), "as expected");
      }
    }
  }
}

TEST(a_senseless_pair_says_what_would_do) {
  require(DType::float32, Op::avg);
  CHECK_THROWS(TypeError, require(DType::int32, Op::avg));
  const std::string on_bool = message_of([] { require(DType::bool_, Op::sum); });
  CHECK(contains(on_bool, "'sum'") && contains(on_bool, "bool") && contains(on_bool, "band") &&
        contains(on_bool, "bor"));
  const std::string on_float = message_of([] { require(DType::float32, Op::bxor); });
  CHECK(contains(on_float, "'bxor'") && contains(on_float, "float32") && contains(on_float, "uint32"));
}
