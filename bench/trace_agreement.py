"""Whether pycomm.trace says what a clock says, and what tracing costs: `python bench/trace_agreement.py`.

Two ranks make steps of a GradientReducer, with made-up computation before each gradient: a sleep, which
leaves the core to pycomm's thread, or a busy loop, which competes with it where a rank has one core. A clock
around the parts of the same steps gives one column, the trace of rank 0 the other, in medians over steps:

step, compute       a step, and of it what the made-up computation took
added               the rest of the step: what the trace calls exposed and waiting
with - without      steps beside steps in turn that only compute: again exposed and waiting
communication       when at least one bucket had been sent by all ranks and was not back yet
overlap             (compute + communication - union of both) / communication
waiting             rank 1 sleeps before the only bucket: how long rank 0 has to wait

The last line is steps with and without a trace, in turn. That and `with - without` compare different steps:
they need a quiet machine. The other lines do not, since clock and trace see the same steps.
"""

from __future__ import annotations

import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

import pycomm
from pycomm.trace import Interval, Trace, _length, _merged, _shares, now

BLOCKS, STEPS = 10, 10  # steps in turn: blocks of the one kind and of the other
LARGE = [(1 << 19,)] * 12  # 2 MiB each, in buckets of 2 and 8 MiB
SMALL = [(1 << 15,)] * 4  # one bucket
BUCKET_MB = 8
LATE = 5e-3  # seconds
BLOCK = bytes(1 << 16)


def busy(seconds: float) -> None:
    """Leaves the interpreter to other threads, as computation in NumPy or torch does, but not the core."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        zlib.crc32(BLOCK)


class Clock:
    """Notes when buckets are sent and back, and when this rank computes, in ns; a list for each step."""

    def __init__(self, comm: pycomm.Communicator) -> None:
        self.computes: list[list[Interval]] = []
        self.sent: list[list[int]] = []
        self.back: list[list[int]] = []
        self.steps: list[int] = []
        self.late: list[int] = []  # how long this rank slept before the step
        self._all_reduce = comm.all_reduce
        comm.all_reduce = self._noted  # type: ignore[method-assign]  # the reducer calls this one

    def _noted(self, *args: Any, **more: Any) -> Any:
        self.sent[-1].append(now())
        back = self.back[-1]
        work = self._all_reduce(*args, **more)
        work.add_done_callback(lambda _: back.append(now()))
        return work

    def step(self, reducer: pycomm.GradientReducer, compute: Callable[[], None], late: float = 0) -> None:
        for times in (self.computes, self.sent, self.back):
            times.append([])
        begin = now()
        if late:
            time.sleep(late)
        self.late.append(now() - begin)
        for i in reversed(range(len(reducer.gradients))):
            computing = now()
            compute()
            computed = now()
            reducer.ready(i)
            self.computes[-1].append((computing, computed))
        reducer.finish()
        self.steps.append(now() - begin)

    def forget(self) -> None:
        """The last step, which is not like the others."""
        for times in (self.computes, self.sent, self.back, self.steps, self.late):
            times.pop()


def alone(gradients: int, compute: Callable[[], None]) -> int:
    """The time of a step that only computes, in ns."""
    begin = now()
    for _ in range(gradients):
        compute()
    return now() - begin


def measured(
    comm: pycomm.Communicator, shapes: list[tuple[int]], compute: Callable[[], None], late: float = 0
) -> tuple[dict[str, float], dict[str, float], Trace]:
    """Medians in seconds: by the clock on this rank, and by the trace on rank 0; and that trace."""
    reducer = pycomm.GradientReducer(shapes, comm, bucket_mb=BUCKET_MB)
    clock, without = Clock(comm), []
    lasts = late if comm.rank == 1 else 0.0
    with pycomm.trace.start(comm, steps=BLOCKS * (STEPS + 1)) as trace:
        clock.step(reducer, compute)  # the trace begins with the next one
        clock.forget()
        for _ in range(BLOCKS):
            without += [alone(len(shapes), compute) for _ in range(STEPS)]
            clock.step(reducer, compute, lasts)  # for the trace this one began before those
            clock.forget()
            for _ in range(STEPS):
                clock.step(reducer, compute, lasts)
    del comm.all_reduce  # the class's own again
    for steps in trace.ranks:
        del steps[:: STEPS + 1]
    assert len(trace.ranks[0]) == len(clock.steps)

    everyones = comm.all_gather(np.array(clock.sent)[np.newaxis])  # by rank, step and bucket
    on_its_way = [
        _merged(zip(sent.tolist(), back, strict=True))
        for sent, back in zip(everyones.max(axis=0), clock.back, strict=True)
    ]
    computes = [_length(intervals) for intervals in clock.computes]
    communicates = [_length(intervals) for intervals in on_its_way]
    unions = [_length(_merged(a + b)) for a, b in zip(clock.computes, on_its_way, strict=True)]
    parts = list(zip(computes, communicates, unions, strict=True))
    ns = {
        "step": median(clock.steps),
        "compute": median(computes),
        "added": median(all_of - part for all_of, part in zip(clock.steps, computes, strict=True)),
        "with - without": median(clock.steps) - median(without),
        "communication": median(communicates),
        "waiting": float(comm.all_gather(np.array([median(clock.late)])).max()),
    }
    clocked = {what: time / 1e9 for what, time in ns.items()}
    clocked["overlap"] = median((c + m - union) / m for c, m, union in parts)
    shares = [_shares(step) for step in trace.ranks[0]]
    step, computed, _, waiting, communication, overlap = map(median, zip(*shares, strict=True))
    added = median(exposed + late for _, _, exposed, late, _, _ in shares)
    traced = {
        "step": step,
        "compute": computed,
        "added": added,
        "with - without": added,
        "communication": communication,
        "overlap": overlap,
        "waiting": waiting,
    }
    return clocked, traced, trace


def compare(title: str, clock: dict[str, float], traced: dict[str, float], rows: list[str]) -> None:
    print(f"\n{title}\n{'':<16}{'clock':>10}{'trace':>10}{'difference':>12}{'of the step':>13}")
    for row in rows:
        by_clock, by_trace = clock[row], traced[row]
        if row == "overlap":
            print(f"{row:<16}{by_clock:>10.1%}{by_trace:>10.1%}{by_trace / by_clock - 1:>+12.1%}")
            continue
        print(
            f"{row:<16}{by_clock * 1e3:>7.2f} ms{by_trace * 1e3:>7.2f} ms{by_trace / by_clock - 1:>+12.1%}"
            f"{(by_trace - by_clock) / clock['step']:>+13.1%}"
        )


def cost(comm: pycomm.Communicator, compute: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of a step with a trace, and of one without."""
    reducer = pycomm.GradientReducer(LARGE, comm, bucket_mb=BUCKET_MB)

    def step() -> int:
        begin = now()
        for i in reversed(range(len(LARGE))):
            compute()
            reducer.ready(i)
        reducer.finish()
        return now() - begin

    times: dict[bool, list[int]] = {True: [], False: []}
    for block in range(2 * BLOCKS + 1):
        on = block % 2 == 0
        trace = pycomm.trace.start(comm) if on else None
        step()
        times[on] += [step() for _ in range(STEPS)]
        if trace is not None:
            trace.stop()
    return median(times[True]) / 1e9, median(times[False]) / 1e9


def as_a_rank() -> None:
    comm = pycomm.init()
    added = ["step", "added", "with - without", "communication"]
    clock, traced, _ = measured(comm, LARGE, lambda: None)
    if comm.rank == 0:
        compare(f"{len(LARGE)} gradients, no computation", clock, traced, added)
    for kind, do in (("sleep", time.sleep), ("busy loop", busy)):
        for seconds in (0.5e-3, 2e-3):
            clock, traced, _ = measured(comm, LARGE, partial(do, seconds))
            if comm.rank == 0:
                title = f"{len(LARGE)} gradients, a {kind} of {seconds * 1e3} ms before each"
                compare(title, clock, traced, ["compute", *added, "overlap"])
    clock, traced, trace = measured(comm, SMALL, partial(time.sleep, 1e-3), late=LATE)
    if comm.rank == 0:
        compare(f"one bucket, rank 1 is {LATE * 1e3} ms late", clock, traced, ["step", "waiting"])
        trace.report()
    on, off = cost(comm, partial(time.sleep, 1e-3))
    if comm.rank == 0:
        print(f"\na step: {on * 1e3:.2f} ms with a trace, {off * 1e3:.2f} ms without: {on / off - 1:+.2%}")
    comm.close()


def main() -> int:
    command = [sys.executable, "-m", "pycomm", "run", "-n", "2", __file__, "as_a_rank"]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    if sys.argv[1:] == ["as_a_rank"]:
        as_a_rank()
    else:
        sys.exit(main())
