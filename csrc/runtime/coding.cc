#include "runtime/coding.h"

#include <array>
#include <cstdio>
#include <cstring>
#include <numeric>

#include "common/error.h"
#include "common/hash.h"
#include "schedule/algorithms.h"

namespace pycomm::runtime {

namespace {

using kernels::Rounding;

std::string words(const kernels::Codec& codec) {
  std::string options;
  const auto add = [&](const std::string& option) { options += (options.empty() ? "" : ", ") + option; };
  if (codec.ceil_scale) add("ceil_scale");
  if (codec.hadamard) add("hadamard");
  if (codec.rounding == Rounding::stochastic) add("stochastic");
  if (codec.seed != 0) add("seed=" + std::to_string(codec.seed));
  return kernels::name(codec.kind) + (options.empty() ? "" : "(" + options + ")");
}

// A plan never encodes a rank's own share, so the share's residual is added to the result afterwards.
void deliver_exact_share(const Request& request, int rank, Bound& bound) {
  const schedule::Call& call = request.call;
  const int ranks = call.world.size;
  const bool scatters = call.world.collective == Collective::reduce_scatter;
  if (!scatters && ranks > 1) return;
  const int64_t begin =
      std::accumulate(call.counts.begin(), call.counts.begin() + (scatters ? rank : 0), int64_t{0});
  const int64_t count = call.counts[scatters ? rank : 0];
  const bool divides = schedule::reduces(call.world.collective) && call.op == Op::avg;
  const float scale = bound.coding->residual_scale / (divides ? static_cast<float>(ranks) : 1.0F);
  bound.then = [=, coding = bound.coding, dtype = call.dtype, out = request.out] {
    kernels::add_residual(dtype, out, static_cast<size_t>(count), coding->residual + begin,
                          coding->next_residual + begin, scale);
  };
}

}  // namespace

void tell(CallRecord& record, const std::string& codec) {
  std::strncpy(record.codec, codec.c_str(), sizeof record.codec - 1);
  record.fingerprint = Hasher(record.fingerprint).add(codec).digest() | 1;
}

// Ranks that keep no residuals, or in other units, would add up another sum.
std::string feedback_words(const Coding& coding) {
  if (!coding.residual) return "";
  std::array<char, 32> scale{};
  std::snprintf(scale.data(), scale.size(), " at %.9g", coding.residual_scale);
  return std::string(", error feedback") + (coding.residual_scale == 1 ? "" : scale.data());
}

void check_floats(const schedule::Call& call, const std::string& codec) {
  if (!schedule::takes_codec(call.dtype)) {
    throw TypeError("codec " + codec + " is for float32, float16 and bfloat16; the buffer is " +
                    name(call.dtype) + ": convert it, or leave codec out");
  }
  const bool sums = call.op == Op::sum || call.op == Op::avg;
  if (schedule::reduces(call.world.collective) && !sums) {
    throw TypeError("codec " + codec + " carries sum, avg and premul_sum; op is " +
                    std::string(name(call.op)) + ": leave codec out");
  }
}

void check_coding(const Request& request) {
  const schedule::Call& call = request.call;
  const Coding& coding = *request.coding;
  check_floats(call, kernels::name(coding.codec.kind));
  if (call.world.collective != Collective::reduce_scatter || coding.segments.empty()) return;
  int64_t begin = 0;
  for (const int64_t count : call.counts) {
    if (begin % kernels::kTile != 0) {
      throw ValueError("a block of this reduce_scatter begins at element " + std::to_string(begin) +
                       ": with tensors in it (segments), blocks begin at multiples of " +
                       std::to_string(kernels::kTile) + " elements; pad them");
    }
    begin += count;
  }
}

// Ranks that encode in other ways, or in another step, do not make the same call.
void finish_coding(const Request& request, int rank, Bound& bound) {
  const schedule::Plan& plan = bound.prepared->plan;
  if (bound.coding->residual && !plan.encodes_once) {
    const Collective kind = plan.call.world.collective;
    throw ValueError(
        "algorithm \"" + plan.algorithm +
        "\" encodes elements more than once, and error feedback keeps one residual for each: use " +
        schedule::codec_algorithms(kind, schedule::Algorithm::Codecs::any_once));
  }
  const Coding& coding = *bound.coding;
  tell(bound.record, words(coding.codec) + feedback_words(coding) + ", step=" + std::to_string(coding.step));
  if (coding.residual) deliver_exact_share(request, rank, bound);
}

}  // namespace pycomm::runtime
