"""Traces of reducers' steps: the parts add up, and a rank that is late is seen by the others."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pycomm
from pycomm import Communicator, GradientReducer, trace

Ranks = Callable[..., list[Any]]
SHAPES = [(1000,), (50, 60), (7,)]


def step(reducer: GradientReducer, late: float = 0.0) -> None:
    for i in reversed(range(len(SHAPES))):
        time.sleep(0.002 + (late if i == 0 else 0))
        reducer.gradients[i][...] = i
        reducer.ready(i)
    reducer.finish()


@pytest.mark.parametrize("order", ["reverse", "priority"])
def test_the_parts_of_a_step_add_up(ranks: Ranks, order: Any) -> None:
    def fn(comm: Communicator) -> None:
        reducer = GradientReducer(SHAPES, comm, bucket_mb=0.004, order=order)
        step(reducer)
        with trace.start(comm) as traced:
            begin = time.perf_counter_ns()
            for _ in range(5):
                step(reducer, late=0.1 if comm.rank == 1 else 0)
            end = time.perf_counter_ns()
        assert len(traced.ranks) == 2
        for steps in traced.ranks:
            assert len(steps) == 4  # from the next step on
            for each in steps:
                assert sorted(flight.bucket for flight in each.flights) == [0, 1, 2]
                for flight in each.flights:
                    assert flight.algorithm and flight.bytes > 0 and "bucket of" in flight.signature
                    assert each.begin < flight.ready <= flight.sent <= flight.finished <= each.end
                    assert flight.sent <= min(flight.arrived, flight.turn)
                    assert max(flight.arrived, flight.turn) < flight.finished
                    assert flight.sent <= flight.started < flight.finished
                    assert 0 < flight.first_arrived <= flight.arrived
                whole, compute, exposed, late, communication, overlap = trace._shares(each)
                assert whole == pytest.approx(compute + exposed + late, abs=1e-8)
                assert min(compute, exposed, late, overlap) >= 0 and communication > 0 and overlap <= 1
        for each in traced.ranks[comm.rank][1:]:
            assert begin < each.begin < each.end < end
        waiting, late = traced.summary(0), traced.summary(1)
        assert waiting.late_rank == 1
        assert waiting.late > late.late
        assert waiting.stolen >= 0

    ranks(fn, 2)


def test_how_far_late_gradients_had_turned(ranks: Ranks) -> None:
    """Gradients turn by 90 degrees in every step, so after two steps they are opposite."""

    def fn(comm: Communicator) -> list[Any]:
        found = []
        for lag in (0, 1, 2):
            reducer = GradientReducer([(2,), (2,)], comm, lag=lag)
            with trace.start(comm) as traced:
                for quarter in range(8):
                    angle = quarter * np.pi / 2
                    for i in range(2):
                        reducer.gradients[i][...] = 3 * np.cos(angle), 3 * np.sin(angle)
                        reducer.ready(i)
                    reducer.finish()
            found.append(traced.summary(comm.rank).cosine)
            for flight in (flight for step in traced.ranks[comm.rank] for flight in step.flights):
                assert flight.sent <= flight.started
            assert ("cosine" in traced.report()) == (lag > 0)
        return found

    for none, orthogonal, opposite in ranks(fn, 2):
        assert none is None
        assert orthogonal == pytest.approx(0, abs=1e-6)
        assert opposite == pytest.approx(-1)


def test_it_is_reported_saved_and_drawn(ranks: Ranks, tmp_path: Path, capsys: Any) -> None:
    def fn(comm: Communicator) -> str | None:
        reducer = GradientReducer(SHAPES, comm)
        traced = trace.start(comm, steps=3)
        for _ in range(6):
            step(reducer)
        traced.stop()
        traced.stop()
        assert [len(steps) for steps in traced.ranks] == [3, 3]
        if comm.rank:
            return None
        traced.save(tmp_path / "step.json")
        traced.plot(tmp_path / "step.png", step=0)
        return traced.report()

    text = ranks(fn, 2)[0]
    assert text.splitlines()[0].startswith("3 steps")
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["0", "1"]
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    named = {(event["pid"], event["name"]) for event in events if event["ph"] == "X"}
    assert {(rank, name) for rank in range(2) for name in ("compute", "in the reducer", "bucket 0")} <= named
    assert all(event["dur"] > 0 for event in events if event["ph"] == "X")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_steps_whose_calls_have_left_the_log_are_left_out(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        reducer = GradientReducer([(8,)] * 100, comm, bucket_mb=1e-6)
        assert len(reducer.buckets) == 100
        reached = trace.start(comm, steps=4)
        for _ in range(6):
            for i in reversed(range(100)):
                reducer.ready(i)
            reducer.finish()
        reached.stop()
        for steps in reached.ranks:
            assert 0 < len(steps) < 4
            for each in steps:
                assert len(each.flights) == 100
                assert all(flight.sent <= flight.started < flight.finished for flight in each.flights)

    ranks(fn, 2)


def test_buckets_of_which_tensors_are_exempt_from_a_codec(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        reducer = GradientReducer(SHAPES, comm, codec="int8", error_feedback=True)
        with trace.start(comm) as traced:
            for _ in range(3):
                step(reducer)
        for steps in traced.ranks:
            assert len(steps) == 2
            assert all(each.codec.startswith("int8") and each.bytes for s in steps for each in s.flights)

    ranks(fn, 2)


def test_misuse_names_the_remedy(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        with pytest.raises(TypeError, match="pycomm.Communicator"):
            trace.start(5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="`steps` is 0"):
            trace.start(comm, steps=0)
        traced = trace.start(comm)
        with pytest.raises(ValueError, match="stop"):
            trace.start(comm)
        with pytest.raises(ValueError, match="call stop"):
            traced.report()
        traced.stop()
        with pytest.raises(ValueError, match="no whole step was traced"):
            traced.summary(0)
        assert trace.active(comm) is None

    ranks(fn, 2)


def flights(*sent_and_finished: tuple[int, int]) -> list[trace.Flight]:
    return [trace.Flight(i, "", 0, sent, finished=end) for i, (sent, end) in enumerate(sent_and_finished)]


def test_a_bucket_is_on_its_way_once_all_ranks_have_sent_it() -> None:
    """Rank 1 sends the first bucket 5 after rank 0 has, and the second one 3 after the first is back."""
    ranks = [
        [trace.Step("a", 7, 0, 50, [(30, 50)], flights((10, 40), (20, 48)))],
        [trace.Step("a", 6, 0, 1), trace.Step("a", 7, 1, 50, [(35, 49)], flights((15, 41), (43, 49)))],
    ]
    trace._bring_together(ranks)
    assert [[step.number for step in steps] for steps in ranks] == [[7], [7]]  # what both have
    here, there = ranks[0][0].flights, ranks[1][0].flights
    assert [f.waits for f in here] == [(10, 15), (40, 43)]
    assert [f.communicates for f in here] == [(15, 40), (43, 48)]
    assert [f.communicates for f in there] == [(15, 41), (43, 49)]
    assert [f.late_rank for f in here + there] == [1, 1, -1, -1]
    assert [f.first_arrived for f in here + there] == [15, 43, 10, 20]
    step, compute, exposed, late, communication, overlap = trace._shares(ranks[0][0])
    in_ns = [round(x * 1e9) for x in (step, compute, exposed, late, communication)]
    assert in_ns == [50, 30, 17, 3, 30]
    assert overlap == pytest.approx(0.5)  # from 15 to 30


@pytest.mark.parametrize(
    "codec",
    [{"codec": "bf16"}, {"codec": "int8", "error_feedback": True}],
    ids=lambda codec: codec["codec"],
)
def test_compressed_buckets_are_traced(ranks: Ranks, codec: Any) -> None:
    """With error feedback 1-D tensors stay exact, in a call of their own, which the bucket waits for."""

    def fn(comm: Communicator) -> None:
        shapes = [(40,), (30, 40), (20,), (50, 60)]
        reducer = GradientReducer(shapes, comm, bucket_mb=0.006, **codec)
        assert reducer.buckets == ((3,), (2, 1, 0))
        like = [[np.empty(shapes[i], np.float32) for i in bucket] for bucket in reducer.buckets]
        sizes = [pycomm.Bucket(arrays).data.nbytes for arrays in like]
        with trace.start(comm) as traced:
            for _ in range(4):
                for i in reversed(range(4)):
                    reducer.ready(i)
                reducer.finish()
            calls = comm.all_reduce(np.ones(3), tag="no bucket")
            assert (calls == 2).all()
        for steps in traced.ranks:
            assert [step.number for step in steps] == [0, 1, 2]
            for each in steps:
                assert [flight.bucket for flight in each.flights] == [0, 1]
                for flight, size in zip(each.flights, sizes, strict=True):
                    assert flight.codec.startswith(codec["codec"])
                    assert flight.bytes == size
                    assert flight.sent <= flight.started < flight.finished <= each.end

    ranks(fn, 2)


def call(tag: str, size: int, started: int, finished: int) -> list[Any]:
    return [0, "all_reduce", "ring", "", tag, size, started, finished, 0, 0, -1]


def test_calls_that_belong_to_a_bucket() -> None:
    one, two = "of 2, #11111111", "of 3, #22222222"
    calls = [
        call("exempt of 1, #33333333: 'b' (4,)", 16, 1, 2),  # of a step whose other calls are lost
        call(f"exempt of 1, #33333333, bucket {one}: 'w' (8, 4); 'b' (4,)", 144, 3, 5),
        call("exempt of 1, #33333333: 'b' (4,)", 16, 5, 6),
        call(f"bucket {two}: ABC", 400, 6, 8),
        call("of another's", 8, 8, 9),
        call(f"exempt of 1, #33333333, bucket {one}: 'w' (8, 4); 'b' (4,)", 144, 9, 11),
        call("exempt of 1, #33333333: 'b' (4,)", 16, 11, 12),
        call(f"factors {two}: ABC", 100, 12, 14),
    ]
    found = trace._by_bucket(calls)
    assert found == {one: [calls[1:3], calls[5:7]], two: [[calls[3], calls[7]]]}


def test_alone_nobody_is_late() -> None:
    ranks = [[trace.Step("a", 0, 0, 50, [(10, 30)], flights((10, 30)))]]
    trace._bring_together(ranks)
    (flight,) = ranks[0][0].flights
    assert (flight.waits, flight.communicates, flight.late_rank) == ((10, 10), (10, 30), -1)


def test_all_time_in_the_reducer_counts(ranks: Ranks) -> None:
    """That of every ready() and of finish(), whether a bucket is sent or not."""

    def fn(comm: Communicator) -> None:
        reducer = GradientReducer(SHAPES, comm)
        assert len(reducer.buckets) == 1
        with trace.start(comm) as traced:
            for _ in range(3):
                step(reducer)
        for each in traced.ranks[comm.rank]:
            assert len(each.blocked) == len(SHAPES) + 1
            assert trace.Step.from_dict(json.loads(json.dumps(each.as_dict()))) == each

    ranks(fn, 2)


def test_intervals() -> None:
    assert trace._merged([(5, 7), (1, 3), (2, 4), (7, 8), (9, 9)]) == [(1, 4), (5, 8)]
    assert trace._without([(0, 10)], [(8, 12), (2, 3), (-1, 1)]) == [(1, 2), (3, 8)]
    assert trace._without([(0, 2), (4, 6)], []) == [(0, 2), (4, 6)]
    assert trace._without([(0, 2)], [(0, 2)]) == []


def test_calls_are_logged_while_asked_for(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = np.ones(100, np.float32)
        comm.log_calls(4)
        for i in range(6):
            comm.all_reduce(x, tag=f"call {i}")
        comm.all_reduce(x, codec="int8", tag="coded", async_op=True).wait()
        calls, dropped = comm.take_log()
        assert dropped == 3
        assert [call[4] for call in calls] == ["call 3", "call 4", "call 5", "coded"]
        before = 0
        for number, collective, algorithm, codec, tag, size, started, finished, first, last, late in calls:
            assert number > before and collective == "all_reduce" and algorithm and size == 400
            assert codec.startswith("int8") == (tag == "coded")
            assert started <= finished and first <= last <= finished and late in (1 - comm.rank,)
            before = number
        comm.log_calls(0)
        comm.all_reduce(x)
        assert comm.take_log() == ([], 0)

    ranks(fn, 2)


def test_a_trace_ends_with_the_group() -> None:
    def fn(comm: Communicator) -> None:
        with pytest.raises(pycomm.CommError), trace.start(comm) as traced:
            if comm.rank == 1:
                raise pycomm.CommError("this rank gives up")
            comm.barrier(timeout=0.2)
        assert trace.active(comm) is None
        traced.stop()

    pycomm.run_local(fn, 2)


def test_reducers_may_end_their_steps_in_another_order(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        reducers = [GradientReducer([shape], comm) for shape in ((300,), (70,))]
        with trace.start(comm) as traced:
            for _ in range(3):
                for reducer in reducers:
                    reducer.gradients[0][...] = 1
                    reducer.ready(0)
                for reducer in reducers if comm.rank == 0 else reversed(reducers):
                    reducer.finish()
        for steps in traced.ranks:
            assert len({step.reducer for step in steps}) == 2
            assert sorted(step.number for step in steps) == [0, 0, 1, 1]

    ranks(fn, 2)
