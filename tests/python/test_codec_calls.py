"""Calls with codecs: their results, and what they count, remember, keep alive and refuse."""

import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import pycomm
from pycomm import Bucket, Communicator, _native, codecs

Ranks = Callable[..., list[Any]]

pytestmark = pytest.mark.links
INT8 = codecs.Int8(rounding="nearest")


def noise(comm: Communicator, count: int = 5000, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(comm.rank).standard_normal(count).astype(dtype)


def roundtrip(codec: codecs.BlockCodec, x: np.ndarray, **encoding: Any) -> np.ndarray:
    decoded, native = np.empty_like(x), codec.native()
    _native.decode(native, _native.encode(native, x, **encoding), decoded)
    return decoded


# one_shot sums the decoded values of every rank, so the result is known to the bit.
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_reduce_sums_what_encodes_leave(ranks: Ranks, dtype: str) -> None:
    def fn(comm: Communicator) -> None:
        codec = codecs.Int8(seed=9)
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
        assert comm.all_reduce(x, codec=codec, out=y, algorithm="one_shot", step=4) is y
        assert y.tobytes() == total.astype(dtype).tobytes()
        halved = comm.all_reduce(
            x, codec=codec, out=y, op="avg", algorithm="one_shot", step=4, async_op=True
        ).wait()
        assert halved.tobytes() == (total / 2).astype(dtype).tobytes()

    ranks(fn, 2)


def test_blocks(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = noise(comm, 3000)
        gathered = comm.all_gather(x, codec=INT8)
        others = [np.random.default_rng(r).standard_normal(3000).astype("float32") for r in range(3)]
        assert gathered.tobytes() == b"".join(roundtrip(INT8, other).tobytes() for other in others)
        counts = [100, 0, 2900]
        part = comm.reduce_scatter(x, codec=INT8, counts=counts)
        assert part.shape == (counts[comm.rank],)
        begin = sum(counts[: comm.rank])
        exact = sum(others)[begin : begin + counts[comm.rank]]
        assert np.allclose(part, exact, atol=0.08)

    ranks(fn, 3)


def test_steps_are_counted_where_none_is_given() -> None:
    def fn(comm: Communicator) -> None:
        x = noise(comm)
        assert comm.codec_step == 0
        comm.all_reduce(x, codec=INT8)
        comm.all_reduce(x, codec=INT8, step=40)
        with pytest.raises(ValueError):
            comm.all_reduce(x, codec=INT8, algorithm="recursive_doubling")
        comm.all_reduce(x, codec=INT8, async_op=True).wait()
        assert comm.codec_step == 2
        comm.all_reduce(x)
        assert comm.codec_step == 2

    pycomm.run_local(fn, 2)


def test_a_call_that_is_remembered_is_the_same_call(ranks: Ranks) -> None:
    """The step of each run, given or counted, decides its random bits; earlier calls do not."""

    def fn(comm: Communicator) -> None:
        codec: Any
        for codec in ("int8", codecs.Int4(seed=3), "shared_int", codecs.TopK(error_feedback=False)):
            x, y = noise(comm), np.empty(5000, np.float32)
            results = []
            for step in (5, 6, 5):
                comm.all_reduce(x, out=y, codec=codec, step=step)
                results.append(y.copy())
            op = comm.all_reduce_init(x, out=y, codec=codec, step=6)
            assert (results[0] == results[2]).all() and op() is y and (results[1] == y).all()
            assert (op() == y).all() and (results[1] == y).all()
            assert (results[0] != results[1]).any() != isinstance(codec, codecs.TopK)
            before = comm.codec_step
            bound = comm.all_reduce_init(x, out=y, codec=codec)
            for call in (bound, partial(comm.all_reduce, x, out=y, codec=codec)):
                for _ in range(3):
                    step = comm.codec_step
                    call()
                    counted = y.copy()
                    comm.all_reduce(x.copy(), out=y, codec=codec, step=step)
                    assert (counted == y).all()
            assert comm.codec_step == before + 6

    ranks(fn, 2)


def test_bound_calls_with_error_feedback(ranks: Ranks) -> None:
    """They add residuals and exempt tensors in the same way as new calls."""

    def fn(comm: Communicator) -> None:
        tensors = [noise(comm, 1000).reshape(10, 100), noise(comm, 7), noise(comm, 600).reshape(3, 200)]
        for kind in (codecs.Int4, codecs.TopK):
            feedbacks = codecs.ErrorFeedback(), codecs.ErrorFeedback()
            bound, anew = (kind(error_feedback=feedback) for feedback in feedbacks)
            one, other = (Bucket(tensors, names=["a", "b", "c"]) for _ in range(2))
            x, z = noise(comm), noise(comm)
            op = comm.all_reduce_init(one, op="avg", codec=bound)
            of_array = comm.all_reduce_init(x, op="avg", codec=bound, tag="array")
            for _ in range(4):
                one.pack()
                other.pack()
                assert op() is one and comm.all_reduce(other, op="avg", codec=anew) is other
                assert (one.data == other.data).all()
                x[:] = z[:] = noise(comm)
                assert of_array() is x
                comm.all_reduce(z, op="avg", codec=anew, tag="array")
                assert (x == z).all()
            states = [feedback.state_dict() for feedback in feedbacks]
            assert list(states[0]) == ["a", "c", "array"] == list(states[1])
            assert all((states[0][name] == states[1][name]).all() for name in states[0])
            for feedback in feedbacks:
                feedback.skip()
                feedback.load_state_dict(states[0])  # in its own memory
            one.pack()
            other.pack()
            assert (op().data == comm.all_reduce(other, op="avg", codec=anew).data).all()
            feedbacks[0].scale = 8.0
            with pytest.raises(ValueError, match="was 1.0.* is 8.0.*: bind it anew"):
                op()

    ranks(fn, 2)


def test_work_keeps_residuals_alive(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = noise(comm, 200_000)
        works = []
        for _ in range(5):
            codec = codecs.Int8(error_feedback=codecs.ErrorFeedback())
            works.append(comm.all_reduce(x, codec=codec, out=np.empty_like(x), tag="w", async_op=True))
            del codec
            gc.collect()
        results = [work.wait() for work in works]
        assert all(result.tobytes() == results[0].tobytes() for result in results)

    ranks(fn, 2)


def test_refused_before_anything_moves(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = noise(comm)
        many: Any = comm  # accepts any arguments
        fed = codecs.Int8(error_feedback=codecs.ErrorFeedback())
        for error, words, call in (
            (TypeError, "float64", lambda: comm.all_reduce(x.astype("float64"), codec=INT8)),
            (TypeError, "int32", lambda: comm.all_reduce(x.astype("int32"), codec="topk", tag="w")),
            (TypeError, r"x\[1\]. is int32", lambda: comm.all_reduce([x, x.astype("int32")], codec=INT8)),
            (TypeError, "op is max", lambda: comm.all_reduce(x, codec=INT8, op="max")),
            (
                TypeError,
                "error_feedback=False",
                lambda: comm.all_reduce(x, codec=fed, tag="w", op=pycomm.premul_sum(0.5)),
            ),
            (
                ValueError,
                "two_shot, ring",
                lambda: comm.all_reduce(x, codec=INT8, algorithm="recursive_doubling"),
            ),
            (TypeError, "takes no codec", lambda: many.reduce(x, codec=INT8)),
            (ValueError, "broadcast cannot carry int8", lambda: many.broadcast(x, codec=INT8)),
            (ValueError, "32 bits", lambda: comm.all_reduce(x, codec=INT8, step=1 << 32)),
            (ValueError, "32 bits", lambda: comm.all_reduce(x, codec=INT8, step=-1)),
            (TypeError, "step.*integer", lambda: many.all_reduce(x, codec=INT8, step="3")),
            (TypeError, "codec=", lambda: comm.all_reduce(x, step=3)),
            (TypeError, "codec=", lambda: many.all_reduce_init(x, step=3)),
            (ValueError, "did you mean 'int8'", lambda: comm.all_reduce_init(x, codec="INT8")),
            (ValueError, "tag=", lambda: comm.all_reduce_init(x, codec=fed)),
        ):
            if comm.rank == 1:  # on only one rank
                with pytest.raises(error, match=words):
                    call()
        assert comm.codec_step == 0 and fed.error_feedback.state_dict() == {}
        comm.all_reduce(x)  # the group stays usable

    ranks(fn, 2)


def test_different_codecs_are_a_mismatch(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> str:
        codec = codecs.BF16(rounding="nearest") if comm.rank else INT8
        with pytest.raises(pycomm.MismatchError) as raised:
            comm.all_reduce(noise(comm), codec=codec, step=3)
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
        y = comm.all_reduce(noise(comm, 200_000), codec=INT8, algorithm="star_for_codecs")
        return y.tobytes()

    first, *others = pycomm.run_local(fn, 3)
    assert all(other == first for other in others)


def test_the_log_of_plans_names_the_codec() -> None:
    script = (
        "import numpy as np, pycomm\n"
        "x = np.ones(100, np.float32)\n"
        "def fn(comm):\n"
        "    for codec in (None, 'bf16', 'int8@wire'): comm.all_reduce(x.copy(), codec=codec)\n"
        "pycomm.run_local(fn, 2, nodes=2)\n"
    )
    environment = {**os.environ, "PYCOMM_DEBUG": "TRACE"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    plans = re.findall(r"TRACE new plan: all_reduce\(count=100, dtype=float32, op=sum(.*), alg", done.stderr)
    assert sorted(plans) == sorted(2 * ["", ", codec=bf16(stochastic)", ", codec=int8@wire(stochastic)"])
