"""Asynchronous calls: order, waiting, errors, and what they keep alive."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pycomm
from pycomm import Communicator

Ranks = Callable[..., list[Any]]

pytestmark = pytest.mark.links


def test_work(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = np.full(1000, comm.rank + 1.0)
        work = comm.all_reduce(x, async_op=True)
        assert isinstance(work, pycomm.Work)
        assert work.wait() is x
        assert work.is_completed() and work.exception() is None
        assert work.result() is x and work.wait(1) is x
        assert (x == 6).all()
        assert comm.barrier(async_op=True).wait() is None
        gathered = comm.all_gather(np.array([comm.rank]), async_op=True).wait()
        assert gathered.tolist() == [0, 1, 2]
        for call in (comm.broadcast, comm.reduce, comm.gather):
            call(np.zeros(3), root=2, async_op=True).wait()
        assert comm.scatter(np.arange(3), async_op=True, out=np.empty(1, int)).wait() == [comm.rank]
        assert comm.reduce_scatter(np.arange(3), async_op=True).wait() == [3 * comm.rank]
        assert comm.all_to_all(np.arange(3), async_op=True).wait().tolist() == [comm.rank] * 3

    ranks(fn, 3)


def test_many_in_flight_complete_in_order(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        xs = [np.full(1 + 37 * i, comm.rank + i, np.float32) for i in range(200)]
        works = [comm.all_reduce(x, async_op=True) for x in xs]
        y = comm.all_reduce(np.ones(5))  # synchronous: runs after them all
        assert (y == comm.size).all()
        assert all(work.is_completed() for work in works)
        for i, x in enumerate(xs):
            assert (x == i * comm.size + 1).all(), i
        works = [comm.all_reduce(np.full(10, float(i)), async_op=True) for i in range(100)]
        assert [work.wait()[0] for work in reversed(works)] == [2.0 * i for i in reversed(range(100))]

    ranks(fn, 2)


def test_the_progress_thread_needs_nobody_to_wait(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        work = comm.all_reduce(np.ones(100_000), async_op=True)
        deadline = time.monotonic() + 20
        while not work.is_completed():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert (work.result() == comm.size).all()

    ranks(fn, 2)


def test_wait_with_a_timeout(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        other = comm.split(0)
        if comm.rank == 0:
            work = comm.all_reduce(np.ones(3), async_op=True)
            assert not work.is_completed() and work.exception() is None
            started = time.monotonic()
            with pytest.raises(pycomm.CommTimeoutError, match="it goes on"):
                work.wait(0.1)
            assert 0.1 <= time.monotonic() - started < 5
            assert not work.is_completed()
            other.barrier()
            assert (work.wait(30) == 2).all()
        else:
            other.barrier()
            assert (comm.all_reduce(np.ones(3)) == 2).all()

    ranks(fn, 2)


def test_buffers_live_as_long_as_their_call(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        other = comm.split(0)
        if comm.rank == 0:
            x = np.full(50_000, 2.0)
            out = np.empty_like(x)
            dropped = weakref.ref(x), weakref.ref(out)
            comm.all_reduce(x, out=out, async_op=True)  # even the Work is dropped
            comm.all_reduce([np.ones(4), np.ones(5, np.float32)], async_op=True)
            del x, out
            gc.collect()
            assert all(reference() is not None for reference in dropped)
            other.barrier()
        else:
            other.barrier()
            assert (comm.all_reduce(np.full(50_000, 1.0)) == 3).all()
            comm.all_reduce([np.ones(4), np.ones(5, np.float32)])
        for _ in range(20):  # the progress thread drops them soon after the call has ended
            comm.barrier()
            time.sleep(0.001)
        gc.collect()
        assert comm.rank or all(reference() is None for reference in dropped)

    ranks(fn, 2)


def test_what_a_view_is_of_is_not_resized(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        gate = comm.split(0)
        whole = np.ones(100_000)
        if comm.rank == 0:
            work = comm.all_reduce(whole[:50_000], async_op=True)
            with pytest.raises(ValueError, match="cannot resize"):
                whole.resize(10, refcheck=False)
            gate.barrier()
        else:
            gate.barrier()
            work = comm.all_reduce(whole[:50_000], async_op=True)
        work.wait()
        assert whole[0] == comm.size

    ranks(fn, 2)


def test_lists_may_change_while_their_call_is_under_way(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        gate = comm.split(0)
        given, out = [np.ones(50_000), np.ones(7)], [np.zeros(50_000), np.zeros(7)]
        dropped = [weakref.ref(x) for x in out]
        if comm.rank == 1:
            gate.barrier()
        work = comm.all_reduce(given, out=out, async_op=True)
        given.clear()
        out.clear()
        gc.collect()
        if comm.rank == 0:
            assert all(reference() is not None for reference in dropped)
            gate.barrier()
        work.wait()

    ranks(fn, 2)


def test_errors_come_out_of_wait(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        count = 5 if comm.rank == 0 else 6
        work = comm.all_reduce(np.ones(count), async_op=True)
        try:
            behind = comm.all_reduce(np.ones(3), async_op=True)
        except pycomm.CommError:  # the first call had failed before
            behind = None
        with pytest.raises(pycomm.MismatchError, match="5.*6|6.*5"):
            work.wait()
        assert work.is_completed()
        assert isinstance(work.exception(), pycomm.MismatchError)
        with pytest.raises(pycomm.MismatchError):
            work.result()
        if behind:
            with pytest.raises(pycomm.CommError):
                behind.wait()
        with pytest.raises(pycomm.AbortedError, match="count="):
            comm.all_reduce(np.ones(3), async_op=True)

    ranks(fn, 2)


def test_closing_completes_what_is_queued(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        works = [comm.all_reduce(np.full(10_000, comm.rank + 1.0), async_op=True) for _ in range(20)]
        comm.close()
        assert all(work.is_completed() for work in works)
        assert all((work.result() == 3).all() for work in works)
        with pytest.raises(pycomm.AbortedError, match="closed"):
            comm.barrier(async_op=True)

    ranks(fn, 2)


def test_a_communicator_dropped_with_work_in_flight(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        half = comm.split(0)
        work = half.all_reduce(np.ones(1000), async_op=True)
        del half
        gc.collect()
        assert (work.wait() == 2).all()

    ranks(fn, 2)


def test_several_threads_of_a_rank_wait(ranks: Ranks) -> None:
    """The first thread to wait drives the queue; all get their results."""

    def fn(comm: Communicator) -> None:
        works = [comm.all_reduce(np.full(3000, i, np.float32), async_op=True) for i in range(40)]
        wrong: list[int] = []

        def wait(i: int) -> None:
            if not (works[i].wait() == i * comm.size).all():
                wrong.append(i)

        threads = [threading.Thread(target=wait, args=(i,)) for i in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert not wrong

    ranks(fn, 2)


def test_groups_side_by_side_from_several_threads(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        groups = [comm.split(0) for _ in range(3)]
        wrong: list[object] = []

        def work(i: int) -> None:
            for k in range(30):
                x = np.full(100 + 1000 * i, i + k + comm.rank, np.float64)
                if not (groups[i].all_reduce(x) == 2 * (i + k) + 1).all():
                    wrong.append((i, k))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert not wrong

    ranks(fn, 2)


def test_timeouts_that_are_none() -> None:
    def fn(comm: Communicator) -> None:
        work = comm.all_reduce(np.ones(3), async_op=True)
        for timeout in (float("nan"), -1.0):
            with pytest.raises(ValueError, match="`timeout` is"):
                work.wait(timeout)
        work.wait(0.5)

    pycomm.run_local(fn, 1)


def test_polling_does_not_hold_calls_up(ranks: Ranks) -> None:
    """A polling thread holds the interpreter's lock: calls end and begin without it. Only a hang fails."""

    def fn(comm: Communicator) -> None:
        before = time.monotonic()
        works = [comm.all_reduce(np.ones(4), async_op=True) for _ in range(3000)]
        while not works[-1].is_completed():
            pass
        assert time.monotonic() - before < 10
        assert all(work.wait()[0] == comm.size for work in works)

    ranks(fn, 2)


def test_done_callbacks(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        told: list[Any] = []
        ready = threading.Event()
        x = np.full(100_000, comm.rank + 1.0)
        work = comm.all_reduce(x, async_op=True)
        work.add_done_callback(lambda done: told.append((done.wait() is x, x[0], done.exception())))
        work.add_done_callback(lambda done: (told.append(done.is_completed()), ready.set()))
        assert ready.wait(20)
        assert told == [(True, 3.0, None), True]
        work.add_done_callback(lambda done: told.append("at once"))
        assert told[-1] == "at once"
        with pytest.raises(TypeError, match="`fn` is a int"):
            work.add_done_callback(3)  # type: ignore[arg-type]

    ranks(fn, 2)


def test_a_done_callback_may_call(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        seen: list[float] = []
        over = threading.Event()

        def then(work: pycomm.Work) -> None:
            seen.append(comm.all_reduce(work.result() * 10)[0])  # blocking, after the calls made before
            over.set()

        comm.all_reduce(np.ones(10), async_op=True).add_done_callback(then)
        assert over.wait(20)
        assert seen == [40.0]

    ranks(fn, 2)


def test_done_callbacks_of_calls_that_fail(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        errors: list[BaseException | None] = []
        work = comm.all_reduce(np.ones(10 + comm.rank), async_op=True)
        work.add_done_callback(lambda done: errors.append(done.exception()))
        with pytest.raises(pycomm.MismatchError):
            work.wait()
        with pytest.raises(pycomm.AbortedError):
            comm.barrier()
        while not errors:
            time.sleep(0.001)
        assert isinstance(errors[0], pycomm.MismatchError)

    ranks(fn, 2)


def test_what_a_done_callback_raises_is_unraisable(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: found.append(unraisable.exc_value))

    def fn(comm: Communicator) -> None:
        def fail(work: pycomm.Work) -> None:
            raise KeyError("mine")

        comm.all_reduce(np.ones(3), async_op=True).add_done_callback(fail)
        comm.barrier()

    pycomm.run_local(fn, 2)
    assert [type(error) for error in found] == [KeyError, KeyError]


def test_the_last_reference_goes_with_a_done_callback() -> None:
    """The progress thread drops the last reference, and cannot close the group itself."""
    over = threading.Event()
    comms = [pycomm.init()]

    def drop(work: pycomm.Work) -> None:
        comms.clear()
        over.set()

    comms[0].all_reduce(np.ones(1 << 20), async_op=True).add_done_callback(drop)
    assert over.wait(20)
    gc.collect()


def test_done_callbacks_of_a_codec(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        told: list[Any] = []
        for codec in ("int8", pycomm.codecs.TopK(k=10, error_feedback=False)):
            x = np.zeros(4000, np.float32)
            x[0] = 5
            work = comm.all_reduce(x, codec=codec, async_op=True)
            work.add_done_callback(told.append)
            assert work.wait()[0] == pytest.approx(10, rel=0.01)
            while work not in told:
                time.sleep(0.001)

    ranks(fn, 2)


def test_a_done_callback_cannot_close() -> None:
    """Otherwise the progress thread would wait for itself."""
    found: list[Any] = []
    over = threading.Event()
    comm = pycomm.init()

    def close(work: pycomm.Work) -> None:
        found.append(threading.current_thread() is threading.main_thread())
        try:
            comm.close()
        except pycomm.CommError as error:
            found.append(str(error))
        over.set()

    comm.all_reduce(np.ones(1 << 20), async_op=True).add_done_callback(close)
    assert over.wait(20)
    if not found[0]:
        assert "closes its communicator in a completion callback" in found[1]
    comm.close()


@pytest.mark.parametrize("core", ["1", "-1", "1000"])
def test_the_progress_thread_stays_on_its_core(core: str) -> None:
    """A thread of its own has the one core that is named, of those of the process; or any, and a warning."""
    program = """
import os, time, numpy as np, pycomm
comm = pycomm.init()
before = set(os.listdir("/proc/self/task"))
comm.all_reduce(np.ones(100_000), async_op=True).wait()
ours = sorted(os.sched_getaffinity(0))
expected = {"1": ours[:1], "-1": ours[-1:], "1000": ours}[os.environ["PYCOMM_PROGRESS_CORE"]]
(thread,) = set(os.listdir("/proc/self/task")) - before
for _ in range(1000):  # it may not have run yet
    if sorted(os.sched_getaffinity(int(thread))) == expected and comm.progress_seconds > 0:
        break
    time.sleep(0.01)
else:
    raise SystemExit(f"{os.sched_getaffinity(int(thread))}, not {expected}")
"""
    environment = os.environ | {"PYCOMM_PROGRESS_CORE": core, "OPENBLAS_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ("PYCOMM_PROGRESS_CORE=1000" in ran.stderr) == (core == "1000")
