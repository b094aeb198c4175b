"""Error feedback: errors are added later, parameter by parameter, and refused calls change nothing."""

import array
import gc
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_codecs as reference
from codec_data import F32, Array, everyone_has_the_same, gaussian, without_feedback

import pycomm
from pycomm import Bucket, Communicator, codecs
from pycomm.codecs.feedback import _kept

Ranks = Callable[..., list[Any]]


def drift(
    comm: Communicator, codec: Any, steps: int, algorithm: str | None = None, count: int = 4096
) -> float:
    """|sum of the results - sum of the exact averages| / |the latter| after `steps` steps."""
    got, exact = np.zeros(count), np.zeros(count)
    bias = np.random.default_rng(99).standard_normal(count)  # the gradients of all steps are similar
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
    """The sum of 300 steps; without feedback, rounding to nearest drifts further."""

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
        assert list(_kept[comm].state_dict()) == ["w"]

    before = len(_kept)
    pycomm.run_local(fn, 2)
    gc.collect()
    assert len(_kept) <= before


def test_residuals_are_what_was_not_sent(ranks: Ranks) -> None:
    """The mean of the ranks' residuals is the difference between the exact average and the result."""

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
    """A world of one, and a rank's own block of a reduce_scatter, are not encoded: the residual is added."""

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
        # float16 results of calls that encode are rounded once more; no residual keeps that error.
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
        feedback.skip()  # the whole step, of which only one call was finite
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
    """The next call on the same parameters follows them, and uses their residuals."""

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


def test_many_tensors_take_no_longer_than_to_make_their_bucket() -> None:
    """Linear work passes; a comparison of each with each takes four times as long."""

    def fn(comm: Communicator) -> None:
        tensors = [np.ones((4,) if i % 2 else (2, 2), F32) for i in range(4000)]
        names = [f"layer{i}.weight" for i in range(len(tensors))]
        codec = codecs.Int8(error_feedback=codecs.ErrorFeedback())
        made, called = [], []
        for _ in range(5):
            begin = time.perf_counter()
            bucket = Bucket(tensors, names=names)
            middle = time.perf_counter()
            comm.all_reduce(bucket, codec=codec)
            made.append(middle - begin)
            called.append(time.perf_counter() - middle)
        assert min(called) < min(made)

    pycomm.run_local(fn, 1)


def test_many_arrays_take_about_as_long_in_the_first_step_as_later() -> None:
    """A comparison of each with all before it takes forty times as long."""

    def fn(comm: Communicator) -> None:
        x = np.ones(8, F32)
        codec = codecs.Int8(error_feedback=codecs.ErrorFeedback())
        took = []
        for _ in range(2):
            begin = time.perf_counter()
            for i in range(2000):
                comm.all_reduce(x, codec=codec, tag=str(i))
            took.append(time.perf_counter() - begin)
        assert took[0] < 8 * took[1]

    pycomm.run_local(fn, 1)


def test_ranks_that_exempt_other_tensors_do_not_reduce_them() -> None:
    def fn(comm: Communicator) -> None:
        exempted = "ab" if comm.rank == 0 else "ac"  # with equal lengths
        feedback = codecs.ErrorFeedback(lambda name, shape: name in exempted)
        bucket = Bucket([np.ones(n, F32) for n in (300, 200, 200, 100)], names=list("abcd"))
        bucket.pack()
        comm.all_reduce(bucket, codec=codecs.TopK(k=5, error_feedback=feedback))
        comm.barrier()

    with pytest.raises(pycomm.MismatchError, match="exempt of 2, #"):
        pycomm.run_local(fn, 2)


@pytest.mark.parametrize("codec", [codecs.Int8, codecs.TopK])
def test_results_of_any_shape_hold_what_is_exempt(ranks: Ranks, codec: Any) -> None:
    def fn(comm: Communicator) -> None:
        bucket = Bucket([np.full(200, 2.5, F32), np.ones((20, 30), F32)], names=["b", "W"])
        bucket.pack()
        for out in (np.zeros((2, bucket.data.size // 2), F32), array.array("f", bytes(4 * bucket.data.size))):
            feeds = codec(error_feedback=codecs.ErrorFeedback())
            assert comm.all_reduce(bucket, out=out, codec=feeds) is out
            found = np.asarray(out).ravel()
            assert (found[:200] == 2.5 * comm.size).all() and (found[256:856] > 0).any()

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
        with pytest.raises(ValueError, match="'a' has 9 elements here, but its residual has 600"):
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
    """A codec with a changed ratio or seed continues with the residuals of the steps before."""

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
            ([x, x.astype(np.float16)], [x, shared[:300]], "out.1.. is float32 where .x.1.. is float16"),
            ([x], [shared[:7]], r"`out\[0\]` has shape \(7,\) where \(2, 150\)"),
            ([x], 3, "`out` is a int"),
        ):
            for asynchronous in (False, True):
                with pytest.raises((ValueError, TypeError), match=words):
                    comm.all_reduce(xs, out=out, codec=codec, tag="t", async_op=asynchronous)
        assert feedback.state_dict() == {} and comm.codec_step == 0

        # The second of two buckets is refused because of its residual, before the first is reduced.
        feedback.load_state_dict({"t[1]": np.ones(7, np.float32)})
        with pytest.raises(ValueError, match=r"'t\[1\]' has 300 elements here, but its residual has 7"):
            comm.all_reduce([x, x.astype(np.float16)], codec=codec, tag="t")
        assert comm.codec_step == 0 and list(feedback.state_dict()) == ["t[1]"]
        feedback.load_state_dict({})

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

        # A completed step can be undone even if calls were refused after it.
        comm.all_reduce(gaussian(comm.rank, 300), codec=codec, tag="q")
        with pytest.raises(ValueError, match="zz"):
            comm.all_reduce(gaussian(comm.rank, 300), codec=codec, tag="q", algorithm="zz")
        with pytest.raises(ValueError, match="zz"):
            comm.all_reduce([gaussian(comm.rank, 300)], codec=codec, tag="q", algorithm="zz")
        assert feedback.state_dict()["q"].any()
        feedback.skip()
        assert not feedback.state_dict()["q"].any()

    ranks(fn, 2)


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


def test_states_of_other_parameters_are_refused(ranks: Ranks) -> None:
    """They are refused at once, without changes, if calls have been made and the parameters are known."""

    def fn(comm: Communicator) -> None:
        feedback = codecs.ErrorFeedback()
        codec = codecs.Int4(error_feedback=feedback)
        early = {"w": np.ones(300, F32), "late": np.ones(40, F32)}
        feedback.load_state_dict(early)
        comm.all_reduce(gaussian(comm.rank, 300), codec=codec, tag="w")
        before = feedback.state_dict()
        for wrong, words in (
            ({"v": np.ones(300, F32)}, "residual of 'v', which no call"),
            ({"w": np.ones(300, F32), "v": np.ones(3, F32)}, "residual of 'v', which no call"),
            ({"w": np.ones(299, F32)}, "'w' has 300 elements here, but its residual has 299"),
            ({"late": np.ones(41, F32)}, "'late' has 40 elements here, but its residual has 41"),
            ([early, {**early, "v": np.ones(3, F32)}], "some of the old ranks have a residual of 'v'"),
            ({"w": np.full(300, np.nan, F32)}, "holds NaN or Inf"),
        ):
            with pytest.raises(ValueError, match=words):
                feedback.load_state_dict(wrong)
            state = feedback.state_dict()
            assert state.keys() == before.keys()
            assert all((state[name] == before[name]).all() for name in before)
        feedback.skip()  # possible after a refusal, too
        assert (feedback.state_dict()["w"] == 1).all() and (before["w"] != 1).any()
        feedback.load_state_dict(before)
        assert (feedback.state_dict()["w"] == before["w"]).all()
        codecs.ErrorFeedback().load_state_dict({"v": np.ones(3, F32)})

    ranks(fn, 2)


def test_names_of_no_parameter_are_told_after_some_steps() -> None:
    """A new ErrorFeedback cannot tell at once: a parameter may have been renamed since the checkpoint."""

    def train(comm: pycomm.Communicator) -> dict[str, Any]:
        feedback = codecs.ErrorFeedback()
        codec = codecs.Int8(error_feedback=feedback)
        feedback.load_state_dict({name: np.ones(300, np.float32) for name in ("w", "old", "older")})
        for _ in range(15):
            for name in ("w", "new"):
                comm.all_reduce(gaussian(comm.rank, 300), codec=codec, tag=name)
        return feedback.state_dict()

    with pytest.warns(
        UserWarning, match="residuals of 'old', 'older', which no call .* had 'new', 'w'"
    ) as told:
        states = pycomm.run_local(train, 2)
    assert len(told) == 2  # once per rank
    assert all(each.filename == __file__ for each in told)
    for state in states:
        assert sorted(state) == ["new", "old", "older", "w"] and (state["old"] == 1).all()


def test_states_survive_savez_and_pickle(tmp_path: Path) -> None:
    feedback = codecs.ErrorFeedback()
    state = {"layer 0.weight": gaussian(1, 300), "b": gaussian(2, 1)}
    feedback.load_state_dict(state)
    saved = feedback.state_dict()
    np.savez(tmp_path / "state.npz", **saved)
    with np.load(tmp_path / "state.npz") as archive:
        for found in (archive, pickle.loads(pickle.dumps(saved))):
            again = codecs.ErrorFeedback()
            again.load_state_dict(found)
            assert all((again.state_dict()[name] == state[name]).all() for name in state)


def test_the_same_parameters_in_buckets_of_other_lengths(ranks: Ranks) -> None:
    """An exempt tensor has no residual, but still its place in the bucket."""

    def fn(comm: Communicator) -> None:
        codec = codecs.Int8(error_feedback=codecs.ErrorFeedback())
        w = gaussian(comm.rank, 256).reshape(16, 16)
        for others in (0, 300, 100_000, 0):
            tensors, names = [w], ["w"]
            if others:
                tensors, names = [w, np.ones(others, F32)], ["w", "b"]
            bucket = Bucket(tensors, names=names)
            bucket.pack()
            comm.all_reduce(bucket, codec=codec)
            assert sorted(codec.error_feedback.state_dict()) == ["w"]
            assert not others or (bucket.views[1] == comm.size).all()

    ranks(fn, 2)


@pytest.mark.parametrize("name", sorted(codecs.kinds.DEFAULTS))
def test_what_lies_between_tensors_stays_zero(ranks: Ranks, name: str) -> None:
    """Also if a codec turns a block with the end of a tensor into NaN."""

    def fn(comm: Communicator) -> None:
        for wrong in (1.0, np.nan):
            x = [gaussian(comm.rank, 63).reshape(7, 9), gaussian(comm.rank, 2000).reshape(20, 100)]
            x[0][0, 0] = x[1][-1, -1] = wrong if comm.rank == 0 else 2
            bucket, out = Bucket(x, names=["a", "b"]), Bucket(x, names=["a", "b"])
            bucket.pack()
            for to in (out, None):
                comm.all_reduce(bucket, out=to, codec=without_feedback(name))
                data = (bucket if to is None else to).data.copy()
                for segment in bucket.segments:
                    data[segment.begin : segment.end] = 0
                assert (data == 0).all()

    ranks(fn, 2)


def test_ranks_that_exempt_another_number_of_tensors(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        feedback = codecs.ErrorFeedback(lambda name, shape: name == "b" and comm.rank == 0)
        bucket = Bucket([np.ones((3, 100), F32), np.ones((2, 100), F32)], names=["a", "b"])
        bucket.pack()
        with pytest.raises(pycomm.MismatchError, match="exempt of 1"):
            comm.all_reduce(bucket, codec=codecs.Int8(error_feedback=feedback))

    ranks(fn, 2)


def test_a_list_whose_result_is_finite_in_part(ranks: Ranks) -> None:
    """Its calls, one for each type, count as one: all residuals stay, or none."""

    def fn(comm: Communicator) -> None:
        feedback = codecs.ErrorFeedback()
        codec = codecs.Int4(error_feedback=feedback)
        for wrong in (0, 1, 2, None):
            x = [gaussian(comm.rank, 300).reshape(3, 100) for _ in range(2)] + [gaussian(comm.rank, 5)]
            x[1] = x[1].astype(np.float16)
            if wrong is not None:
                x[wrong].flat[-1] = np.inf
            for async_op in (False, True):
                work = comm.all_reduce(x, codec=codec, tag="t", async_op=async_op)
                if async_op:
                    work.wait()
                state = feedback.state_dict()
                assert sorted(state) == ["t[0]", "t[1]"]
                assert all(residual.any() == (wrong is None) for residual in state.values())

    ranks(fn, 2)
