"""The native calls with codecs, under pycomm.codecs: what they return, count, keep alive and refuse."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pycomm
from pycomm import Communicator, _native

Ranks = Callable[..., list[Any]]

pytestmark = pytest.mark.links
INT8 = _native.Codec("int8")


def noise(comm: Communicator, count: int = 5000, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(comm.rank).standard_normal(count).astype(dtype)


def roundtrip(codec: _native.Codec, x: np.ndarray, **encoding: Any) -> np.ndarray:
    decoded = np.empty_like(x)
    _native.decode(codec, _native.encode(codec, x, **encoding), decoded)
    return decoded


# one_shot is the sum of what every rank's encode leaves, so the result is known to the bit.
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_reduce_sums_what_encodes_leave(ranks: Ranks, dtype: str) -> None:
    def fn(comm: Communicator) -> None:
        codec = _native.Codec("int8", rounding="stochastic", seed=9)
        x = noise(comm, dtype=dtype)
        total = sum(
            roundtrip(
                codec,
                np.random.default_rng(r).standard_normal(5000).astype(dtype).astype("float32"),
                rank=r,
                step=4,
            )
            for r in range(2)
        )
        assert isinstance(total, np.ndarray)
        y = np.empty_like(x)
        assert _native.run_codec(comm, "all_reduce", x, codec, out=y, algorithm="one_shot", step=4) is y
        assert y.tobytes() == total.astype(dtype).tobytes()
        halved = _native.run_codec(
            comm, "all_reduce", x, codec, out=y, op="avg", algorithm="one_shot", step=4, async_op=True
        ).wait()
        assert halved.tobytes() == (total / 2).astype(dtype).tobytes()

    ranks(fn, 2)


def test_blocks(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = noise(comm, 3000)
        gathered = _native.run_codec(comm, "all_gather", x, INT8)
        others = [np.random.default_rng(r).standard_normal(3000).astype("float32") for r in range(3)]
        assert gathered.tobytes() == b"".join(roundtrip(INT8, other).tobytes() for other in others)
        counts = [100, 0, 2900]
        part = _native.run_codec(comm, "reduce_scatter", x, INT8, counts=counts)
        assert part.shape == (counts[comm.rank],)
        begin = sum(counts[: comm.rank])
        exact = sum(others)[begin : begin + counts[comm.rank]]
        assert np.allclose(part, exact, atol=0.08)

    ranks(fn, 3)


def test_steps_are_counted_where_none_is_given() -> None:
    def fn(comm: Communicator) -> None:
        x = noise(comm)
        assert comm.codec_step == 0
        _native.run_codec(comm, "all_reduce", x, INT8)
        _native.run_codec(comm, "all_reduce", x, INT8, step=40)
        with pytest.raises(ValueError):
            _native.run_codec(comm, "all_reduce", x, INT8, algorithm="recursive_doubling")
        _native.run_codec(comm, "all_reduce", x, INT8, async_op=True).wait()
        assert comm.codec_step == 2
        comm.all_reduce(x)
        assert comm.codec_step == 2

    pycomm.run_local(fn, 2)


def test_work_keeps_residuals_alive(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = noise(comm, 200_000)
        works = []
        for _ in range(5):
            e = np.zeros(200_000, np.float32)
            works.append(
                _native.run_codec(
                    comm,
                    "all_reduce",
                    x,
                    INT8,
                    out=np.empty_like(x),
                    residual=e,
                    next_residual=e,
                    async_op=True,
                )
            )
            del e
            gc.collect()
        results = [work.wait() for work in works]
        assert all(result.tobytes() == results[0].tobytes() for result in results)

    ranks(fn, 2)


def test_refused_before_anything_moves(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = noise(comm)
        e = np.zeros(5000, np.float32)
        for error, words, call in (
            (TypeError, "float64", lambda: _native.run_codec(comm, "all_reduce", x.astype("float64"), INT8)),
            (TypeError, "int32", lambda: _native.run_topk(comm, x.astype("int32"), 5)),
            (TypeError, "op is max", lambda: _native.run_codec(comm, "all_reduce", x, INT8, op="max")),
            (
                ValueError,
                "two_shot, ring",
                lambda: _native.run_codec(comm, "all_reduce", x, INT8, algorithm="recursive_doubling"),
            ),
            (ValueError, "takes no codec", lambda: _native.run_codec(comm, "broadcast", x, INT8)),
            (
                ValueError,
                "4999 elements",
                lambda: _native.run_codec(comm, "all_reduce", x, INT8, residual=e[1:], next_residual=e[1:]),
            ),
            (ValueError, "go together", lambda: _native.run_codec(comm, "all_reduce", x, INT8, residual=e)),
            (
                ValueError,
                "multiple of 256",
                lambda: _native.run_codec(comm, "all_reduce", x, INT8, segments=[(5, 9, 0)]),
            ),
            (ValueError, "one element at least", lambda: _native.run_topk(comm, x, 0)),
            (ValueError, "8, 16 or 32", lambda: _native.run_shared_int(comm, x, 4)),
            (TypeError, "codec=", lambda: comm.all_reduce(x, step=3)),
        ):
            if comm.rank == 1:  # on one rank alone
                with pytest.raises(error, match=words):
                    call()
        comm.all_reduce(x)  # and the group goes on

    ranks(fn, 2)


def test_different_codecs_are_a_mismatch(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> str:
        codec = _native.Codec("bf16") if comm.rank else INT8
        with pytest.raises(pycomm.MismatchError) as raised:
            _native.run_codec(comm, "all_reduce", noise(comm), codec, step=3)
        return str(raised.value)

    for text in ranks(fn, 2):
        assert "codec=int8, step=3" in text and "codec=bf16, step=3" in text


def test_algorithms_of_ones_own_carry_codecs_if_they_can() -> None:
    def write(b: Any, world: Any) -> None:
        if b.rank == 0:
            every = range(world.size)
            b.combine([b.out(rank=r) for r in every], [b.in_(rank=r) for r in every], final=True)
            return
        for ref in (b.in_(), b.out()):
            b.offer(0, ref)
        for ref in (b.in_(), b.out()):
            b.accept(0, ref)

    pycomm.Algorithm("star_for_codecs", "all_reduce", write)

    def fn(comm: Communicator) -> bytes:
        y = _native.run_codec(comm, "all_reduce", noise(comm, 200_000), INT8, algorithm="star_for_codecs")
        return y.tobytes()

    first, *others = pycomm.run_local(fn, 3)
    assert all(other == first for other in others)
