"""A GradientReducer with error feedback: what it has applied and what it still owes are the true averages."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from codec_data import F32, Array

import pycomm
from pycomm import Communicator, GradientReducer
from pycomm.codecs import ErrorFeedback, PowerSGD

Ranks = Callable[..., list[Any]]
SHAPE = (40, 24)


def gradient(step: int, rank: int) -> Array:
    return np.random.default_rng([step, rank]).standard_normal(SHAPE).astype(F32)


def owing(comm: Communicator, codec: str, **options: Any) -> GradientReducer:
    """Of one gradient, with error feedback, which powersgd has by itself."""
    feedback = None if codec == "powersgd" else True
    return GradientReducer([SHAPE], comm, codec=codec, error_feedback=feedback, **options)


def owed(comm: Communicator, reducer: GradientReducer) -> Array:
    """Of gradient "0", by an average over the ranks."""
    assert reducer.error_feedback is not None
    mine = np.asarray(reducer.error_feedback.state_dict()["0"], "d")
    return comm.all_reduce(mine, op="avg").reshape(SHAPE)


@pytest.mark.parametrize("codec", ["sign", "int8", "powersgd"])
@pytest.mark.parametrize("lag", [0, 1])
def test_arrays_that_nobody_uses_get_what_is_owed(ranks: Ranks, codec: str, lag: int) -> None:
    """Their average is theirs: it is paid once, and never owed again."""

    def fn(comm: Communicator) -> None:
        reducer = owing(comm, codec, find_unused=True, lag=lag)
        (array,) = reducer.gradients
        applied, want = np.zeros(SHAPE), np.zeros(SHAPE)
        for step in range(7):
            if step % 3 != 2:
                array[...] = gradient(step, comm.rank)
                reducer.ready(0)
                want += np.mean([gradient(step, rank) for rank in range(comm.size)], axis=0, dtype="d")
            if reducer.finish() is not None:
                applied += array
        for _ in reducer.drain():
            applied += array
        np.testing.assert_allclose(applied + owed(comm, reducer), want, atol=2e-6)

    ranks(fn, 2)


@pytest.mark.parametrize("codec", ["sign", "int8", "powersgd"])
@pytest.mark.parametrize(("as_view", "lag"), [(True, 0), (False, 0), (False, 1)])
def test_what_is_owed_is_paid_once_after_a_rank_has_joined(
    ranks: Ranks, codec: str, as_view: bool, lag: int
) -> None:
    """Gradients count more then, residuals do not."""

    def fn(comm: Communicator) -> None:
        reducer = owing(comm, codec, uneven_inputs=True, gradient_as_bucket_view=as_view, lag=lag)
        (array,) = reducer.gradients
        applied, want = np.zeros(SHAPE), np.zeros(SHAPE)
        for step in range(7):
            active = [rank for rank in range(comm.size) if step < 4 + 3 * rank]
            if active:
                want += np.mean([gradient(step, rank) for rank in active], axis=0, dtype="d")
            if comm.rank in active:
                array[...] = gradient(step, comm.rank)
                reducer.ready(0)
                if reducer.finish() is not None:
                    applied += array
        for stats in reducer.join():
            if stats is not None:
                applied += array
        for _ in reducer.drain():
            applied += array
        np.testing.assert_allclose(applied + owed(comm, reducer), want, atol=2e-6)

    ranks(fn, 2)


@pytest.mark.parametrize("codec", ["int8", "powersgd"])
def test_codecs_of_float8_are_refused_at_once(codec: str) -> None:
    comm = pycomm.init()
    with pytest.raises(TypeError, match="'0' crosses as float8_e4m3fn, which no codec takes"):
        GradientReducer([SHAPE], comm, dtype="float8_e4m3fn", codec=codec)
    comm.close()


@pytest.mark.parametrize("kind", [ErrorFeedback, PowerSGD])
def test_reducers_share_no_residuals(kind: Any) -> None:
    """By name, one would be paid what the other is owed."""

    def reducer(comm: Communicator, name: str) -> GradientReducer:
        codec = {"codec": keeper} if kind is PowerSGD else {"codec": "sign", "error_feedback": keeper}
        return GradientReducer([SHAPE, SHAPE], comm, names=["own " + name, name], **codec)

    keeper = kind()
    comm = pycomm.init()
    first = reducer(comm, "a")
    other = reducer(comm, "b")
    with pytest.raises(ValueError, match=f"another GradientReducer uses this {kind.__name__}.*'a'.*drop"):
        reducer(comm, "a")
    del first
    again = reducer(comm, "a")
    assert again.error_feedback is other.error_feedback
    comm.close()


def test_an_old_group_keeps_nothing_from_the_next() -> None:
    """After a lost rank the old reducer may live on, and the same PowerSGD serve the next group."""
    powersgd = PowerSGD(error_feedback=False)
    old = []
    for _ in range(2):
        comm = pycomm.init()
        old.append(GradientReducer([SHAPE], comm, codec=powersgd))
        comm.close()
