// Calls with codecs: what they ask for besides their plans.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "kernels/codec.h"
#include "schedule/plan.h"

namespace pycomm::runtime {

struct Bound;
struct CallRecord;
struct Request;

// Error feedback: what the encodes of calls on the same `count` elements have lost and still owe. A call
// reads what is owed now and writes what will be owed next; the two are swapped if its result is finite.
// Calls run one after the other; whoever reads or writes it between them makes sure that none is under way.
class Residuals {
 public:
  explicit Residuals(int64_t count)
      : buffers_{std::vector<float>(static_cast<size_t>(count)),
                 std::vector<float>(static_cast<size_t>(count))} {}
  int64_t count() const { return static_cast<int64_t>(buffers_[0].size()); }
  float* now() { return buffers_[now_].data(); }
  float* next() { return buffers_[1 - now_].data(); }

  void begin() { swapped_ = false; }
  void end(bool finite) {
    swapped_ = finite;
    if (finite) now_ = 1 - now_;
  }
  // Undoes the last call's change, if it made one.
  void take_back() {
    if (swapped_) now_ = 1 - now_;
    swapped_ = false;
  }

 private:
  std::vector<float> buffers_[2];
  int now_ = 0;
  bool swapped_ = false;
};

// What the encodes of a call depend on besides its plan, and what a run of it tells.
struct Coding {
  Codec codec;  // with its seed
  uint32_t step = 0;
  bool counted = false;  // the communicator counts such calls: it sets the step of each run
  std::vector<kernels::Segment> segments;
  // As long as the rank's `in`; null: no error feedback. What the rank never encodes (its own share of a
  // reduce_scatter, anything in a world of one) has its residual added to the result. The scale is that of
  // values that are not divided yet.
  std::shared_ptr<Residuals> residuals;
  float residual_scale = 1;
  bool finite = true;  // with residuals: whether the result holds no NaN and no Inf, once a run has ended
};

// Codecs that no plan carries; composites.h makes their calls. Of the Coding only the segments, the
// residuals and, for SharedInt, the seed and the step count. Lossless has no Coding.
struct TopK {
  int64_t k;  // elements kept
};
struct SharedInt {
  int width;  // bits: 8, 16 or 32
};
struct Lossless {};
using Composite = std::variant<std::monostate, TopK, SharedInt, Lossless>;

// A codec takes these elements and this operator. Throws TypeError that names `codec`.
void check_floats(const schedule::Call& call, const std::string& codec);
void check_lossless(DType dtype, const std::string& buffer);  // bfloat16; `buffer`: what the error names
// The checks of a request with `coding` that need no plan. Throws TypeError, ValueError.
void check_coding(const Request& request);
// Completes a bound call: writes the codec into its record, and adds the host work that no plan does. Throws
// ValueError.
void finish_coding(const Request& request, int rank, Bound& bound);

// Zeros what lies between the segments, and after the last one.
void clear_gaps(DType dtype, void* x, int64_t count, std::span<const kernels::Segment> segments);
// Makes each run of a call on one block leave zeros there, where decodes may have left anything.
void keep_gaps(const Request& request, Bound& bound);

// Makes each run of a call with residuals begin and end them.
void keep_residuals(Bound& bound);

// Writes `codec` into the record: ranks that encode differently do not make the same call. `steps`: the step
// is compared as well, see Bound::set_step.
void tell(CallRecord& record, const std::string& codec, bool steps);
std::string codec_words(const Codec& codec);
// ", error feedback", with its scale; empty without.
std::string feedback_words(const Coding& coding);

}  // namespace pycomm::runtime
