#include "runtime/composites.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "common/error.h"
#include "common/hash.h"
#include "kernels/copy.h"
#include "kernels/lossless.h"
#include "kernels/topk.h"
#include "runtime/coding.h"

namespace pycomm::runtime {

namespace {

// Memory that is written before it is read.
template <class T>
std::unique_ptr<T[]> room(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
}

// What all parts of a call say that they are.
CallRecord record_of_whole(const Request& request, const std::string& codec, bool steps) {
  const schedule::Call& call = request.call;
  CallRecord record;
  record.collective = call.world.collective;
  record.root = call.world.root;
  record.count = call.counts[0];
  record.dtype = call.dtype;
  record.op = call.op;
  record.prescale = call.prescale;
  Hasher fingerprint;
  fingerprint.add(record.collective).add(record.root).add(call.dtype).add(call.op).add(call.prescale);
  for (const int64_t count : call.counts) fingerprint.add(count);
  record.fingerprint = fingerprint.digest();
  tell(record, codec, steps);
  return record;
}

// A part of the request's call; `whole` is what all of its parts say.
Request part_of(const Request& request, const CallRecord& whole, Collective kind, DType dtype) {
  Request part;
  part.call.world.collective = kind;
  part.call.world.root = request.call.world.root;
  part.call.dtype = dtype;
  part.tag = request.tag;
  part.timeout_s = request.timeout_s;
  part.part_of = whole;
  return part;
}

// ---- topk ----

Bound bind_topk(Binder& binder, const Request& request, int64_t k) {
  const schedule::Call& call = request.call;
  const int64_t count = call.counts[0];
  check_floats(call, "topk");
  if (!request.algorithm.empty() || call.deterministic) {
    const std::string given =
        request.algorithm.empty() ? "deterministic=True" : "algorithm=\"" + request.algorithm + "\"";
    throw ValueError(given + ": topk is an all_gather of records, summed in rank order; leave it out");
  }
  if (k < 1) throw ValueError("`k` is " + std::to_string(k) + ": keep one element at least");
  if (count >> 32) {
    throw ValueError("topk numbers elements in 32 bits, and the buffer has " + std::to_string(count) +
                     ": split it");
  }
  const int64_t capacity = std::min(k, count), bytes = kernels::topk_record_bytes(capacity);
  // float32 is summed where the result will be.
  struct State {
    std::unique_ptr<char[]> records;
    std::unique_ptr<float[]> sum;
    std::unique_ptr<char[]> segments;
  };
  const std::shared_ptr<Coding> coding = request.coding;
  const bool cut = !coding->segments.empty();
  auto state = std::make_shared<State>(
      State{room<char>(bytes * binder.size()), room<float>(call.dtype == DType::float32 ? 0 : count),
            room<char>(cut ? count * static_cast<int64_t>(size_of(call.dtype)) : 0)});

  CallRecord whole =
      record_of_whole(request, "topk(" + std::to_string(k) + ")" + feedback_words(*coding), false);
  std::strncpy(whole.algorithm, "direct", sizeof whole.algorithm - 1);
  Request gather = part_of(request, whole, Collective::all_gather, DType::uint8);
  gather.call.counts.assign(binder.size(), bytes);
  gather.call.in_place = true;
  gather.out = state->records.get();
  gather.in = state->records.get() + binder.rank() * bytes;
  Bound bound = binder.bind(gather);

  bound.coding = coding;
  bound.before = [=, dtype = call.dtype, prescale = static_cast<float>(call.prescale), x = request.in,
                  mine = static_cast<char*>(const_cast<void*>(gather.in))] {
    Residuals* const residuals = coding->residuals.get();
    if (cut) {
      kernels::copy_bytes(state->segments.get(), x, static_cast<size_t>(count) * size_of(dtype));
      clear_gaps(dtype, state->segments.get(), count, coding->segments);
    }
    kernels::topk_encode({.dtype = dtype,
                          .x = cut ? state->segments.get() : x,
                          .count = static_cast<size_t>(count),
                          .capacity = static_cast<size_t>(capacity),
                          .record = mine,
                          .residual = residuals ? residuals->now() : nullptr,
                          .next_residual = residuals ? residuals->next() : nullptr,
                          .residual_scale = coding->residual_scale});
    if (prescale == 1) return;
    auto* values = reinterpret_cast<float*>(mine + bytes) - capacity;
    std::for_each(values, values + capacity, [&](float& value) { value *= prescale; });
  };
  bound.then = [=, ranks = binder.size(), dtype = call.dtype, op = call.op, out = request.out] {
    auto* sum = dtype == DType::float32 ? static_cast<float*>(out) : state->sum.get();
    std::memset(sum, 0, static_cast<size_t>(count) * sizeof(float));
    for (int r = 0; r < ranks; ++r) {
      kernels::topk_decode_add(state->records.get() + r * bytes, static_cast<size_t>(capacity), sum,
                               static_cast<size_t>(count));
    }
    if (sum != out || op != Op::sum) {
      const void* from = sum;
      void* to = out;
      const Format partial = Format::partial;
      kernels::find_combine(dtype, op)({.dsts = &to,
                                        .srcs = &from,
                                        .src_formats = &partial,
                                        .num_dsts = 1,
                                        .num_srcs = 1,
                                        .dst_format = Format::final,
                                        .count = static_cast<size_t>(count),
                                        .divisor = op == Op::avg ? static_cast<double>(ranks) : 1.0});
    }
    for (int r = 0; r < ranks && coding->residuals && coding->finite; ++r) {
      coding->finite =
          kernels::topk_finite(state->records.get() + r * bytes, static_cast<size_t>(capacity), dtype, out);
    }
  };
  if (coding->residuals) keep_residuals(bound);
  return bound;
}

// ---- shared_int ----

Bound bind_shared_int(Binder& binder, const Request& request, int width) {
  const schedule::Call& call = request.call;
  const int64_t count = call.counts[0];
  check_floats(call, "shared_int");
  if (width != 8 && width != 16 && width != 32) {
    throw ValueError("`width` is " + std::to_string(width) + ": integers of 8, 16 or 32 bits");
  }
  const int64_t limit = kernels::shared_limit(width, binder.size());
  const int64_t blocks = (count + kernels::kSharedBlock - 1) / kernels::kSharedBlock;
  struct State {
    std::unique_ptr<float[]> amax;
    std::unique_ptr<char[]> q;
  };
  auto state = std::make_shared<State>(State{room<float>(blocks), room<char>(count * width / 8)});
  const Coding& coding = *request.coding;
  std::string codec = "shared_int(" + std::to_string(width);
  if (coding.codec.seed != 0) codec += ", seed=" + std::to_string(coding.codec.seed);
  const CallRecord whole = record_of_whole(request, codec + ")", true);

  const auto part = [&](DType dtype, Op op, int64_t elements, void* data) {
    Request reduce = part_of(request, whole, Collective::all_reduce, dtype);
    reduce.call.op = op;
    reduce.call.counts = {elements};
    reduce.call.in_place = true;
    reduce.in = reduce.out = data;
    return reduce;
  };
  Request sum = part(width == 8    ? DType::int8
                     : width == 16 ? DType::int16
                                   : DType::int32,
                     Op::sum, count, state->q.get());
  sum.algorithm = request.algorithm;
  Bound bound = binder.bind(sum);
  std::memcpy(bound.record.algorithm, bound.prepared->record.algorithm, sizeof bound.record.algorithm);
  Prelude scales{.before = nullptr,
                 .plan = binder.bind(part(DType::float32, Op::max, blocks, state->amax.get()))};
  std::memcpy(scales.plan.record.algorithm, bound.record.algorithm, sizeof bound.record.algorithm);

  const auto encoding = [rank = binder.rank()](const Coding& of) {
    return kernels::Encoding{.step = of.step, .rank = static_cast<uint32_t>(rank), .segments = of.segments};
  };
  scales.before = [=, dtype = call.dtype, x = request.in, own = request.coding] {
    kernels::shared_amax(dtype, x, static_cast<size_t>(count), state->amax.get(), encoding(*own));
  };
  bound.preludes.push_back(std::move(scales));
  bound.conclude = [=, dtype = call.dtype, x = request.in,
                    own = request.coding](const BoundPlan& plan) -> const BoundPlan& {
    kernels::shared_encode(dtype, x, static_cast<size_t>(count), state->amax.get(), width, limit,
                           own->codec.seed, encoding(*own), state->q.get());
    return plan;
  };
  const double divisor = (call.op == Op::avg ? binder.size() : 1) / call.prescale;
  bound.then = [=, dtype = call.dtype, out = request.out] {
    kernels::shared_decode(state->q.get(), static_cast<size_t>(count), state->amax.get(), width, limit,
                           divisor, dtype, out);
  };
  bound.coding = request.coding;
  keep_gaps(request, bound);
  bound.set_step(coding.step);
  return bound;
}

// ---- lossless ----

// One all_gather or broadcast of encoded data. Used by one run at a time; has buffers only while one is under
// way, since calls are remembered.
class LosslessCall {
 public:
  LosslessCall(Binder& binder, const Request& request)
      : binder_(binder), request_(request), whole_(record_of_whole(request, "lossless", false)) {}
  Bound bind(const std::shared_ptr<LosslessCall>& self);

 private:
  bool gathers() const { return request_.call.world.collective == Collective::all_gather; }
  bool gives() const { return gathers() || binder_.rank() == request_.call.world.root; }
  int own_block() const { return gathers() ? binder_.rank() : 0; }
  // The bytes for a block, if each gets this share of its bound; for all of them.
  int64_t room_of(int64_t count, int share) const;
  std::vector<int64_t> rooms_of(int share) const;
  // The part of the call that moves encoded bytes, on no buffers yet.
  Request moving(int share) const;
  void encode();
  const BoundPlan& agreed(const BoundPlan& own);
  void decode();

  Binder& binder_;
  const Request request_;
  CallRecord whole_;
  std::unique_ptr<char[]> given_, moved_;  // what this rank gives; all blocks, one after the other
  int64_t encoded_ = 0;                    // bytes of what it gives
  int32_t share_ = 0;                      // what it needs, then what all use
  std::map<int32_t, BoundPlan> plans_;     // by share
};

int64_t LosslessCall::room_of(int64_t count, int share) const {
  return (kernels::lossless_bound(count) * share + kLosslessShares - 1) / kLosslessShares;
}

std::vector<int64_t> LosslessCall::rooms_of(int share) const {
  std::vector<int64_t> rooms;
  for (const int64_t count : request_.call.counts) rooms.push_back(room_of(count, share));
  return rooms;
}

Request LosslessCall::moving(int share) const {
  Request part = part_of(request_, whole_, request_.call.world.collective, DType::uint8);
  part.call.counts = rooms_of(share);
  part.call.in_place = !gathers();
  part.algorithm = request_.algorithm;
  return part;
}

Bound LosslessCall::bind(const std::shared_ptr<LosslessCall>& self) {
  Bound bound = binder_.bind(moving(kLosslessShares));  // so that what cannot run is an error here
  std::memcpy(whole_.algorithm, bound.prepared->record.algorithm, sizeof whole_.algorithm);
  std::memcpy(bound.record.algorithm, whole_.algorithm, sizeof whole_.algorithm);
  bound.preludes.clear();  // they would choose another plan; that is for agreed() to do
  Request agree =
      part_of(request_, whole_, gathers() ? Collective::all_reduce : Collective::broadcast, DType::int32);
  agree.call.op = Op::max;
  agree.call.counts = {1};
  agree.call.in_place = true;
  agree.in = agree.out = &share_;
  bound.preludes.push_back({.plan = binder_.bind(agree)});
  bound.before = [self] { self->encode(); };
  bound.conclude = [self](const BoundPlan& own) -> const BoundPlan& { return self->agreed(own); };
  bound.then = [self] { self->decode(); };
  return bound;
}

void LosslessCall::encode() {
  share_ = 1;
  if (!gives()) return;
  const int64_t count = request_.call.counts[own_block()], bound = kernels::lossless_bound(count);
  given_ = room<char>(bound);
  encoded_ =
      static_cast<int64_t>(kernels::lossless_encode(request_.in, static_cast<size_t>(count), given_.get()));
  while (room_of(count, share_) < encoded_) ++share_;
}

// The others may have begun: what goes wrong here is the group's failure.
const BoundPlan& LosslessCall::agreed(const BoundPlan& own) {
  try {
    const std::vector<int64_t> rooms = rooms_of(share_);
    if (gives()) {
      std::memset(given_.get() + encoded_, 0, static_cast<size_t>(rooms[own_block()] - encoded_));
    }
    if (gathers() || !gives()) moved_ = room<char>(std::reduce(rooms.begin(), rooms.end()));
    BoundPlan& plan = plans_[share_];
    if (!plan.prepared) plan = share_ == kLosslessShares ? own : binder_.bind(moving(share_));
    plan.bases.in = gives() ? given_.get() : moved_.get();
    plan.bases.out = moved_ ? moved_.get() : given_.get();  // a root works in place
    return plan;
  } catch (const std::exception& error) {
    transport::Board& board = binder_.domain().board();
    board.fail(FailureKind::aborted, "rank " + std::to_string(binder_.rank()) +
                                         " could not prepare a call with codec lossless: " + error.what());
    board.raise_failure(transport::Board::Caller::under_way);
  }
}

void LosslessCall::decode() {
  const auto item = static_cast<int64_t>(size_of(request_.call.dtype));
  const std::vector<int64_t> rooms = rooms_of(share_);
  auto* to = static_cast<char*>(request_.out);
  int64_t at = 0;
  for (size_t block = 0; block < rooms.size(); ++block) {
    const int64_t bytes = request_.call.counts[block] * item;
    if (!gives() || static_cast<int>(block) != own_block()) {
      kernels::lossless_decode(moved_.get() + at, static_cast<size_t>(rooms[block]), to,
                               static_cast<size_t>(request_.call.counts[block]));
    } else if (bytes > 0 && to != request_.in) {
      kernels::copy_bytes(to, request_.in, static_cast<size_t>(bytes));
    }
    at += rooms[block];
    to += bytes;
  }
  given_.reset();
  moved_.reset();
}

Bound bind_lossless(Binder& binder, const Request& request) {
  check_lossless(request.call.dtype, "the buffer");
  if (binder.size() == 1) return binder.bind(request);
  const auto call = std::make_shared<LosslessCall>(binder, request);
  return call->bind(call);
}

}  // namespace

Bound bind(Binder& binder, Request& request) {
  if (const auto* topk = std::get_if<TopK>(&request.composite)) return bind_topk(binder, request, topk->k);
  if (const auto* shared = std::get_if<SharedInt>(&request.composite)) {
    return bind_shared_int(binder, request, shared->width);
  }
  if (std::holds_alternative<Lossless>(request.composite)) return bind_lossless(binder, request);
  return binder.bind(request);
}

}  // namespace pycomm::runtime
