"""Collectives with codecs: the bounds of docs/codecs.md, the same bits everywhere, errors."""

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference_codecs as reference
from codec_data import COUNT, F32, everyone_has_the_same, gaussian, mean, without_feedback

import pycomm
from pycomm import Bucket, Communicator, codecs
from pycomm.codecs.kinds import DEFAULTS

Ranks = Callable[..., list[Any]]

pytestmark = pytest.mark.links

# Codec -> vNMSE of one encode, of two_shot on 2 and 8 ranks, of ring on 8. Tests allow 1.15 times that.
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
NAMES = [*DEFAULTS]


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
    """Values, roundings and random bits agree within the rounding of a float32 sum."""

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
    """Codecs with small errors give the sum; all ranks hold the same bits."""

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
        # Each rank may be off by amax over the number of levels, or by the least normal number.
        limit = (2 ** (width - 1) - 1) // comm.size
        place = max(max(np.abs(x).max() for x in xs) / limit, 1.2e-38)
        assert np.abs(got - exact).max() <= comm.size * place + 1e-6 * np.abs(exact).max()

    pycomm.run_local(fn, 2)


def test_wrong_arguments_move_nothing(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = gaussian(comm.rank, 100)
        feedback = codecs.ErrorFeedback()
        reduce = comm.all_reduce
        wrong = [
            (TypeError, "carries sum, avg.*max", lambda: reduce(x, op="max", codec="int8")),
            (TypeError, "premul_sum", lambda: reduce(x, op=pycomm.premul_sum(0.5), codec="sign", tag="w")),
            (TypeError, "int32", lambda: reduce(x.astype(np.int32), codec="int8")),
            (TypeError, "float64", lambda: reduce(x.astype(np.float64), codec="bf16")),
            (TypeError, r"x\[1\]` is int32: codecs", lambda: reduce([x, x.astype(np.int32)], codec="bf16")),
            (ValueError, "'int7'.*fp16.*topk", lambda: reduce(x, codec="int7")),
            (TypeError, "`codec` is 8", lambda: reduce(x, codec=8)),
            (TypeError, "step", lambda: reduce(x, step=3)),
            (ValueError, "`step` is -1", lambda: reduce(x, codec="int8", step=-1)),
            (ValueError, "`step` is 4294967296", lambda: reduce(x, codec="topk", tag="w", step=1 << 32)),
            (TypeError, "`step` is 1.5: pass an integer", lambda: reduce(x, codec="int8", step=1.5)),
            (TypeError, "takes no codec: all_reduce", lambda: comm.reduce(x, codec="int8")),
            (TypeError, "`counts` is a int", lambda: comm.reduce_scatter(x, codec="int8", counts=3)),
            (TypeError, r"`tag` is \['a'\]", lambda: reduce(x, codec="sign", tag=["a"])),
            (TypeError, "`x` is a str", lambda: reduce("a", codec="topk", tag="w")),
            (TypeError, "`op` is a numpy.ndarray", lambda: reduce(x, codec="int8", op=np.array([1, 2]))),
            (ValueError, "stream", lambda: reduce(x, codec="int8", stream=1)),
            (ValueError, "two_shot", lambda: reduce(x, codec="int8", algorithm="recursive_doubling")),
            (
                ValueError,
                'algorithm="ring".*topk',
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
            "of 'w' is not a 1-D",
            lambda: codecs.ErrorFeedback().load_state_dict({"w": [[1.0]]}),
        ),
        (ValueError, "of 'w' is not a 1-D", lambda: codecs.ErrorFeedback().load_state_dict([{"w": "x"}])),
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
