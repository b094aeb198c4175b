"""PowerSGD against its definition in float64, what it keeps over the steps, and where it is used."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from codec_data import F32, Array, everyone_has_the_same

import pycomm
from pycomm import Communicator, GradientReducer
from pycomm.codecs import ErrorFeedback, PowerSGD

Ranks = Callable[..., list[Any]]
SHAPES = {"weight": (40, 24), "bias": (24,), "kernel": (6, 5, 4, 3), "small": (2, 2)}
COMPRESSED = ("weight", "kernel")  # already with one column (2 + 2) 1 = 2 * 2


def gradients(step: int, rank: int, dtype: Any = F32) -> dict[str, Array]:
    """Of the same direction in all steps and ranks, and noise."""
    always, now = np.random.default_rng(99), np.random.default_rng([step, rank])
    return {
        name: (always.standard_normal(shape) + now.standard_normal(shape)).astype(dtype)
        for name, shape in SHAPES.items()
    }


def average(step: int, size: int, dtype: Any = F32) -> dict[str, Array]:
    everyones = [gradients(step, rank, dtype) for rank in range(size)]
    return {name: np.mean([each[name].astype("d") for each in everyones], axis=0) for name in SHAPES}


def projector(p: Array) -> Array:
    q, _ = np.linalg.qr(p)
    return q @ q.T


class Reference:
    """Algorithms 1 and 2 of the paper for one matrix on all ranks, in float64.

    Only the space that a factor spans matters, so that this needs no orthogonalisation of the same kind.
    """

    def __init__(self, q: Array, size: int, feeds: bool = True) -> None:
        self.q, self.feeds = q.astype("d"), feeds
        self.errors: Any = [0.0] * size

    def step(self, matrices: list[Array]) -> Array:
        owed = [m + e for m, e in zip(matrices, self.errors, strict=True)]
        span = projector(np.mean([m @ self.q for m in owed], axis=0))
        mean = span @ np.mean(owed, axis=0)
        if self.feeds:
            self.errors = [m - span @ m for m in owed]
        basis, _ = np.linalg.qr(np.mean([m @ self.q for m in owed], axis=0))
        self.q = np.mean(owed, axis=0).T @ basis
        return mean


@pytest.mark.parametrize("feeds", [True, False])
def test_steps_are_those_of_the_paper(ranks: Ranks, feeds: bool) -> None:
    def fn(comm: Communicator) -> None:
        powersgd = PowerSGD(2, error_feedback=feeds)
        references: dict[str, Reference] = {}
        for step in range(6):
            mine = gradients(step, comm.rank)
            if step == 0:  # the first factors are random: taken from another object that has the same seed
                for name in COMPRESSED:
                    first = PowerSGD(2).factor(name, int(np.prod(SHAPES[name][1:])))
                    references[name] = Reference(first, comm.size, feeds)
            exact = average(step, comm.size)
            got = dict(zip(mine, powersgd.all_reduce(mine.values(), comm, names=mine), strict=True))
            for name in ("bias", "small"):
                np.testing.assert_allclose(got[name], exact[name], rtol=1e-6, atol=1e-7)
            for name in COMPRESSED:
                rows = SHAPES[name][0]
                everyones = [gradients(step, rank)[name].reshape(rows, -1) for rank in range(comm.size)]
                want = references[name].step(everyones).reshape(SHAPES[name])
                np.testing.assert_allclose(got[name], want, atol=2e-4)
                assert np.abs(want - exact[name]).max() > 0.1  # another result than the plain average
                everyone_has_the_same(comm, got[name], name, step)

    ranks(fn, 3)


def test_seeds_give_other_factors() -> None:
    first, same, other = (PowerSGD(2, seed=seed).factor("w", 10) for seed in (0, 0, 1))
    assert np.array_equal(first, same) and not np.allclose(first, other)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_was_not_sent_is_sent_later(ranks: Ranks, dtype: str) -> None:
    """The sum of the results and the mean residual is the sum of the exact averages."""
    kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)

    def fn(comm: Communicator) -> None:
        powersgd = PowerSGD(1)
        steps = 8
        owed: dict[str, Any] = dict.fromkeys(COMPRESSED, 0.0)
        for step in range(steps):
            mine = gradients(step, comm.rank, kind)
            exact = average(step, comm.size, kind)
            powersgd.all_reduce(mine.values(), comm, names=mine)
            for name in COMPRESSED:
                owed[name] += exact[name] - mine[name].astype("d")
        residuals = powersgd.state_dict()["residuals"]
        assert sorted(residuals) == sorted(COMPRESSED)
        for name, residual in residuals.items():
            mean = comm.all_gather(residual).reshape(comm.size, -1).mean(axis=0, dtype="d")
            # Results of 16 bits are rounded: by half a unit, of numbers up to 16, which no residual keeps.
            rounding = {"float32": 1e-5, "float16": 8 * 2.0**-11, "bfloat16": 8 * 2.0**-8}[dtype] * steps
            np.testing.assert_allclose(mean, owed[name].ravel(), atol=rounding)

    ranks(fn, 2)


def test_a_matrix_of_low_rank_arrives_exactly() -> None:
    """After the first step the factor spans its rows; columns that are left over do no harm."""

    def fn(comm: Communicator) -> None:
        rng = np.random.default_rng(5)
        left, right = rng.standard_normal((30, 2)), rng.standard_normal((20, 2))
        powersgd = PowerSGD(4)
        for _ in range(5):
            x = ((comm.rank + 1) * left @ right.T).astype(F32)
            powersgd.all_reduce([x], comm)
            np.testing.assert_allclose(x, 1.5 * left @ right.T, atol=1e-4)
        residual = powersgd.state_dict()["residuals"]["0"]
        assert np.abs(residual).max() < 1e-4

    pycomm.run_local(fn, 2)


def test_after_zeros_it_goes_on() -> None:
    """A parameter that took no part in a step leaves no factor of zeros, with which nothing would be sent."""

    def fn(comm: Communicator) -> None:
        powersgd = PowerSGD(2, error_feedback=False)
        for scale in (0.0, 1.0, 1e-25):
            x = np.full((30, 20), scale, F32)
            powersgd.all_reduce([x], comm)
            np.testing.assert_allclose(x, scale, rtol=1e-4)

    pycomm.run_local(fn, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["weight", "bias"])
def test_a_step_that_is_not_finite_changes_nothing(ranks: Ranks, bad: float, where: str) -> None:
    def fn(comm: Communicator) -> None:
        powersgd = PowerSGD(2)
        for step in range(3):
            powersgd.all_reduce(gradients(step, comm.rank).values(), comm, names=SHAPES)
        before = powersgd.state_dict()
        assert powersgd.error_feedback is not None
        mine = gradients(3, comm.rank)
        if comm.rank == 1:
            mine[where][(1,) * mine[where].ndim] = bad
        powersgd.all_reduce(mine.values(), comm, names=SHAPES)
        assert not np.isfinite(mine[where]).all()  # a loss scaler sees it, on all ranks
        for _ in range(2):
            after = powersgd.state_dict()
            for part in ("residuals", "factors"):
                for name, value in before[part].items():
                    np.testing.assert_array_equal(after[part][name], value)
            powersgd.error_feedback.skip()  # as a training loop does; here nothing is left to undo

    ranks(fn, 2)


def test_a_result_beyond_its_type_changes_nothing() -> None:
    """The factors are finite, their product is not one of float16."""
    comm = pycomm.init()
    powersgd = PowerSGD(1)
    ones = np.full((40, 24), 40000, np.float16)
    powersgd.all_reduce([ones], comm)
    assert powersgd.error_feedback is not None
    powersgd.error_feedback.load_state_dict({"0": np.full(ones.size, 30000, F32)})
    before = powersgd.state_dict()
    powersgd.all_reduce([ones], comm)
    assert np.isinf(ones).all()
    for part, values in powersgd.state_dict().items():
        np.testing.assert_array_equal(values["0"], before[part]["0"])
    comm.close()


@pytest.mark.parametrize("dtype", [F32, np.float16])
def test_what_would_not_become_smaller_is_exact(ranks: Ranks, dtype: Any) -> None:
    """With 8 columns, factors of 16 x 40 have 4 (16 + 40) 8 = 1792 bytes, it has 2560 in float32."""

    def fn(comm: Communicator) -> None:
        whole = np.arange(640).reshape(16, 40).astype(dtype)
        reducer = GradientReducer([(16, 40)], comm, dtype=dtype, codec=PowerSGD(8))
        for powersgd in (PowerSGD(8), PowerSGD(8, error_feedback=False)):
            powersgd.all_reduce([whole.copy()], comm)
            assert (powersgd.state_dict()["factors"] == {}) == (dtype is np.float16)
        reducer.ready(0)
        reducer.finish()
        assert (reducer.state_dict()["factors"] == {}) == (dtype is np.float16)

    ranks(fn, 2)


def test_skip_takes_a_step_back(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        powersgd = PowerSGD(2)
        feedback = powersgd.error_feedback
        assert feedback is not None
        feedback.scale = 512.0
        for step in range(2):
            before = powersgd.state_dict()["residuals"]
            scaled = {name: x * F32(512) for name, x in gradients(step, comm.rank).items()}
            powersgd.all_reduce(scaled.values(), comm, names=SHAPES)
        assert np.abs(before["weight"]).max() < 10  # without the loss scale
        assert not np.array_equal(powersgd.state_dict()["residuals"]["weight"], before["weight"])
        for _ in range(2):
            feedback.skip()
            np.testing.assert_array_equal(powersgd.state_dict()["residuals"]["weight"], before["weight"])

    ranks(fn, 2)


def test_a_resumed_run_has_the_same_bits(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        going, resumed = PowerSGD(2), PowerSGD(2)
        for step in range(6):
            if step == 3:
                resumed.load_state_dict(going.state_dict())
            mine = gradients(step, comm.rank)
            going.all_reduce(mine.values(), comm, names=SHAPES)
            if step >= 3:
                again = gradients(step, comm.rank)
                resumed.all_reduce(again.values(), comm, names=SHAPES)
                for name in SHAPES:
                    np.testing.assert_array_equal(again[name], mine[name])

    ranks(fn, 2)


@pytest.mark.parametrize("size", [2, 4])
def test_another_number_of_ranks_owes_the_same(size: int) -> None:
    def before(comm: Communicator) -> Any:
        powersgd = PowerSGD(2)
        for step in range(3):
            powersgd.all_reduce(gradients(step, comm.rank).values(), comm, names=SHAPES)
        return powersgd.state_dict()

    states = pycomm.run_local(before, 3)
    owed = np.mean([state["residuals"]["weight"] for state in states], axis=0, dtype="d")

    def after(comm: Communicator) -> Any:
        powersgd = PowerSGD(2)
        powersgd.load_state_dict(states)
        mine = {name: np.zeros(shape, F32) for name, shape in SHAPES.items()}
        powersgd.all_reduce(mine.values(), comm, names=mine)
        return mine["weight"].astype("d"), powersgd.state_dict()["residuals"]["weight"]

    found = pycomm.run_local(after, size)
    left = np.mean([residual for _, residual in found], axis=0, dtype="d")
    np.testing.assert_allclose(found[0][0].ravel() + left, owed, atol=1e-5)
    assert np.abs(owed).max() > 0.1


def test_of_torch() -> None:
    """The same results as of arrays; bfloat16 is computed in float32."""
    torch = pytest.importorskip("torch")

    def fn(comm: Communicator) -> None:
        torch.set_num_threads(1)  # of this thread: the forked ranks of other tests have no pool of torch's
        arrays, tensors, halves = PowerSGD(2), PowerSGD(2), PowerSGD(2)
        for step in range(3):
            given = gradients(step, comm.rank)
            as_tensors = [torch.from_numpy(x.copy()) for x in given.values()]
            as_halves = [x.to(torch.bfloat16) for x in as_tensors]
            arrays.all_reduce(given.values(), comm, names=SHAPES)
            tensors.all_reduce(as_tensors, comm, names=SHAPES)
            halves.all_reduce(as_halves, comm, names=SHAPES)
            for x, tensor in zip(given.values(), as_tensors, strict=True):
                np.testing.assert_allclose(tensor.numpy(), x, atol=1e-4)
                everyone_has_the_same(comm, tensor.numpy())
            for half, tensor in zip(as_halves, as_tensors, strict=True):
                assert half.dtype == torch.bfloat16
                # The gradients differ by up to half a unit of theirs, and so do the results.
                np.testing.assert_allclose(half.float().numpy(), tensor.numpy(), atol=0.1)
        state = tensors.state_dict()
        assert all(torch.is_tensor(x) for part in state.values() for x in part.values())
        with pytest.raises(TypeError, match="`gradients\\[0\\]` is a parameter: pass its gradient"):
            tensors.all_reduce([torch.nn.Parameter(torch.zeros(8, 8))], comm)

    pycomm.run_local(fn, 2)


# ---- in the reducer ----


@pytest.mark.parametrize("order", ["ready", "reverse"])
@pytest.mark.parametrize("bucket_mb", [1e-6, 25])
def test_the_reducer_sends_factors(ranks: Ranks, order: Any, bucket_mb: float) -> None:
    """The same averages as by hand, in one bucket or several."""

    def fn(comm: Communicator) -> None:
        powersgd = PowerSGD(4)
        reducer = GradientReducer(
            list(SHAPES.values()), comm, names=SHAPES, codec="powersgd", bucket_mb=bucket_mb, order=order
        )
        assert reducer.error_feedback is not None
        for step in range(4):
            mine = gradients(step, comm.rank)
            for i in reversed(range(len(SHAPES))):
                reducer.gradients[i][...] = list(mine.values())[i]
                reducer.ready(i)
            stats = reducer.finish()
            powersgd.all_reduce(mine.values(), comm, names=SHAPES)
            for got, want in zip(reducer.gradients, mine.values(), strict=True):
                np.testing.assert_allclose(got, want, atol=1e-4)
            assert stats is not None and stats.finite
        np.testing.assert_allclose(
            reducer.error_feedback.state_dict()["weight"],
            powersgd.state_dict()["residuals"]["weight"],
            atol=1e-4,
        )

    ranks(fn, 2)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_reducer_that_is_resumed(ranks: Ranks, lag: int) -> None:
    """It pays what was owed, and has the same bits; with a lag as well, in which steps overlap."""

    def fn(comm: Communicator) -> None:
        def made() -> GradientReducer:
            return GradientReducer(
                list(SHAPES.values()), comm, names=SHAPES, codec=PowerSGD(2), bucket_mb=1e-6, lag=lag
            )

        def run(reducer: GradientReducer, steps: range) -> list[Any]:
            found = []
            for step in steps:
                for i, x in enumerate(gradients(step, comm.rank).values()):
                    reducer.gradients[i][...] = x
                    reducer.ready(i)
                if reducer.finish() is not None:
                    found.append([x.copy() for x in reducer.gradients])
            return found

        whole, first, second = made(), made(), made()
        everything = run(whole, range(7))
        everything += [[x.copy() for x in whole.gradients] for _ in whole.drain()]
        begun = run(first, range(4))
        state, residuals = first.state_dict(), first.error_feedback.state_dict()
        second.load_state_dict(state)
        second.error_feedback.load_state_dict(residuals)
        begun += run(second, range(4, 7))
        begun += [[x.copy() for x in second.gradients] for _ in second.drain()]
        assert len(everything) == len(begun) == 7
        for mine, other in zip(everything, begun, strict=True):
            for a, b in zip(mine, other, strict=True):
                np.testing.assert_array_equal(a, b)
        owed = sum(average(step, comm.size)["weight"] for step in range(7))
        got = sum(each[0].astype("d") for each in everything)
        mean = comm.all_gather(whole.error_feedback.state_dict()["weight"]).reshape(comm.size, -1)
        np.testing.assert_allclose(got.ravel() + mean.mean(axis=0, dtype="d"), owed.ravel(), atol=1e-4)

    ranks(fn, 2)


def test_a_reducer_after_a_step_that_is_not_finite(ranks: Ranks) -> None:
    """The bad value is in one bucket; the residuals of all buckets stay as they were."""

    def fn(comm: Communicator) -> None:
        reducer = GradientReducer(list(SHAPES.values()), comm, names=SHAPES, codec="powersgd", bucket_mb=1e-6)
        assert reducer.error_feedback is not None
        for step in range(3):
            before = reducer.error_feedback.state_dict()
            for i, x in enumerate(gradients(step, comm.rank).values()):
                reducer.gradients[i][...] = x
                if step == 2 and comm.rank == 1 and i == 1:
                    reducer.gradients[i][3] = np.inf
                reducer.ready(i)
            stats = reducer.finish()
        assert stats is not None and not stats.finite and before
        for name, residual in reducer.error_feedback.state_dict().items():
            np.testing.assert_array_equal(residual, before[name])

    ranks(fn, 2)


def test_a_trace_knows_its_buckets() -> None:
    def fn(comm: Communicator) -> None:
        reducer = GradientReducer([(64, 64), (8,)], comm, codec="powersgd", bucket_mb=1e-6)
        with pycomm.trace.start(comm) as trace:
            for _ in range(4):
                for i, x in enumerate(reducer.gradients):
                    x[...] = 1
                    reducer.ready(i)
                reducer.finish()
        sent = {flight.bytes for step in trace.ranks[0] for flight in step.flights}
        assert sent == {2 * 4 * 4 * 64, 4 * 256}  # P and Q; a bucket with a gap

    pycomm.run_local(fn, 2)


# ---- what is refused ----


def test_wrong_arguments() -> None:
    comm = pycomm.init()
    powersgd = PowerSGD(2)
    x = np.zeros((30, 20), F32)
    frozen = x.copy()
    frozen.flags.writeable = False
    for given, error, words in [
        ([x.astype("d")], TypeError, r"`gradients\[0\]` is float64: powersgd takes float32, float16"),
        ([frozen], ValueError, "read-only.*pass a copy"),
        ([None], TypeError, "`gradients\\[0\\]` is None: no gradient"),
        ([x, x], ValueError, "gradients '0' and '1' are the same"),
        (x, TypeError, "pass a list"),
    ]:
        with pytest.raises(error, match=words):
            powersgd.all_reduce(given, comm)
    powersgd.all_reduce([x], comm)
    with pytest.raises(ValueError, match="'0' has 10 columns here"):
        powersgd.all_reduce([np.zeros((30, 10), F32)], comm)
    with pytest.raises(ValueError, match="make the PowerSGD with the rank that it had"):
        PowerSGD(3).load_state_dict(powersgd.state_dict())
    with pytest.raises(ValueError, match="pass a state_dict"):
        powersgd.load_state_dict({"0": x})
    with pytest.raises(TypeError, match="`comm` is 3"):
        powersgd.all_reduce([x], 3)  # type: ignore[arg-type]
    for codec in ("powersgd", powersgd):
        with pytest.raises(ValueError, match=r"all_reduce cannot carry powersgd.*PowerSGD\(\).all_reduce"):
            comm.all_reduce(x, codec=codec)
    for wrong, error in [
        ({"rank": 0}, ValueError),
        ({"seed": -1}, ValueError),
        ({"error_feedback": 1}, TypeError),
    ]:
        with pytest.raises(error, match=next(iter(wrong))):
            PowerSGD(**wrong)
    with pytest.raises(ValueError, match='order="priority" with powersgd'):
        GradientReducer([(3, 3)], comm, codec="powersgd", order="priority")
    with pytest.raises(ValueError, match="pass it to that"):
        GradientReducer([(3, 3)], comm, codec=powersgd, error_feedback=ErrorFeedback())
    comm.close()


def test_ranks_that_pass_other_shapes() -> None:
    def fn(comm: Communicator) -> None:
        with pytest.raises(pycomm.MismatchError) as caught:
            PowerSGD(2).all_reduce([np.zeros((30, 20 + 5 * comm.rank), F32)], comm)
        assert "(30, 20)" in str(caught.value) and "(30, 25)" in str(caught.value)

    pycomm.run_local(fn, 2)


def test_ranks_that_exempt_other_matrices_do_not_average_them() -> None:
    def fn(comm: Communicator) -> None:
        exempt = "ab"[comm.rank]
        powersgd = PowerSGD(1, error_feedback=ErrorFeedback(exempt=lambda name, shape: name == exempt))
        with pytest.raises(pycomm.MismatchError, match="matrices of 1, #"):
            powersgd.all_reduce([np.ones((40, 24), F32), np.ones((40, 24), F32)], comm, names=["a", "b"])

    pycomm.run_local(fn, 2)


def test_a_group_that_has_failed_is_over() -> None:
    """Its exchange does not come up in the calls on the next group."""
    of_rank = [PowerSGD(2, error_feedback=False) for _ in range(2)]

    def fails(comm: Communicator) -> None:
        if comm.rank == 0:
            with pytest.raises(pycomm.CommError):
                of_rank[0].all_reduce([np.ones((40, 24), F32)], comm)

    def goes_on(comm: Communicator) -> None:
        ones = np.ones((40, 24), F32)
        of_rank[comm.rank].all_reduce([ones], comm)
        np.testing.assert_allclose(ones, 1, rtol=1e-6)

    pycomm.run_local(fails, 2)
    pycomm.run_local(goes_on, 2)
