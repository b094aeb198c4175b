// Calls with codecs: the ranks' results, what error feedback keeps, which calls are refused.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "common/error.h"
#include "float_calls.h"
#include "schedule/algorithms.h"

using namespace float_calls;
using schedule::Algorithm;

// The same bits on all ranks, and again when called again; other ones in another step.
TEST(ranks_end_with_the_same_bits) {
  const int64_t count = 30011;
  for (const int n : {2, 3, 5}) {
    const std::vector<double> exact = sum_of(n, count);
    for (const Algorithm& algorithm : schedule::algorithms()) {
      if (algorithm.collective != Collective::all_reduce || algorithm.codecs == Algorithm::Codecs::none)
        continue;
      for (int k = 1; k < kNumCodecs; ++k) {
        const auto kind = static_cast<CodecKind>(k);
        const bool stochastic = kind != CodecKind::sign;
        Copies copies;
        double error = 0;
        run_threads(n, [&](Communicator& comm) {
          Floats first(count), again(count), other(count);
          const Floats x = noise(count, comm.rank());
          const auto reduce = [&](uint32_t step, Floats& out) {
            const Coding coding{.codec = {.kind = kind,
                                          .rounding = stochastic ? Rounding::stochastic : Rounding::nearest,
                                          .seed = 3},
                                .step = step};
            Request r = request(comm, Collective::all_reduce, coding, x, out);
            r.algorithm = algorithm.name;
            run(comm, r);
          };
          reduce(7, first);
          reduce(8, other);
          reduce(7, again);
          CHECK(first == again);
          CHECK_EQ(first != other, stochastic);
          copies.add(first);
          if (comm.rank() == 0) error = relative_error(first, exact);
        });
        CHECK(copies.equal());
        // The worst of a ring of five by the bounds of docs/codecs.md, with room.
        const double bound = kind == CodecKind::sign ? 0.9 : kind == CodecKind::int4 ? 0.08 : 0.03;
        if (!(error < bound)) {
          check::fail(
              __FILE__, __LINE__,
              std::string(algorithm.name) + ", " + pycomm::name(kind) + ": error " + std::to_string(error));
        }
      }
    }
  }
}

// two_shot of two ranks written out: each encodes the other's half in turn 0; the owner adds what comes to
// its own, and encodes the average in turn 1. Every argument of the encodes counts.
TEST(two_shot_is_what_its_encodes_say) {
  const int64_t count = 2148;  // two tiles and a tail: rank 0 owns the first tile
  const Codec codec{.kind = CodecKind::int8, .rounding = Rounding::stochastic, .seed = 77};
  const std::vector<kernels::Segment> segments = {{0, 700, 5}, {768, 2100, 6}};
  std::vector<Floats> x, residual, results(2), next(2), expected_next(2, Floats(count, 9));
  for (int r = 0; r < 2; ++r) {
    x.push_back(noise(count, r));
    residual.push_back(noise(count, 10 + r));
    results[r].resize(count);
  }
  run_threads(2, [&](Communicator& comm) {
    const int rank = comm.rank();
    const auto residuals = residuals_of(residual[rank], 9);
    Request r = request(
        comm, Collective::all_reduce,
        {.codec = codec, .step = 11, .segments = segments, .residuals = residuals, .residual_scale = 2},
        x[rank], results[rank]);
    r.call.op = Op::avg;
    run(comm, r);
    next[rank] = owed(*residuals);
  });
  Floats expected(count);
  const int64_t begins[] = {0, 1024, count};
  for (int owner = 0; owner < 2; ++owner) {
    const int64_t begin = begins[owner], size = begins[owner + 1] - begin;
    std::vector<char> shown(wire_bytes(codec.kind, size)), result(shown.size());
    const auto transcode = [&](int rank, uint32_t turn, std::vector<const void*> srcs,
                               std::vector<Format> formats, void* dst, Format format, double divisor) {
      kernels::transcode({.codec = &codec,
                          .dtype = DType::float32,
                          .dsts = &dst,
                          .srcs = srcs.data(),
                          .src_formats = formats.data(),
                          .num_dsts = 1,
                          .num_srcs = static_cast<int>(srcs.size()),
                          .dst_format = format,
                          .count = static_cast<size_t>(size),
                          .divisor = divisor,
                          .encoding = {.step = 11,
                                       .turn = turn,
                                       .rank = static_cast<uint32_t>(rank),
                                       .index = begin,
                                       .segments = segments,
                                       .residual = residual[rank].data() + begin,
                                       .next_residual = expected_next[rank].data() + begin,
                                       .residual_scale = 2 / static_cast<float>(divisor)}});
    };
    using enum Format;
    const int other = 1 - owner;
    transcode(other, 0, {x[other].data() + begin}, {raw}, shown.data(), wire, 1);
    std::vector<const void*> srcs = {x[owner].data() + begin, shown.data()};
    std::vector<Format> formats = {raw, wire};
    if (owner == 1) {
      std::swap(srcs[0], srcs[1]);
      std::swap(formats[0], formats[1]);
    }
    transcode(owner, 1, srcs, formats, result.data(), wire, 2);
    transcode(owner, 0, {result.data()}, {wire}, expected.data() + begin, final, 1);
  }
  for (int r = 0; r < 2; ++r) {
    CHECK(results[r] == expected);
    CHECK(next[r] == expected_next[r]);
  }
}

// However the data is cut into trips: an all_gather of many is each rank's data, encoded as one.
TEST(trips_do_not_show_in_the_bits) {
  const int64_t count = 400'000;
  const Codec codec{.kind = CodecKind::int4, .rounding = Rounding::stochastic, .seed = 1};
  Floats expected(2 * count), residual(count, 0.25F);
  std::vector<Floats> expected_next(2, Floats(count));
  std::vector<char> code(wire_bytes(codec.kind, count));
  for (int r = 0; r < 2; ++r) {
    const Floats x = noise(count, r);
    const void* src = x.data();
    void* dst = code.data();
    Format format = Format::raw;
    kernels::TranscodeArgs args{.codec = &codec,
                                .dtype = DType::float32,
                                .dsts = &dst,
                                .srcs = &src,
                                .src_formats = &format,
                                .num_dsts = 1,
                                .num_srcs = 1,
                                .dst_format = Format::wire,
                                .count = static_cast<size_t>(count),
                                .encoding = {.step = 5,
                                             .rank = static_cast<uint32_t>(r),
                                             .residual = residual.data(),
                                             .next_residual = expected_next[r].data()}};
    kernels::transcode(args);
    src = code.data();
    dst = expected.data() + r * count;
    format = Format::wire;
    args.dst_format = Format::final;
    kernels::transcode(args);
  }
  run_threads(2, [&](Communicator& comm) {
    Floats out(2 * count);
    for (const char* algorithm : {"direct", "ring", "recursive_doubling"}) {
      const Floats x = noise(count, comm.rank());
      const auto residuals = residuals_of(residual);
      Request r =
          request(comm, Collective::all_gather, {.codec = codec, .step = 5, .residuals = residuals}, x, out);
      r.algorithm = algorithm;
      run(comm, r);
      CHECK(out == expected);
      CHECK(owed(*residuals) == expected_next[comm.rank()]);
    }
  });
}

// In place or not, plain memory or symmetric, at once or queued: the same bits.
TEST(buffers_do_not_change_the_bits) {
  const int64_t count = 20000;
  run_threads(3, [&](Communicator& comm) {
    Patience patience;
    const Floats x = noise(count, comm.rank());
    const Coding coding{.codec = {.kind = CodecKind::int8}};
    Floats out(count), in_place = x, queued(count);
    run(comm, request(comm, Collective::all_reduce, coding, x, out));
    run(comm, request(comm, Collective::all_reduce, coding, in_place, in_place));
    comm.submit(comm.bind(request(comm, Collective::all_reduce, coding, x, queued)))
        ->wait(INFINITY, patience);
    CHECK(out == in_place);
    CHECK(out == queued);
    const auto memory = comm.allocate(count * static_cast<int64_t>(sizeof(float)), patience);
    auto* symmetric = reinterpret_cast<float*>(memory->data());
    std::copy(x.begin(), x.end(), symmetric);
    Request r = request(comm, Collective::all_reduce, coding, x, out);
    r.in = r.out = symmetric;
    r.call.in_place = true;
    run(comm, r);
    CHECK(std::equal(out.begin(), out.end(), symmetric));
  });
}

// A rank gets its own share of a reduce_scatter exactly; what it shows of an all_gather it gets as others do.
TEST(blocks_are_exact_where_nobody_else_sees_them) {
  const int64_t count = 3000;
  const int n = 2;
  Copies copies;
  run_threads(n, [&](Communicator& comm) {
    const Coding coding{.codec = {.kind = CodecKind::int8}};
    for (const char* algorithm : {"direct", "ring"}) {
      Floats in(n * count), out(count);
      for (int64_t i = 0; i < n * count; ++i) {  // the peer gives multiples of one number: it is exact
        const bool own = i / count == comm.rank();
        in[i] = own ? 1.0F / static_cast<float>(i % 97 + 3) : 127.0F;
      }
      Request r = request(comm, Collective::reduce_scatter, coding, in, out);
      r.algorithm = algorithm;
      run(comm, r);
      const int64_t begin = comm.rank() * count;
      for (int64_t i = 0; i < count; ++i) CHECK_EQ(out[i], in[begin + i] + 127.0F);
    }
    const Floats mine = noise(count, comm.rank());
    Floats all(n * count);
    run(comm, request(comm, Collective::all_gather, coding, mine, all));
    copies.add(all);
    const float own = all[comm.rank() * count];
    CHECK(own != mine[0] && std::abs(own - mine[0]) < 0.1F);
  });
  CHECK(copies.equal());
}

// Whatever the route: what all ranks kept, before and after, is what the result lacks. In doubles, to the
// rounding of the sums.
TEST(error_feedback_keeps_what_is_lost) {
  const int64_t count = 9000;
  const float scale = 4;
  for (const int n : {2, 3}) {
    for (const Algorithm& algorithm : schedule::algorithms()) {
      if (algorithm.collective != Collective::all_reduce || algorithm.codecs != Algorithm::Codecs::any_once)
        continue;
      for (const Op op : {Op::sum, Op::avg}) {
        std::vector<Floats> results(n), before(n), after(n);
        run_threads(n, [&](Communicator& comm) {
          const int rank = comm.rank();
          before[rank] = noise(count, 100 + rank);
          results[rank].resize(count);
          const Floats x = noise(count, rank);
          const Coding coding{.codec = {.kind = CodecKind::int8},
                              .residuals = residuals_of(before[rank]),
                              .residual_scale = scale};
          Request r = request(comm, Collective::all_reduce, coding, x, results[rank]);
          r.call.op = op;
          r.algorithm = algorithm.name;
          run(comm, r);
          after[rank] = owed(*coding.residuals);
        });
        std::vector<double> should = sum_of(n, count);
        double worst = 0;
        for (int64_t i = 0; i < count; ++i) {
          for (int r = 0; r < n; ++r) {
            // An element that a rank did not encode keeps its NaN: tree's and ring's inner ranks do not.
            if (!std::isnan(after[r][i])) should[i] += double{scale} * (before[r][i] - after[r][i]);
          }
          const double divided = op == Op::avg ? results[0][i] * double(n) : results[0][i];
          worst = std::max(worst, std::abs(divided - should[i]));
        }
        if (!(worst < 1e-4)) {
          check::fail(__FILE__, __LINE__, std::string(algorithm.name) + ": loses " + std::to_string(worst));
        }
      }
    }
  }
}

TEST(what_is_refused_is_told_with_what_there_is) {
  run_threads(2, [](Communicator& comm) {
    Floats x = noise(5000, 0);
    const auto refused = [&](auto change, const std::string& words) {
      Coding coding{.codec = {.kind = CodecKind::int8}};
      Request r = request(comm, Collective::all_reduce, coding, x, x);
      change(r, coding);
      r.coding = std::make_shared<Coding>(coding);
      try {
        comm.bind(r);
        check::fail(__FILE__, __LINE__, "not refused: " + words);
      } catch (const std::exception& error) {
        if (std::string(error.what()).find(words) == std::string::npos) {
          check::fail(__FILE__, __LINE__, error.what());
        }
      }
    };
    refused([](Request& r, Coding&) { r.call.dtype = DType::int32; }, "the buffer is int32");
    refused([](Request& r, Coding&) { r.call.dtype = DType::float64; }, "the buffer is float64");
    refused([](Request& r, Coding&) { r.call.op = Op::max; }, "op is max");
    refused([](Request& r, Coding&) { r.algorithm = "recursive_doubling"; },
            "one_shot, two_shot, ring, tree");
    refused([](Request& r, Coding&) { r.algorithm = "nonesuch"; }, "no algorithm");
    refused([](Request& r, Coding&) { r.call.world.collective = Collective::broadcast; }, "carries no codec");
    refused(
        [](Request& r, Coding&) {
          r.call.deterministic = true;
          r.algorithm = "ring";
        },
        "balanced order");
    refused(
        [&](Request& r, Coding& c) {
          c.segments = {{0, 5000, 1}};
          r.call.world.collective = Collective::reduce_scatter;
          r.call.counts = {2500, 2500};
        },
        "begins at element 2500");
    refused([](Request& r, Coding&) { r.composite = TopK{0}; }, "one element at least");
    refused([](Request& r, Coding&) { r.composite = SharedInt{12}; }, "8, 16 or 32 bits");
    refused(
        [](Request& r, Coding&) {
          r.composite = TopK{3};
          r.algorithm = "ring";
        },
        "algorithm=\"ring\": topk");
  });
  run_threads(3, [](Communicator& comm) {
    Floats x = noise(5000, 0);
    const Coding coding{.codec = {.kind = CodecKind::int8}, .residuals = std::make_shared<Residuals>(5000)};
    Request r = request(comm, Collective::all_reduce, coding, x, x);
    r.algorithm = "halving_doubling";
    CHECK_THROWS(ValueError, comm.bind(r));
  });
}

// A result that holds NaN or Inf leaves what is owed as it was, on every path that a final value takes; and
// what a call has changed can be taken back.
TEST(residuals_stay_where_a_result_is_not_finite) {
  const int64_t count = 3000;
  for (const int n : {1, 2, 3}) {
    run_threads(n, [&](Communicator& comm) {
      const Floats before = noise(count, 7);
      for (const char* algorithm : {"two_shot", "ring", "one_shot"}) {
        for (const float wrong : {INFINITY, -INFINITY, NAN}) {
          for (const bool topk : {false, true}) {
            const Coding coding{.codec = {.kind = CodecKind::int8}, .residuals = residuals_of(before)};
            Residuals& residuals = *coding.residuals;
            Floats x = noise(count, comm.rank()), out(count);
            const auto reduce = [&] {
              Request r = request(comm, Collective::all_reduce, coding, x, out);
              if (topk) {
                r.composite = TopK{20};
              } else if (n > 1) {
                r.algorithm = algorithm;
              }
              run(comm, r);
            };
            if (comm.rank() == n - 1) x[2999] = wrong;
            reduce();
            CHECK(!std::isfinite(out[2999]));
            CHECK(owed(residuals) == before);
            residuals.take_back();
            CHECK(owed(residuals) == before);
            x[2999] = 1;
            reduce();
            CHECK(owed(residuals) != before);
            residuals.take_back();
            CHECK(owed(residuals) == before);
            residuals.take_back();
            CHECK(owed(residuals) == before);
          }
        }
      }
    });
  }
}

// Calls that are counted have the communicator's number, one for each run, and the others that of their
// caller; a call that is bound once is run again under another step.
TEST(a_bound_call_is_run_again_in_another_step) {
  const int64_t count = 5000;
  run_threads(2, [&](Communicator& comm) {
    Patience patience;
    const Floats x = noise(count, comm.rank());
    const Codec codec{.kind = CodecKind::int8, .rounding = Rounding::stochastic};
    for (const bool shared : {false, true}) {
      Floats out(count), expected(count);
      const auto bind = [&](const Coding& coding, Floats& to) {
        Request r = request(comm, Collective::all_reduce, coding, x, to);
        if (shared) r.composite = SharedInt{16};
        return comm.bind(r);
      };
      Bound fixed = bind({.codec = codec, .step = 4}, expected);
      Bound counted = bind({.codec = codec, .counted = true}, out);
      for (int i = 0; i < 3; ++i) {
        const uint32_t step = comm.codec_step();
        comm.run(counted, patience);
        CHECK_EQ(comm.codec_step(), step + 1);
        fixed.set_step(step);
        const uint64_t fingerprint = fixed.record.fingerprint;
        comm.run(fixed, patience);
        CHECK(out == expected);
        fixed.set_step(step + 1);
        CHECK(fixed.record.fingerprint != fingerprint);
        fixed.set_step(step);
        CHECK_EQ(fixed.record.fingerprint, fingerprint);
      }
    }
  });
}

// Ranks that mean different things are told both, whichever part of the call they are in.
TEST(different_codecs_are_a_mismatch) {
  struct Case {
    std::function<Bound(Communicator&, Floats&, bool)> bind;  // true on rank 1
    std::vector<std::string> words;
  };
  const auto coded = [](Communicator& comm, Floats& x, const Codec& codec, uint32_t step) {
    return comm.bind(request(comm, Collective::all_reduce, {.codec = codec, .step = step}, x, x));
  };
  const Case cases[] = {
      {[&](Communicator& c, Floats& x, bool other) {
         return coded(c, x, {.kind = other ? CodecKind::int8 : CodecKind::int4}, 0);
       },
       {"codec=int8, step=0", "codec=int4, step=0"}},
      {[&](Communicator& c, Floats& x, bool other) { return coded(c, x, {.kind = CodecKind::int8}, other); },
       {"step=0", "step=1"}},
      {[&](Communicator& c, Floats& x, bool other) {
         return coded(c, x, {.kind = CodecKind::int8, .seed = other ? 5U : 6U}, 0);
       },
       {"seed=5", "seed=6"}},
      {[&](Communicator& c, Floats& x, bool other) {
         if (other) return coded(c, x, {.kind = CodecKind::bf16}, 0);
         Request plain = request(c, Collective::all_reduce, {}, x, x);
         plain.coding = nullptr;
         return c.bind(plain);
       },
       {"codec=bf16", "op=sum, algorithm"}},
      {[&](Communicator& c, Floats& x, bool other) {
         Request r = request(c, Collective::all_reduce, {}, x, x);
         r.composite = TopK{other ? 10 : 11};
         return c.bind(r);
       },
       {"all_reduce(count=5000, dtype=float32", "topk(10)", "topk(11)"}},
      {[&](Communicator& c, Floats& x, bool other) {
         Request r = request(c, Collective::all_reduce, {.step = other}, x, x);
         r.composite = SharedInt{8};
         return c.bind(r);
       },
       {"shared_int(8), step=0", "shared_int(8), step=1"}},
  };
  for (const Case& wrong : cases) {
    for (const bool queued : {false, true}) {
      // They outlive the threads, since ThreadSanitizer does not see the counter that guards an error which
      // two threads hold.
      std::array<std::shared_ptr<Work>, 2> works;
      run_threads(2, [&](Communicator& comm) {
        Patience patience;
        Floats x = noise(5000, 0);
        try {
          Bound bound = wrong.bind(comm, x, comm.rank() == 1);
          if (queued) {
            works[comm.rank()] = comm.submit(bound);
            works[comm.rank()]->wait(INFINITY, patience);
          } else {
            comm.run(bound, patience);
          }
          check::fail(__FILE__, __LINE__, "no mismatch: " + wrong.words[0]);
        } catch (const MismatchError& error) {
          for (const std::string& word : wrong.words) {
            if (std::string(error.what()).find(word) == std::string::npos)
              check::fail(__FILE__, __LINE__, "no \"" + word + "\" in: " + error.what());
          }
        }
      });
    }
  }
}
