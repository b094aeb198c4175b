#include "runtime/coding.h"

#include <array>
#include <cstdio>
#include <cstring>
#include <numeric>

#include "common/error.h"
#include "common/hash.h"
#include "runtime/call.h"
#include "schedule/algorithms.h"

namespace pycomm::runtime {

namespace {

// A plan never encodes a rank's own share, so the share's residual is added to the result afterwards.
void deliver_exact_share(const Request& request, int rank, Bound& bound) {
  const schedule::Call& call = request.call;
  const int ranks = call.world.size;
  const schedule::Traits& traits = call.world.traits();
  const bool scatters = traits.out.holds == schedule::Content::Holds::own;
  if (!scatters && ranks > 1) return;
  const int64_t begin =
      std::accumulate(call.counts.begin(), call.counts.begin() + (scatters ? rank : 0), int64_t{0});
  const int64_t count = call.counts[scatters ? rank : 0];
  const bool divides = traits.reduces && call.op == Op::avg;
  const float scale = bound.coding->residual_scale / (divides ? static_cast<float>(ranks) : 1.0F);
  bound.then = [=, coding = bound.coding, dtype = call.dtype, out = request.out] {
    Residuals& residuals = *coding->residuals;
    coding->finite = kernels::add_residual(dtype, out, static_cast<size_t>(count), residuals.now() + begin,
                                           residuals.next() + begin, scale);
  };
}

// What a step adds to a fingerprint, so that the next one can take its place.
uint64_t word_of(uint32_t step) { return step == 0 ? 0 : Hasher().add(step).digest() & ~uint64_t{1}; }

void set_step_of(CallRecord& record, uint32_t step) {
  if (!record.steps) return;
  record.fingerprint ^= word_of(record.step) ^ word_of(step);
  record.step = step;
}

}  // namespace

std::string codec_words(const Codec& codec) {
  std::string options;
  const auto add = [&](const std::string& option) { options += (options.empty() ? "" : ", ") + option; };
  if (codec.ceil_scale) add("ceil_scale");
  if (codec.hadamard) add("hadamard");
  if (codec.rounding == Rounding::stochastic) add("stochastic");
  if (codec.seed != 0) add("seed=" + std::to_string(codec.seed));
  return std::string(pycomm::name(codec.kind)) + (codec.links == Links::wire ? "@wire" : "") +
         (options.empty() ? "" : "(" + options + ")");
}

void tell(CallRecord& record, const std::string& codec, bool steps) {
  record.steps = steps ? 1 : 0;
  std::strncpy(record.codec, codec.c_str(), sizeof record.codec - 1);
  record.fingerprint = Hasher(record.fingerprint).add(codec).digest() | 1;
}

// Ranks that keep no residuals, or in other units, would add up another sum.
std::string feedback_words(const Coding& coding) {
  if (!coding.residuals) return "";
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
  if (call.world.traits().reduces && !sums) {
    throw TypeError("codec " + codec + " carries sum, avg and premul_sum; op is " +
                    std::string(name(call.op)) + ": leave codec out");
  }
}

void check_lossless(DType dtype, const std::string& buffer) {
  if (dtype == DType::bfloat16) return;
  throw TypeError("codec lossless is for bfloat16; " + buffer + " is " + name(dtype) +
                  ": convert it, or leave codec out");
}

void check_coding(const Request& request) {
  const schedule::Call& call = request.call;
  const Coding& coding = *request.coding;
  check_floats(call, pycomm::name(coding.codec.kind));
  if (coding.residuals && coding.codec.links == Links::wire) {
    throw ValueError(
        std::string("codec ") + pycomm::name(coding.codec.kind) +
        "@wire and error feedback: between nodes a rank encodes sums of its node, and only a part of "
        "them, so that a part of what it loses would never be sent; pass error_feedback=False, or a codec "
        "with links=\"all\"");
  }
  const bool scatters = call.world.traits().out.holds == schedule::Content::Holds::own;
  if (!scatters || coding.segments.empty()) return;
  int64_t begin = 0;
  for (const int64_t count : call.counts) {
    if (begin % kTile != 0) {
      throw ValueError("a block of this reduce_scatter begins at element " + std::to_string(begin) +
                       ": with tensors in it (segments), blocks begin at multiples of " +
                       std::to_string(kTile) + " elements; pad them");
    }
    begin += count;
  }
}

void finish_coding(const Request& request, int rank, Bound& bound) {
  const schedule::Plan& plan = bound.prepared->plan;
  const Coding& coding = *bound.coding;
  if (coding.residuals && !plan.encodes_once) {
    const Collective kind = plan.call.world.collective;
    throw ValueError(
        "algorithm \"" + plan.algorithm +
        "\" encodes elements more than once, and error feedback keeps one residual for each: use " +
        schedule::algorithms_that(kind, [](const schedule::Algorithm& other) {
          return other.codecs == schedule::Algorithm::Codecs::any_once;
        }));
  }
  tell(bound.record, codec_words(coding.codec) + feedback_words(coding), true);
  keep_gaps(request, bound);
  if (!coding.residuals) return;
  deliver_exact_share(request, rank, bound);
  keep_residuals(bound);
}

void clear_gaps(DType dtype, void* x, int64_t count, std::span<const kernels::Segment> segments) {
  const auto size = static_cast<int64_t>(size_of(dtype));
  int64_t end = 0;
  const auto clear_to = [&](int64_t begin) {
    std::memset(static_cast<char*>(x) + end * size, 0, static_cast<size_t>((begin - end) * size));
  };
  for (const kernels::Segment& segment : segments) {
    clear_to(segment.begin);
    end = segment.end;
  }
  clear_to(count);
}

void keep_gaps(const Request& request, Bound& bound) {
  const schedule::Call& call = request.call;
  if (request.coding->segments.empty() || !call.world.traits().one_block()) return;
  bound.then = [coding = request.coding, dtype = call.dtype, count = call.counts[0], out = request.out,
                then = std::move(bound.then)] {
    if (then) then();
    clear_gaps(dtype, out, count, coding->segments);
  };
}

void keep_residuals(Bound& bound) {
  const auto& coding = bound.coding;
  bound.before = [coding, before = std::move(bound.before)] {
    coding->finite = true;
    coding->residuals->begin();
    if (before) before();
  };
  bound.then = [coding, then = std::move(bound.then)] {
    if (then) then();
    coding->residuals->end(coding->finite);
  };
}

void Bound::set_step(uint32_t step) {
  coding->step = step;
  set_step_of(record, step);
  for (Prelude& prelude : preludes) set_step_of(prelude.plan.record, step);
}

}  // namespace pycomm::runtime
