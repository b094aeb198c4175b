"""GradientReducer against averages in float64, whatever the kind of gradients, order and marks."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from processes import Died, Gate, run, started

import pycomm
from pycomm import Communicator, GradientReducer
from pycomm.codecs import ErrorFeedback, Int8

Ranks = Callable[..., list[Any]]
Array = np.ndarray[Any, Any]

SHAPES = [(300, 7), (5,), (1024,), (), (2, 3, 4), (4099,), (1,)]
SMALL = 0.004  # MiB: several buckets of SHAPES
ORDERS = ["ready", "reverse", "priority"]


def values(rank: int, step: int) -> list[Array]:
    """Gradients whose averages float32 holds exactly."""
    rng = np.random.default_rng([rank, step])
    return [rng.integers(-64, 64, shape).astype(np.float32) for shape in SHAPES]


def average(ranks: list[int], step: int) -> list[Array]:
    everyones = [values(rank, step) for rank in ranks]
    return [np.mean(parts, axis=0, dtype=np.float64) for parts in zip(*everyones, strict=True)]


def check(gradients: Any, expected: list[Array]) -> None:
    for got, want in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(got), want.astype(np.float32))


def shuffled(rank: int, step: int) -> list[int]:
    return np.random.default_rng([7, rank, step]).permutation(len(SHAPES)).tolist()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("of", ["shapes", "arrays"])
def test_averages_whatever_becomes_ready_first(ranks: Ranks, order: Any, of: str) -> None:
    def fn(comm: Communicator) -> list[Any]:
        given = SHAPES if of == "shapes" else [np.empty(shape, np.float32) for shape in SHAPES]
        reducer = GradientReducer(given, comm, bucket_mb=SMALL, order=order)
        layouts = []
        for step in range(4):
            for i in shuffled(comm.rank, step):
                reducer.gradients[i][...] = values(comm.rank, step)[i]
                reducer.ready(i)
            stats = reducer.finish()
            expected = average(list(range(comm.size)), step)
            check(reducer.gradients, expected)
            assert stats is not None and stats.finite
            assert math.isclose(
                stats.norm, math.sqrt(sum(float((x**2).sum()) for x in expected)), rel_tol=1e-6
            )
            layouts.append(reducer.buckets)
        return layouts

    for layouts in ranks(fn, 3):
        assert len(layouts[0]) > 2
        assert (
            layouts == [layouts[0]] * 4
            if of == "shapes" or order != "ready"
            else layouts[1:] == [layouts[1]] * 3
        )
        if order == "ready" and of == "arrays":
            assert [i for bucket in layouts[1] for i in bucket] == shuffled(0, 0)  # as rank 0 saw it


def test_a_step_of_several_passes(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        reducer = GradientReducer(SHAPES, comm, bucket_mb=SMALL)
        for step in range(2):
            reducer.zero_grad()
            with reducer.no_sync():
                for i, value in enumerate(values(comm.rank, 2 * step)):
                    reducer.gradients[i][...] += value
                    reducer.ready(i)
                with pytest.raises(ValueError, match="no_sync"):
                    reducer.finish()
            for i, value in enumerate(values(comm.rank, 2 * step + 1)):
                reducer.gradients[i][...] += value
                reducer.ready(i)
            reducer.finish()
            both = zip(*(average([0, 1], 2 * step + part) for part in range(2)), strict=True)
            check(reducer.gradients, [a + b for a, b in both])

    ranks(fn, 2)


@pytest.mark.parametrize("order", ORDERS)
def test_unused_gradients_count_as_zeros(ranks: Ranks, order: Any) -> None:
    def fn(comm: Communicator) -> None:
        for find in (False, True):
            reducer = GradientReducer(SHAPES, comm, bucket_mb=SMALL, order=order, find_unused=find)
            for step in range(3):
                unused = {(comm.rank + step) % len(SHAPES), 3}
                for i, value in enumerate(values(comm.rank, step)):
                    reducer.gradients[i][...] = value
                    if i not in unused:
                        reducer.ready(i)
                    elif not find:
                        reducer.unused(i)
                reducer.finish()
                expected = []
                for i in range(len(SHAPES)):
                    parts = [
                        values(rank, step)[i] * (i not in {(rank + step) % len(SHAPES), 3})
                        for rank in range(comm.size)
                    ]
                    expected.append(np.mean(parts, axis=0))
                check(reducer.gradients, expected)

    ranks(fn, 2)


@pytest.mark.parametrize("find", [False, True])
def test_a_gradient_that_only_an_earlier_pass_has_used_is_not_lost(ranks: Ranks, find: bool) -> None:
    def fn(comm: Communicator) -> None:
        reducer = GradientReducer(SHAPES, comm, bucket_mb=SMALL, find_unused=find)
        for step in range(2):
            for i, value in enumerate(values(comm.rank, step)):
                reducer.gradients[i][...] = value
            with reducer.no_sync():
                for i in (0, 1, 2):
                    reducer.ready(i)
            for i in range(2, len(SHAPES)):
                reducer.ready(i)
            reducer.finish()
            check(reducer.gradients, average([0, 1], step))
        with pytest.raises(IndexError, match="`i` is 7"), reducer.no_sync():
            reducer.ready(7)

    ranks(fn, 2)


@pytest.mark.parametrize("order", ORDERS)
def test_uneven_inputs(ranks: Ranks, order: Any) -> None:
    """Rank r makes r + 1 steps; averages are over those that have input."""

    def fn(comm: Communicator) -> int:
        given = [np.empty(shape, np.float32) for shape in SHAPES]
        reducer = GradientReducer(given, comm, bucket_mb=SMALL, order=order, uneven_inputs=True)
        steps = 0
        for step in range(comm.rank + 1):
            for i in shuffled(comm.rank, step):
                given[i][...] = values(comm.rank, step)[i]
                reducer.ready(i)
            reducer.finish()
            compare(given, step, comm.size)
            steps += 1
        for _ in reducer.join():
            compare(given, steps, comm.size)
            steps += 1
        return steps

    def compare(gradients: list[Array], step: int, size: int) -> None:
        for got, want in zip(gradients, average(list(range(step, size)), step), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)

    assert ranks(fn, 3) == [3, 3, 3]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_averages_over_few_ranks_overflow_nowhere(ranks: Ranks, dtype: str) -> None:
    """The gradients of three ranks of four, and then of one: near the largest number of float16."""

    def fn(comm: Communicator) -> None:
        reducer = GradientReducer([(300,)], comm, dtype=dtype, uneven_inputs=True)
        last = 60000 + 32 * comm.rank
        found = []
        for _ in range([2, 1, 1, 0][comm.rank]):
            reducer.gradients[0][...] = last
            reducer.ready(0)
            reducer.finish()
            found.append(float(reducer.gradients[0][0]))
        found += [float(reducer.gradients[0][0]) for _ in reducer.join()]
        np.testing.assert_allclose(found, [60032, 60000], rtol=2.0**-10 if dtype == "float16" else 1e-6)

    ranks(fn, 4)


def test_late_averages_over_few_ranks_are_restored(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        reducer = GradientReducer([(3,)], comm, lag=1, uneven_inputs=True)
        if comm.rank == 0:
            reducer.gradients[0][...] = 5
            reducer.ready(0)
            assert reducer.finish() is None
        joined = list(reducer.join())
        assert joined == [None] * comm.rank
        later = GradientReducer([(3,)], comm, lag=1, uneven_inputs=True)
        later.load_state_dict(reducer.state_dict())
        assert [stats.max_abs for stats in later.drain()] == [5]
        np.testing.assert_array_equal(later.gradients[0], [5, 5, 5])

    ranks(fn, 2)


def test_late_averages(ranks: Ranks) -> None:
    """With lag, also over a checkpoint in between."""

    def fn(comm: Communicator) -> None:
        for lag in (1, 2):
            taken = 0

            def compare(gradients: Any) -> None:
                nonlocal taken
                check(gradients, average([0, 1], taken))
                taken += 1

            reducer = GradientReducer(SHAPES, comm, bucket_mb=SMALL, lag=lag)
            for step in range(6):
                if step == 4:
                    state = reducer.state_dict()
                    assert len(state["in_flight"]) == lag
                    reducer = GradientReducer(SHAPES, comm, bucket_mb=SMALL, lag=lag)
                    reducer.load_state_dict(state)
                for i, value in enumerate(values(comm.rank, step)):
                    reducer.gradients[i][...] = value
                    reducer.ready(i)
                stats = reducer.finish()
                assert (stats is None) == (step < lag)
                if stats is not None:
                    compare(reducer.gradients)
            for stats in reducer.drain():
                assert stats.finite
                compare(reducer.gradients)
            assert taken == 6

    ranks(fn, 2)


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("codec", [None, "int8"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_resumed_run_has_the_same_bits(ranks: Ranks, lag: int, codec: str | None, order: Any) -> None:
    """Also with averages on their way that lie in the order before the rearrangement."""

    def fn(comm: Communicator) -> None:
        def made() -> GradientReducer:
            given = [np.zeros(shape, np.float32) for shape in SHAPES]
            feedback = None if codec is None else ErrorFeedback(exempt=lambda name, shape: False)
            return GradientReducer(
                given, comm, bucket_mb=SMALL, order=order, codec=codec, error_feedback=feedback, lag=lag
            )

        def run(resumed_before: int | None) -> list[Any]:
            reducer, found = made(), []
            for step in range(5):
                if step == resumed_before:
                    state, feedback = reducer.state_dict(), reducer.error_feedback
                    reducer = made()
                    reducer.load_state_dict(state)
                    if feedback is not None:
                        assert reducer.error_feedback is not None
                        reducer.error_feedback.load_state_dict(feedback.state_dict())
                for i in shuffled(comm.rank, step):
                    reducer.gradients[i][...] = 0.3 * values(comm.rank, step)[i]
                    reducer.ready(i)
                if reducer.finish() is not None:
                    found.append([np.asarray(x).tobytes() for x in reducer.gradients])
            found += [[np.asarray(x).tobytes() for x in reducer.gradients] for _ in reducer.drain()]
            assert len(found) == 5
            return found

        uninterrupted = run(None)
        for step in (1, 3):
            assert run(resumed_before=step) == uninterrupted

    ranks(fn, 2)


def test_late_averages_go_on_with_more_ranks(ranks: Ranks) -> None:
    states: list[Any] = []

    def first(comm: Communicator) -> dict[str, Any]:
        reducer = GradientReducer(SHAPES, comm, bucket_mb=SMALL, lag=1)
        for i, value in enumerate(values(comm.rank, 0)):
            reducer.gradients[i][...] = value
            reducer.ready(i)
        reducer.finish()
        return reducer.state_dict()

    def then(comm: Communicator) -> None:
        other = GradientReducer(SHAPES, comm, bucket_mb=SMALL, lag=1, dtype="float16")
        with pytest.raises(ValueError, match="other buckets"):
            other.load_state_dict(states[0])
        reducer = GradientReducer(SHAPES, comm, bucket_mb=SMALL, lag=1)
        reducer.load_state_dict(states[0])
        for step in range(1, 3):
            for i, value in enumerate(values(comm.rank, step)):
                reducer.gradients[i][...] = value
                reducer.ready(i)
            reducer.finish()
            check(reducer.gradients, average([0, 1] if step == 1 else [0, 1, 2], step - 1))

    states += ranks(first, 2)
    ranks(then, 3)


def test_two_reducers_do_not_share_residuals(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        reducers = [GradientReducer([(30, 30)], comm, codec="sign") for _ in range(2)]
        for reducer, value in zip(reducers, (np.arange(900.0).reshape(30, 30), 0.0), strict=True):
            reducer.gradients[0][...] = value
            reducer.ready(0)
            reducer.finish()
        feedback = reducers[0].error_feedback
        assert feedback is not None and feedback.state_dict()["0"].any()
        assert not reducers[1].gradients[0].any()
        assert GradientReducer([(3,)], comm).error_feedback is None

    ranks(fn, 2)


def test_a_codec_with_error_feedback(ranks: Ranks) -> None:
    """What a step loses comes in later ones; a step that is not finite changes no residual."""

    def fn(comm: Communicator) -> None:
        feedback = ErrorFeedback(exempt=lambda name, shape: False)
        reducer = GradientReducer(SHAPES, comm, bucket_mb=SMALL, codec="int8", error_feedback=feedback)
        sums = [np.zeros(shape) for shape in SHAPES]
        everyones = [[x + np.float32(0.3) * (rank + 1) for x in values(rank, 0)] for rank in range(2)]
        mine = everyones[comm.rank]
        steps = 50
        for _ in range(steps):
            for i, value in enumerate(mine):
                reducer.gradients[i][...] = value
                reducer.ready(i)
            reducer.finish()
            for total, got in zip(sums, reducer.gradients, strict=True):
                total += got
        exact = [np.mean(parts, axis=0, dtype=np.float64) for parts in zip(*everyones, strict=True)]
        for total, want in zip(sums, exact, strict=True):
            np.testing.assert_allclose(total / steps, want, atol=3 * 64 / 127 / steps)

        before = feedback.state_dict()
        for i in range(len(SHAPES)):
            reducer.gradients[i][...] = np.inf if i == 2 and comm.rank == 1 else 1.7
            reducer.ready(i)
        stats = reducer.finish()
        assert stats is not None and not stats.finite
        after = feedback.state_dict()
        assert before.keys() == after.keys()
        for name, residual in before.items():
            np.testing.assert_array_equal(after[name], residual)

    ranks(fn, 2)


def test_two_types_are_two_buckets(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        given = [np.full(4, comm.rank + 1, dtype) for dtype in ("float32", "float16", "float16", "float32")]
        reducer = GradientReducer(given, comm)
        assert reducer.buckets == ((3,), (2, 1), (0,))
        for i in range(4):
            reducer.ready(i)
        reducer.finish()
        for x in given:
            np.testing.assert_array_equal(x, np.full(4, 1.5, x.dtype))
        narrow = GradientReducer([(10,), (20,)], comm, dtype="float16")
        assert narrow.gradients[0].dtype == np.float16

    ranks(fn, 2)


def test_misuse_names_the_value_and_the_remedy(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        reducer = GradientReducer([(3,), (4,)], comm, names=["weight", "bias"])
        with pytest.raises(ValueError, match="not ready: 'weight', 'bias'.*find_unused"):
            reducer.finish()
        reducer.ready(1)
        with pytest.raises(ValueError, match="'bias' is ready a second time.*no_sync"):
            reducer.ready(1)
        with pytest.raises(ValueError, match="not ready: 'weight'"):
            reducer.finish()
        for i in (2, -1):
            with pytest.raises(IndexError, match=f"`i` is {i}: there are 2"):
                reducer.ready(i)
        with pytest.raises(ValueError, match="between steps"):
            reducer.state_dict()
        with pytest.raises(ValueError, match="before the first pass"), reducer.no_sync():
            pass
        with pytest.raises(ValueError, match="uneven_inputs"):
            next(reducer.join())
        with pytest.raises(ValueError, match="no torch parameter: 'weight', 'bias'"):
            reducer.attach()
        reducer.ready(0)
        reducer.finish()
        with pytest.raises(ValueError, match="after a step"):
            reducer.load_state_dict({})
        other = GradientReducer([(3,)], comm)
        for wrong in ({}, None, ErrorFeedback().state_dict()):
            with pytest.raises(ValueError, match="not a GradientReducer's"):
                other.load_state_dict(wrong)
        with pytest.raises(ValueError, match="of 2 gradients, and there are 1"):
            other.load_state_dict(reducer.state_dict())

    ranks(fn, 2)


def read_only() -> Array:
    x = np.ones(3, np.float32)
    x.flags.writeable = False
    return x


TWICE = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("gradients", "error", "match"),
    [
        (np.zeros((3, 4), np.float32), TypeError, "one array or tensor"),
        ({"w": np.zeros(3, np.float32)}, TypeError, "a mapping.*names="),
        ([("w", np.zeros(3, np.float32))], TypeError, "names and tensors.*names="),
        ([], ValueError, "is empty"),
        ([(3,), (-3,)], ValueError, r"shape \(-3,\)"),
        ([(3.5,)], TypeError, "3.5"),
        ([None], TypeError, "is None"),
        ([(3,), np.zeros(3)], TypeError, r"`gradients\[1\]` is float64"),
        ([np.zeros((4, 4), np.float32).T], ValueError, "not contiguous"),
        ([read_only()], ValueError, "'0' is read-only"),
        ([(3,), TWICE, TWICE], ValueError, "'1' and '2' are the same"),
    ],
)
def test_gradients_are_checked(gradients: Any, error: Any, match: str) -> None:
    def fn(comm: Communicator) -> None:
        with pytest.raises(error, match=match):
            GradientReducer(gradients, comm)

    pycomm.run_local(fn, 1)


def test_gradients_without_elements_and_scalars(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        for shapes in ([(0,)], [(0, 3), np.int64(2), (), (3, 0)]):
            reducer = GradientReducer(shapes, comm, codec="bf16")
            for i, gradient in enumerate(reducer.gradients):
                gradient[...] = comm.rank + 1
                reducer.ready(i)
            stats = reducer.finish()
            assert stats is not None and stats.max_abs == (1.5 if len(shapes) > 1 else 0)
            for gradient in reducer.gradients:
                np.testing.assert_array_equal(gradient, np.full(gradient.shape, 1.5))

    ranks(fn, 2)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"order": "forward"}, ValueError, "`order` is 'forward'"),
        ({"bucket_mb": 0}, ValueError, "`bucket_mb` is 0"),
        ({"bucket_mb": "big"}, TypeError, "`bucket_mb` is 'big'"),
        ({"lag": -1}, ValueError, "`lag` is -1"),
        ({"lag": 1.5}, TypeError, "`lag` is 1.5"),
        ({"error_feedback": True}, ValueError, "without `codec`"),
        ({"codec": "shared_int", "error_feedback": True}, ValueError, "shared_int has none"),
        ({"codec": "int9"}, ValueError, "did you mean"),
        ({"names": ["a"]}, ValueError, "1 names for 2"),
        ({"dtype": "int32"}, (TypeError, ValueError), "int32"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: Any, match: str) -> None:
    def fn(comm: Communicator) -> None:
        with pytest.raises(error, match=match):
            GradientReducer([(3,), (4,)], comm, **options)

    pycomm.run_local(fn, 1)


def test_ranks_must_agree(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        with pytest.raises(ValueError, match="on rank"):
            GradientReducer([(3,), (4 + comm.rank,)], comm)

    ranks(fn, 2)


def test_a_rank_that_makes_another_call_is_a_mismatch(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        reducer = GradientReducer(SHAPES, comm, names=[f"w{i}" for i in range(len(SHAPES))])
        with pytest.raises(pycomm.MismatchError, match='(?s)w6.*tagged "loss"|tagged "loss".*w6'):
            if comm.rank == 1:
                comm.all_reduce(np.zeros(4, np.float32), tag="loss")
            for i in range(len(SHAPES)):
                reducer.ready(i)
            reducer.finish()

    ranks(fn, 2)


@pytest.mark.parametrize("order", ORDERS)
def test_ctrl_c_ends_finish_and_the_others_are_told(order: Any) -> None:
    """Rank 1 has not begun when rank 0 waits for it."""
    gate = Gate()

    def fn(comm: Communicator) -> str:
        reducer = GradientReducer([np.ones(shape, np.float32) for shape in SHAPES], comm, order=order)
        if comm.rank == 1:
            gate.wait_for(1)
        else:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            for i in range(len(SHAPES)):
                reducer.ready(i)
            reducer.finish()
        except KeyboardInterrupt:
            gate.arrive()
            with pytest.raises(pycomm.CommError, match="interrupted"):
                reducer.finish()
            return "interrupted"
        except pycomm.CommError as error:
            return str(error)
        return "finished"

    said = run(fn, 2)
    assert said[0] == "interrupted" and "rank 0 was interrupted" in said[1]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("lag", [0, 1])
def test_a_rank_killed_between_its_gradients_is_named(order: Any, lag: int) -> None:
    def fn(comm: Communicator) -> float:
        given = [np.ones(shape, np.float32) for shape in SHAPES]
        reducer = GradientReducer(given, comm, bucket_mb=SMALL, order=order, lag=lag)
        with pytest.raises(pycomm.PeerLostError, match=r"rank 1 \(pid"):
            for step in range(100):
                for marked, i in enumerate(reversed(range(len(SHAPES)))):
                    if comm.rank == 1 and step == 5 and marked == 4:
                        os.kill(os.getpid(), signal.SIGKILL)
                    reducer.ready(i)
                reducer.finish()
        told = time.monotonic()
        for again in (lambda: reducer.ready(0), reducer.finish):
            with pytest.raises(pycomm.AbortedError, match="(?s)rank 1 .*another GradientReducer"):
                again()
        return told

    with started(fn, 3) as all_ranks:
        with pytest.raises(Died):
            all_ranks[1].outcome(30)
        died = time.monotonic()
        for survivor in (all_ranks[0], all_ranks[2]):
            assert survivor.outcome(30) - died < 1


def test_residuals_have_names() -> None:
    def fn(comm: Communicator) -> None:
        feedback = ErrorFeedback(exempt=lambda name, shape: False)
        reducer = GradientReducer([(3,), (4,)], comm, names=["w", "b"], codec=Int8(error_feedback=feedback))
        for i in range(2):
            reducer.gradients[i][...] = 0.3
            reducer.ready(i)
        reducer.finish()
        assert sorted(feedback.state_dict()) == ["b", "w"]

    pycomm.run_local(fn, 2)
