"""Collectives with codecs: the bounds of docs/codecs.md, the same bits everywhere, residuals, errors."""

import gc
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference_codecs as reference

import pycomm
from pycomm import Bucket, Communicator, codecs
from pycomm.codecs import calls
from pycomm.codecs.kinds import DEFAULTS

Ranks = Callable[..., list[Any]]
Array = np.ndarray[Any, Any]
F32 = np.float32
COUNT = 1 << 17

# Codec -> vNMSE of one encode, of two_shot on 2 and 8 ranks, of ring on 8. A test holds to 1.15 times that.
BOUNDS: dict[Any, tuple[float, float, float]] = {
    codecs.BF16(rounding="nearest"): (2.8e-6, 6e-6, 1.2e-5),
    codecs.BF16(): (5.5e-6, 1.1e-5, 2.5e-5),
    codecs.FP8E4M3(rounding="nearest"): (6.8e-4, 1.4e-3, 3.1e-3),
    codecs.FP8E4M3(): (1.4e-3, 2.7e-3, 6.2e-3),
    codecs.FP8E5M2(rounding="nearest"): (2.7e-3, 5.4e-3, 1.2e-2),
    codecs.FP8E5M2(): (5.4e-3, 1.1e-2, 2.5e-2),
    codecs.MXFP8(rounding="nearest"): (8.6e-4, 1.8e-3, 4.1e-3),
    codecs.MXFP8(rounding="nearest", scale="ceil"): (7.0e-4, 1.5e-3, 3.2e-3),
    codecs.Int8(rounding="nearest"): (4.2e-5, 8.4e-5, 1.9e-4),
    codecs.Int8(): (8.4e-5, 1.7e-4, 3.7e-4),
    codecs.Int4(rounding="nearest"): (9.4e-3, 1.9e-2, 4.3e-2),
    codecs.Int4(): (1.9e-2, 3.8e-2, 8.7e-2),
    codecs.Sign(error_feedback=False): (0.36, 0.65, 0.68),
}
NAMES = ["fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "mxfp8", "int8", "int4", "shared_int", "sign", "topk"]


def gaussian(rank: int, count: int = COUNT, dtype: Any = F32) -> Array:
    return np.random.default_rng([rank, count]).standard_normal(count).astype(dtype)


def mean(size: int, count: int = COUNT) -> Array:
    return np.mean([gaussian(rank, count).astype(np.float64) for rank in range(size)], axis=0)


def without_feedback(name: str) -> Any:
    kinds = {"sign": codecs.Sign(error_feedback=False), "topk": codecs.TopK(error_feedback=False)}
    return kinds.get(name, name)


def everyone_has_the_same(comm: Communicator, x: Any, *context: object) -> None:
    mine = np.ascontiguousarray(x).view(np.uint8).ravel()
    everyones = comm.all_gather(mine).reshape(comm.size, -1)
    assert (everyones == everyones[0]).all(), context


@pytest.mark.parametrize("route", ["two_shot 2", "two_shot 8", "ring 8"])
def test_bounds(route: str) -> None:
    algorithm, size = route.split()

    def fn(comm: Communicator) -> None:
        exact = mean(comm.size)
        for codec, (_, two_shot, ring) in BOUNDS.items():
            got = comm.all_reduce(gaussian(comm.rank), op="avg", codec=codec, algorithm=algorithm)
            bound = 1.15 * (ring if algorithm == "ring" else two_shot)
            assert reference.vnmse(got, exact) <= bound, (codec, route)
            everyone_has_the_same(comm, got, codec, route)

    pycomm.run_local(fn, int(size))


@pytest.mark.parametrize("codec", BOUNDS, ids=repr)
def test_bounds_of_one_encode(codec: Any) -> None:
    from pycomm import _native

    x, got = gaussian(0), np.empty(COUNT, F32)
    native = codec.native()
    _native.decode(native, _native.encode(native, x), got)
    assert reference.vnmse(got, x) <= 1.15 * BOUNDS[codec][0]


@pytest.mark.parametrize("size", [2, 3])
def test_two_shot_is_what_the_reference_makes_of_it(ranks: Ranks, size: int) -> None:
    """Values, roundings and random bits: within the rounding of a float32 sum."""

    def fn(comm: Communicator) -> None:
        count = 5000
        for name in reference.KINDS[:-1]:
            for rounding in ("nearest", "stochastic"):
                kind = reference.Codec(name, rounding, seed=3)
                xs = [gaussian(rank, count) for rank in range(size)]
                want = reference.two_shot(kind, xs, step=11)
                codec = type(DEFAULTS[name])(rounding=rounding, seed=3)
                got = comm.all_reduce(
                    xs[comm.rank].copy(), op="avg", codec=codec, step=11, algorithm="two_shot"
                )
                assert (np.abs(got - want) > 1e-6).mean() < 1e-3, (name, rounding)

    ranks(fn, size)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_collectives_types_and_lengths(ranks: Ranks, size: int) -> None:
    """Codecs that hardly lose anything give the sum; all ranks hold the same bits."""

    def fn(comm: Communicator) -> None:
        for name in NAMES:
            codec = without_feedback(name)
            for count in (0, 1, 1003, 40_000):
                for dtype in (F32, np.float16, ml_dtypes.bfloat16):
                    x = gaussian(comm.rank, count, dtype)
                    xs = [gaussian(rank, count, dtype).astype(F32) for rank in range(size)]
                    total = np.sum(xs, axis=0, dtype=F32)
                    out = np.empty_like(x)
                    assert comm.all_reduce(x, out=out, codec=codec) is out
                    everyone_has_the_same(comm, out, name, count)
                    if name in ("fp16", "bf16", "int8") and count:
                        assert np.abs(out.astype(F32) - total).max() < 0.2, (name, count, dtype)
                    if name in ("shared_int", "topk"):
                        continue
                    got = comm.all_gather(x, codec=codec)
                    everyone_has_the_same(comm, got, name, count)
                    if name in ("fp16", "bf16", "int8") and count:
                        assert np.abs(got.astype(F32) - np.concatenate(xs)).max() < 0.1
                    rows = count // size * size
                    part = comm.reduce_scatter(x[:rows], codec=codec)
                    mine = slice(comm.rank * rows // size, (comm.rank + 1) * rows // size)
                    if name in ("fp16", "bf16", "int8") and count:
                        assert np.abs(part.astype(F32) - total[mine]).max(initial=0) < 0.2

    ranks(fn, size)


def test_a_call_repeated_and_steps(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = gaussian(comm.rank, 3000)
        for name in NAMES:
            codec = without_feedback(name)
            first, again, other = (
                comm.all_reduce(x, out=np.empty_like(x), codec=codec, step=step) for step in (5, 5, 6)
            )
            assert (first == again).all(), name
            assert (first != other).any() == (name not in ("sign", "topk")), name
        before = comm.codec_step
        one, two = (comm.all_reduce(x, out=np.empty_like(x), codec="int8") for _ in range(2))
        assert comm.codec_step == before + 2
        assert (one != two).any()
        same = comm.all_reduce(x, out=np.empty_like(x), codec="int8", step=before)
        assert (same == one).all()
        # A sum of integers does not depend on the algorithm.
        exact = [
            comm.all_reduce(x, out=np.empty_like(x), codec="shared_int", step=1, algorithm=algorithm)
            for algorithm in ("ring", "two_shot", "recursive_doubling", None)
        ]
        assert all((each == exact[0]).all() for each in exact)

    ranks(fn, 3)


def test_shared_int_is_exact(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        for width in (8, 16, 32):
            for count in (1, 127, 5000):
                xs = [gaussian(rank, count) for rank in range(comm.size)]
                xs[0][count // 2] *= 100
                for op, divisor in (("sum", 1), ("avg", comm.size)):
                    codec = codecs.SharedInt(width=width, seed=4)
                    got = comm.all_reduce(xs[comm.rank].copy(), op=op, codec=codec, step=2)
                    want = reference.shared_int(xs, width, 4, 2, divisor=divisor)
                    assert (got == want).all(), (width, count, op)
        x = gaussian(comm.rank, 300)
        x[5] = np.nan if comm.rank == 1 else x[5]
        got = comm.all_reduce(x, codec="shared_int")
        assert np.isnan(got[:128]).all() and np.isfinite(got[128:]).all()

    ranks(fn, 3)


def test_topk_sums_what_each_rank_keeps(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        xs = [gaussian(rank, 4099) for rank in range(comm.size)]
        for codec, k in (
            (codecs.TopK(k=7, error_feedback=False), 7),
            (codecs.TopK(ratio=0.1, error_feedback=False), 410),
        ):
            want = np.zeros(4099, F32)
            for x in xs:
                chosen = reference.topk(x, k)
                want[chosen] += x[chosen]
            got = comm.all_reduce(xs[comm.rank].copy(), codec=codec)
            assert (got == want).all()
            got = comm.all_reduce(xs[comm.rank].copy(), op="avg", codec=codec)
            np.testing.assert_array_max_ulp(got, want / F32(comm.size), 1)

    ranks(fn, 3)


def drift(
    comm: Communicator, codec: Any, steps: int, algorithm: str | None = None, count: int = 4096
) -> float:
    """|sum of the results - sum of the exact averages| / |the latter| after so many steps."""
    got, exact = np.zeros(count), np.zeros(count)
    bias = np.random.default_rng(99).standard_normal(count)  # gradients of a step are alike
    for step in range(steps):
        rng = np.random.default_rng(step)
        xs = [(bias + rng.standard_normal(count)).astype(F32) for _ in range(comm.size)]
        exact += np.mean(xs, axis=0, dtype=np.float64)
        got += comm.all_reduce(xs[comm.rank], op="avg", codec=codec, algorithm=algorithm, tag="w")
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        (codecs.FP8E4M3, 4e-3),
        (codecs.FP8E5M2, 4e-3),
        (codecs.MXFP8, 4e-3),
        (codecs.Int8, 4e-3),
        (codecs.Int4, 4e-3),
    ],
)
def test_error_feedback_keeps_the_drift_small(kind: Any, limit: float) -> None:
    """A sum of 300 steps; without feedback, nearest rounding drifts further."""

    def fn(comm: Communicator) -> None:
        for algorithm in ("two_shot", "ring"):
            fed = drift(comm, kind(error_feedback=codecs.ErrorFeedback()), 300, algorithm)
            assert fed <= limit, (kind, algorithm, fed)
        plain = drift(comm, kind(rounding="nearest"), 300)
        assert plain > 1.5 * fed

    pycomm.run_local(fn, 2)


@pytest.mark.parametrize("name", ["sign", "topk"])
def test_what_needs_feedback_has_it(ranks: Ranks, name: str) -> None:
    def fn(comm: Communicator) -> None:
        x = gaussian(comm.rank, 1000)
        for call in (
            lambda: comm.all_reduce(x, codec=name),
            lambda: comm.all_reduce([x, x.copy()], codec=name, async_op=True),
        ):
            with pytest.raises(ValueError, match=rf"{name}.*tag=.*error_feedback=False"):
                call()
        fed = drift(comm, name, 100)
        plain = drift(comm, without_feedback(name), 100)
        assert fed < plain / 2

    ranks(fn, 2)


def test_residuals_that_nobody_keeps_go_with_the_communicator() -> None:
    def fn(comm: Communicator) -> None:
        comm.all_reduce(gaussian(comm.rank, 100), codec="sign", tag="w")
        comm.all_reduce(gaussian(comm.rank, 100), codec=codecs.Sign(), tag="w")
        assert list(calls._kept[comm].state_dict()) == ["w"]

    before = len(calls._kept)
    pycomm.run_local(fn, 2)
    gc.collect()
    assert len(calls._kept) <= before


def test_residuals_are_what_was_not_sent(ranks: Ranks) -> None:
    """The mean over ranks of what they owe is the difference between the exact average and the result."""

    def fn(comm: Communicator) -> None:
        for algorithm in ("two_shot", "ring"):
            for scale in (1.0, 1024.0):
                feedback = codecs.ErrorFeedback()
                feedback.scale = scale
                codec = codecs.Int4(error_feedback=feedback)
                owed = np.zeros(4096)
                for step in range(3):
                    xs = [gaussian(10 * step + rank, 4096) for rank in range(comm.size)]
                    x = xs[comm.rank] * F32(scale)
                    got = comm.all_reduce(x, op="avg", codec=codec, tag="w", algorithm=algorithm)
                    owed += np.mean(xs, axis=0, dtype=np.float64) - got / scale
                    mine = feedback.state_dict()["w"]
                    residuals = comm.all_gather(mine).reshape(comm.size, -1)
                    np.testing.assert_allclose(residuals.mean(axis=0), owed, atol=3e-6)

    ranks(fn, 4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter", "all_gather"])
def test_what_is_owed_arrives_wherever_it_is_encoded(collective: str, size: int, dtype: str) -> None:
    """A world of one, and a rank's own block of a reduce_scatter, encode nothing: there it is added."""

    def fn(comm: Communicator) -> None:
        count = 512 * size
        owed = [gaussian(100 + rank, count) for rank in range(size)]
        feedback = codecs.ErrorFeedback()
        feedback.load_state_dict({"w": owed[comm.rank]})
        feedback.scale = 4.0
        codec = codecs.Int8(error_feedback=feedback)
        total = np.zeros(count * (size if collective == "all_gather" else 1))
        calls_made = 5
        for step in range(calls_made):
            x = gaussian(10 * step + comm.rank, count).astype(dtype)
            operator = {} if collective == "all_gather" else {"op": "avg"}
            got = getattr(comm, collective)(x, codec=codec, tag="w", **operator)
            begin = comm.rank * 512 if collective == "reduce_scatter" else 0
            total[begin : begin + got.size] += got
        kept = comm.all_gather(feedback.state_dict()["w"]).reshape(size, count)
        before = np.stack(owed)
        given = np.array(
            [
                sum(gaussian(10 * step + rank, count).astype(dtype).astype(np.float64) for step in range(5))
                for rank in range(size)
            ]
        )
        want = given + 4.0 * (before - kept.astype(np.float64))
        want = want.ravel() if collective == "all_gather" else want.mean(axis=0)
        mine = (
            slice(comm.rank * 512, comm.rank * 512 + 512) if collective == "reduce_scatter" else slice(None)
        )
        # float16 results of calls that encode are rounded once more, which nobody keeps.
        atol = 3e-5 if dtype == "float32" else calls_made * 4 * 2.0**-11 * 4
        np.testing.assert_allclose(total[mine], want[mine], atol=atol)

    pycomm.run_local(fn, size)


def test_steps_that_do_not_count_leave_residuals_alone(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        feedback = codecs.ErrorFeedback()
        codec = codecs.Int4(error_feedback=feedback)

        def step(number: int, **options: Any) -> Array:
            x = gaussian(10 * number + comm.rank, 500)
            if options.pop("broken", False) and comm.rank == 1:
                x[3] = np.inf
            other = comm.all_reduce(gaussian(comm.rank, 300), codec=codec, tag="other", **options)
            got = comm.all_reduce(x, codec=codec, tag="w", **options)
            if options:
                other.wait()
                got = got.wait()
            return got.copy()

        def state() -> dict[str, Array]:
            return feedback.state_dict()

        step(0)
        first = state()
        assert np.abs(first["w"]).max() > 0
        assert np.isnan(step(1, broken=True)).any()
        assert (state()["w"] == first["w"]).all() and (state()["other"] != first["other"]).any()
        feedback.skip()  # the whole step, of which one call was finite
        assert all((state()[name] == first[name]).all() for name in first)
        feedback.skip()
        assert all((state()[name] == first[name]).all() for name in first)
        got = step(2)
        second = state()
        feedback.skip()
        assert (step(2) == got).all()
        assert all((state()[name] == second[name]).all() for name in first)
        feedback.skip()
        assert (step(2, async_op=True) == got).all()
        assert all((state()[name] == second[name]).all() for name in first)

    ranks(fn, 2)


def test_asynchronous_calls_that_nobody_waits_for(ranks: Ranks) -> None:
    """The next call about the same parameters comes after them, residuals and all."""

    def fn(comm: Communicator) -> None:
        def last(async_op: bool) -> Array:
            codec = codecs.Int4(error_feedback=codecs.ErrorFeedback())
            kept = []
            for step in range(5):
                x = gaussian(10 * step + comm.rank, 3000)
                kept.append(comm.all_reduce(x, codec=codec, tag="w", async_op=async_op))
            work = kept[-1]
            if not async_op:
                return work
            assert work.exception() is None
            result = work.result()
            assert work.is_completed() and work.wait(5) is result
            return result

        assert (last(True) == last(False)).all()

    ranks(fn, 2)


def test_buckets_and_lists(ranks: Ranks) -> None:
    shapes = {"embed": (50, 20), "b": (33,), "W": (64, 48), "g": (1,), "empty": (0, 3)}

    def tensors(rank: int) -> list[Array]:
        return [gaussian(rank + 100 * i, int(np.prod(s))).reshape(s) for i, s in enumerate(shapes.values())]

    def fn(comm: Communicator) -> None:
        means = [
            np.mean([tensors(rank)[i] for rank in range(comm.size)], axis=0, dtype=np.float64)
            for i in range(len(shapes))
        ]
        kinds: list[Any] = [codecs.Int8(), codecs.Int8(error_feedback=codecs.ErrorFeedback())]
        kinds += ["sign", "topk", "shared_int"]
        for codec in kinds:
            mine = tensors(comm.rank)
            bucket = Bucket(mine, names=shapes)
            bucket.pack()
            comm.all_reduce(bucket, op="avg", codec=codec, step=3)
            everyone_has_the_same(comm, bucket.data, codec)
            feeds = codec not in ("shared_int", codecs.Int8())
            for (name, shape), view, want in zip(shapes.items(), bucket.views, means, strict=True):
                exempt = feeds and len(shape) < 2
                if exempt:  # uncompressed
                    np.testing.assert_allclose(view, want, rtol=1e-6, atol=1e-7, err_msg=name)
                elif codec in kinds[:2]:
                    np.testing.assert_allclose(view, want, atol=0.05, err_msg=name)
            for async_op in (False, True):
                again = tensors(comm.rank)
                outs = [np.empty_like(x) for x in again]
                tag = f"list {async_op}"
                got = comm.all_reduce(again, out=outs, op="avg", codec=codec, tag=tag, async_op=async_op)
                assert (got.wait() if async_op else got) is outs
                for x, old in zip(again, tensors(comm.rank), strict=True):
                    assert (x == old).all()
                if feeds:
                    np.testing.assert_allclose(outs[1], means[1], rtol=1e-6, atol=1e-7)
                if codec in kinds[:2]:
                    np.testing.assert_allclose(outs[2], means[2], atol=0.05)
        state = kinds[1].error_feedback.state_dict()
        assert {"embed", "W", "empty"} <= set(state) and not {"b", "g"} & set(state)
        assert comm.all_reduce([], codec="int8") == []

    ranks(fn, 2)


def test_what_is_exempt_is_not_among_the_largest(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        names = ["b", "W"]
        x = [np.full(10, 1e6, F32), gaussian(comm.rank, 600).reshape(20, 30)]
        wide = [gaussian(rank, 600) for rank in range(comm.size)]
        want = np.zeros(600, F32)
        for each in wide:
            chosen = reference.topk(each, 5)
            want[chosen] += each[chosen]
        for apart in (False, True):
            codec = codecs.TopK(k=5, error_feedback=codecs.ErrorFeedback())
            bucket, out = Bucket(x, names=names), Bucket(x, names=names)
            bucket.pack()
            before = bucket.data.copy()
            got = comm.all_reduce(bucket, out=out if apart else None, codec=codec)
            assert got is (out if apart else bucket)
            assert (bucket.data == before).all() == apart
            assert (got.views[0] == 1e6 * comm.size).all()
            assert (got.views[1].ravel() == want).all()

    ranks(fn, 2)


def test_residuals_go_with_the_parameter_and_not_with_the_bucket(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        shapes = {"a": (20, 30), "b": (7, 9), "c": (40, 40)}
        feedback = codecs.ErrorFeedback()
        codec = codecs.Int4(error_feedback=feedback)

        def reduce(*names: str) -> None:
            bucket = Bucket(
                [gaussian(comm.rank, int(np.prod(shapes[n]))).reshape(shapes[n]) for n in names], names=names
            )
            bucket.pack()
            comm.all_reduce(bucket, codec=codec)

        reduce("a", "b", "c")
        first = feedback.state_dict()
        other = codecs.ErrorFeedback()
        other.load_state_dict(first)
        reduce("c", "a")
        second = feedback.state_dict()
        assert (second["b"] == first["b"]).all() and (second["c"] != first["c"]).any()
        codec, feedback = codecs.Int4(error_feedback=other), other
        reduce("c", "a")
        assert all((second[name] == other.state_dict()[name]).all() for name in shapes)
        shapes["a"] = (3, 3)
        with pytest.raises(ValueError, match="'a' has 9 elements here, and its residual 600"):
            reduce("a")

    ranks(fn, 2)


def test_buckets_without_names_share_no_residuals(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        feedback = codecs.ErrorFeedback()
        codec = codecs.Int4(error_feedback=feedback)
        buckets = [pycomm.Bucket([np.full((2, 40), k + 1.1, np.float32)]) for k in range(2)]
        for k, bucket in enumerate(buckets):
            bucket.pack()
            with pytest.raises(ValueError, match="pass tag=, or a Bucket with names"):
                comm.all_reduce(bucket, codec=codec)
            comm.all_reduce(bucket, codec=codec, tag=f"layer {k}")
        assert sorted(feedback.state_dict()) == ["layer 0[0]", "layer 1[0]"]

    ranks(fn, 2)


def test_residuals_do_not_depend_on_the_codec_of_the_step(ranks: Ranks) -> None:
    """A schedule of ratios or seeds goes on with what the steps before it have left."""

    def fn(comm: Communicator) -> None:
        g = np.r_[10.0, np.ones(99)].astype(np.float32)
        own, kept = codecs.ErrorFeedback(), np.zeros((2, 100))
        for step in range(20):
            for way, feedback in enumerate((None, own)):
                codec = codecs.TopK(ratio=0.05 + step / 1000, error_feedback=feedback)
                kept[way] += comm.all_reduce(g.copy(), codec=codec, tag="w")
        assert (kept[0] == kept[1]).all() and (kept[0] > 0).all()

    ranks(fn, 2)


def test_what_is_refused_leaves_everything_as_it_was(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        feedback = codecs.ErrorFeedback()
        codec = codecs.Int4(error_feedback=feedback)
        x = np.full((2, 150), 1.37, np.float32)
        x[0, 0] = 1
        shared = np.zeros(700, np.float32)
        frozen = x.copy()
        frozen.flags.writeable = False
        for xs, out, words in (
            ([frozen], None, "read-only"),
            ([x, x.copy()], [shared[:300].reshape(2, 150), shared[100:400].reshape(2, 150)], "overlap"),
            ([x, x.astype(np.float16)], [x, shared[:300]], "out.1.. is not of x's dtype"),
            ([x], [shared[:7]], r"`out\[0\]` has shape \(7,\) where `x\[0\]` has \(2, 150\)"),
            ([x], 3, "`out` is a int"),
        ):
            for asynchronous in (False, True):
                with pytest.raises((ValueError, TypeError), match=words):
                    comm.all_reduce(xs, out=out, codec=codec, tag="t", async_op=asynchronous)
        assert feedback.state_dict() == {} and comm.codec_step == 0

        bucket = Bucket([np.ones((2, 300), np.float32), np.full(5, 3.0, np.float32)], names=["w", "b"])
        bucket.pack()
        for each in (codec, codecs.TopK(error_feedback=feedback)):
            for error, words, options in (
                (ValueError, "nonsense" if each is codec else "topk", {"algorithm": "nonsense"}),
                (ValueError, "`timeout` is -1", {"timeout": -1}),
                (TypeError, "`out` is float16", {"out": np.zeros(1024, np.float16)}),
                (ValueError, "`out` has", {"out": np.zeros(7, np.float32)}),
            ):
                with pytest.raises(error, match=words):
                    comm.all_reduce(bucket, codec=each, **options)
                assert (bucket.views[0] == 1).all() and (bucket.views[1] == 3).all()
        one_dimensional = Bucket([np.ones(300, np.float32)], names=["v"])
        one_dimensional.pack()
        with pytest.raises(ValueError, match="nonsense"):
            comm.all_reduce(one_dimensional, codec=codec, algorithm="nonsense")
        with pytest.raises(TypeError, match="float8_e4m3fn"):
            comm.all_reduce(Bucket([np.ones(3, np.float32)], "float8_e4m3fn", names=["u"]), codec=codec)
        assert feedback.state_dict() == {}

        # A step that was made can be taken back, whatever was refused after it.
        comm.all_reduce(gaussian(comm.rank, 300), codec=codec, tag="q")
        with pytest.raises(ValueError, match="zz"):
            comm.all_reduce(gaussian(comm.rank, 300), codec=codec, tag="q", algorithm="zz")
        with pytest.raises(ValueError, match="zz"):
            comm.all_reduce([gaussian(comm.rank, 300)], codec=codec, tag="q", algorithm="zz")
        assert feedback.state_dict()["q"].any()
        feedback.skip()
        assert not feedback.state_dict()["q"].any()

    ranks(fn, 2)


def test_topk_takes_its_share_of_what_there_is(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        tensors = [gaussian(i, 2).reshape(1, 2) for i in range(100)] + [np.ones(5000, np.float32)]
        bucket = Bucket(tensors, names=[str(i) for i in range(101)])
        bucket.pack()
        comm.all_reduce(bucket, codec=codecs.TopK(ratio=0.1, error_feedback=codecs.ErrorFeedback()))
        assert np.count_nonzero(np.concatenate([view.ravel() for view in bucket.views[:100]])) == 20

    ranks(fn, 2)


@pytest.mark.parametrize("width", [8, 16, 32])
@pytest.mark.parametrize("magnitude", [1e-36, 1e-30, 1e30])
def test_shared_integers_of_any_magnitude(width: int, magnitude: float) -> None:
    def fn(comm: Communicator) -> None:
        xs = [gaussian(rank, 1000) * np.float32(magnitude) for rank in range(comm.size)]
        exact = np.sum(xs, axis=0, dtype=np.float64)
        got = comm.all_reduce(xs[comm.rank].copy(), codec=codecs.SharedInt(width=width)).astype(np.float64)
        # A place of each rank's, as large as amax over the levels, or as the least normal number.
        limit = (2 ** (width - 1) - 1) // comm.size
        place = max(max(np.abs(x).max() for x in xs) / limit, 1.2e-38)
        assert np.abs(got - exact).max() <= comm.size * place + 1e-6 * np.abs(exact).max()

    pycomm.run_local(fn, 2)


@pytest.mark.parametrize("differs", ["feedback", "scale"])
def test_ranks_whose_feedback_differs_do_not_reduce(differs: str) -> None:
    def fn(comm: Communicator) -> None:
        feedback = codecs.ErrorFeedback()
        if differs == "scale":
            feedback.scale = 64 << comm.rank
        keeps = differs == "scale" or comm.rank == 0
        codec = codecs.Int8(rounding="nearest", error_feedback=feedback if keeps else None)
        comm.all_reduce(np.ones(300, np.float32), codec=codec, tag="w")
        comm.barrier()

    with pytest.raises(pycomm.MismatchError, match="error feedback"):
        pycomm.run_local(fn, 2)


def test_resharding_keeps_the_mean() -> None:
    rng = np.random.default_rng(1)
    old = [
        {"w": rng.standard_normal(10).astype(F32), "v": rng.standard_normal(3).astype(F32)} for _ in range(3)
    ]
    feedback = codecs.ErrorFeedback()
    feedback.load_state_dict(old)
    for name, residual in feedback.state_dict().items():
        np.testing.assert_allclose(residual, np.mean([state[name] for state in old], axis=0), rtol=1e-6)
    for wrong in (
        [],
        [old[0], {"w": old[1]["w"]}],
        [old[0], old[1] | {"u": old[0]["w"]}],
        [old[0], old[1] | {"w": old[1]["v"]}],
    ):
        with pytest.raises(ValueError, match="`state`"):
            feedback.load_state_dict(wrong)
    assert set(feedback.state_dict()) == {"w", "v"}


def test_wrong_arguments_move_nothing(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = gaussian(comm.rank, 100)
        feedback = codecs.ErrorFeedback()
        reduce = comm.all_reduce
        wrong = [
            (TypeError, "'max'.*sum.*avg", lambda: reduce(x, op="max", codec="int8")),
            (TypeError, "premul_sum", lambda: reduce(x, op=pycomm.premul_sum(0.5), codec="int8")),
            (TypeError, "int32", lambda: reduce(x.astype(np.int32), codec="int8")),
            (TypeError, "float64", lambda: reduce(x.astype(np.float64), codec="bf16")),
            (TypeError, r"x\[1\]` is int32: codecs", lambda: reduce([x, x.astype(np.int32)], codec="bf16")),
            (ValueError, "'int7'.*fp16.*topk", lambda: reduce(x, codec="int7")),
            (TypeError, "`codec` is 8", lambda: reduce(x, codec=8)),
            (TypeError, "step", lambda: reduce(x, step=3)),
            (ValueError, "`step` is -1", lambda: reduce(x, codec="int8", step=-1)),
            (ValueError, "`step` is 4294967296", lambda: reduce(x, codec="topk", tag="w", step=1 << 32)),
            (TypeError, "`step` is 1.5: pass an integer", lambda: reduce(x, codec="int8", step=1.5)),
            (TypeError, "takes no codec: all_reduce", lambda: comm.broadcast(x, codec="int8")),
            (TypeError, "`counts` is a int", lambda: comm.reduce_scatter(x, codec="int8", counts=3)),
            (TypeError, "`tag` is a list", lambda: reduce(x, codec="sign", tag=["a"])),
            (TypeError, "`x` is a str", lambda: reduce("a", codec="topk", tag="w")),
            (TypeError, "`op` is array", lambda: reduce(x, codec="int8", op=np.array([1, 2]))),
            (ValueError, "stream", lambda: reduce(x, codec="int8", stream=1)),
            (ValueError, "two_shot", lambda: reduce(x, codec="int8", algorithm="recursive_doubling")),
            (
                ValueError,
                "algorithm='ring'.*topk",
                lambda: reduce(x, codec="topk", tag="w", algorithm="ring"),
            ),
            (ValueError, "all_reduce can", lambda: comm.all_gather(x, codec="shared_int")),
            (ValueError, "all_reduce can", lambda: comm.reduce_scatter(x, codec="topk", tag="w")),
            (TypeError, "list", lambda: comm.all_gather([x], codec="int8")),
            (ValueError, "1 buffers for 2", lambda: reduce([x, x.copy()], out=[x], codec="int8")),
        ]
        for error, words, call in wrong:
            with pytest.raises(error, match=words):
                call()
        codec = codecs.Int8(error_feedback=feedback)
        reduce(x, codec=codec, tag="w")
        group = comm.split(0)
        assert group is not None
        with pytest.raises(ValueError, match="another communicator"):
            group.all_reduce(x, codec=codec, tag="w")
        comm.barrier()

    ranks(fn, 2)


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (ValueError, "rounding='up'", lambda: codecs.Int8(rounding="up")),
        (ValueError, "seed=-1", lambda: codecs.Int8(seed=-1)),
        (ValueError, "scale='round'", lambda: codecs.MXFP8(scale="round")),
        (ValueError, "width=4", lambda: codecs.SharedInt(width=4)),
        (ValueError, "ratio=0", lambda: codecs.TopK(ratio=0)),
        (ValueError, "k=0", lambda: codecs.TopK(k=0)),
        (TypeError, "error_feedback='on'", lambda: codecs.Sign(error_feedback="on")),
        (TypeError, "`seed` is 1.5: pass an integer", lambda: codecs.Int8(seed=1.5)),
        (TypeError, "`ratio` is 'a': pass a number", lambda: codecs.TopK(ratio="a")),
        (TypeError, "`k` is 2.5: pass an integer", lambda: codecs.TopK(k=2.5)),
        (TypeError, "`exempt` is 3", lambda: codecs.ErrorFeedback(exempt=3)),
        (ValueError, "empty list", lambda: codecs.ErrorFeedback().load_state_dict([])),
        (TypeError, "holds a int", lambda: codecs.ErrorFeedback().load_state_dict(3)),
        (ValueError, "of 'w' holds NaN", lambda: codecs.ErrorFeedback().load_state_dict({"w": [np.nan]})),
        (
            ValueError,
            "of 'w' is no 1-D",
            lambda: codecs.ErrorFeedback().load_state_dict({"w": [[1.0]]}),
        ),
        (ValueError, "of 'w' is no 1-D", lambda: codecs.ErrorFeedback().load_state_dict([{"w": "x"}])),
        (ValueError, "`scale` is 0.0", lambda: setattr(codecs.ErrorFeedback(), "scale", 0)),
        (ValueError, "`scale` is nan", lambda: setattr(codecs.ErrorFeedback(), "scale", math.nan)),
        (ValueError, "`scale` is 1e\\+39", lambda: setattr(codecs.ErrorFeedback(), "scale", 1e39)),
        (ValueError, "`scale` is inf", lambda: setattr(codecs.ErrorFeedback(), "scale", 10**400)),
        (TypeError, "names are strings", lambda: codecs.ErrorFeedback().load_state_dict({1: [1.0]})),
        (TypeError, "hadamard='x'", lambda: codecs.Int4(hadamard="x")),
        (TypeError, "`scale` is 'a'", lambda: setattr(codecs.ErrorFeedback(), "scale", "a")),
    ],
)
def test_codecs_check_what_they_are_given(error: Any, words: str, make: Callable[[], Any]) -> None:
    with pytest.raises(error, match=words):
        make()


def test_codecs_are_values() -> None:
    assert codecs.Int8(seed=3) == codecs.Int8(seed=3) != codecs.Int8()
    assert len({codecs.Int4(), codecs.Int4(hadamard=True), codecs.Int4()}) == 2
    roundings = [
        codecs.Int8().native().rounding,
        codecs.Int8(error_feedback=codecs.ErrorFeedback()).native().rounding,
        codecs.Int8(error_feedback=codecs.ErrorFeedback(), rounding="stochastic").native().rounding,
    ]
    assert roundings == ["stochastic", "nearest", "stochastic"]
    assert [codecs.TopK().kept(n) for n in (0, 1, 40, 1000)] == [1, 1, 1, 10]
