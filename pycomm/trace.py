"""What communication costs a training step, and why: when each bucket was ready, sent and done, on each rank.

Make steps of a GradientReducer inside of ``with pycomm.trace.start(comm) as trace:``. Afterwards
``trace.report()`` prints a table, ``trace.save("step.json")`` writes a file for ui.perfetto.dev or
chrome://tracing, and ``trace.plot("step.png")`` draws a step.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from pycomm import checks, layouts
from pycomm.group import Communicator

Interval = tuple[int, int]  # ns

_active: WeakKeyDictionary[Communicator, Trace] = WeakKeyDictionary()


def start(comm: Communicator, steps: int = 100) -> Trace:
    """Traces the steps of GradientReducers of `comm` from their next step on, and keeps the latest `steps`
    (fewer, where steps have more than 64 calls).

    A collective call. Ends with the block of a `with` statement, or stop().
    """
    if not isinstance(comm, Communicator):
        raise TypeError(f"`comm` is {checks.shown(comm)}: pass a pycomm.Communicator")
    if checks.integer(steps, "steps") < 1:
        raise ValueError(f"`steps` is {steps}: pass how many steps to keep, at least 1")
    if comm in _active:
        raise ValueError("this group is traced already: stop() that trace first")
    return Trace(comm, steps)


def active(comm: Communicator) -> Trace | None:
    """The trace that this rank's calls of `comm` are part of."""
    return _active.get(comm)


@dataclass
class Flight:
    """A bucket's way in one step on one rank, times in ns of the clock that all processes of a machine share.

    At `turn` it has been sent here, and the bucket before it is back. From then on it waits for `late_rank`,
    which sends it last, until it has `arrived` there as well. After that it is on its way until it has
    `finished`: that is communication, also while no thread has a core to move it.
    """

    bucket: int
    signature: str
    ready: int
    sent: int = 0
    first_arrived: int = 0  # when the first of the other ranks sent it; 0: there is none
    arrived: int = 0  # when the last rank had sent it
    turn: int = 0
    started: int = 0  # its call, by the thread that moves it
    finished: int = 0
    late_rank: int = -1
    bytes: int = 0
    algorithm: str = ""
    codec: str = ""

    @property
    def communicates(self) -> Interval:
        return max(self.turn, self.arrived), self.finished

    @property
    def waits(self) -> Interval:
        return self.turn, max(self.turn, self.arrived)


@dataclass
class Step:
    """One step of a reducer on one rank. In `blocked` the training thread was inside the reducer; else it
    computed."""

    reducer: str  # the signature of its first bucket
    number: int  # among the reducer's steps in this trace, the same on all ranks
    begin: int
    end: int = 0
    blocked: list[Interval] = field(default_factory=list)
    flights: list[Flight] = field(default_factory=list)
    cosine: float | None = None  # with lag: between this step's gradients and the averages that it took

    # By the reducer, as it happens.

    def stops(self) -> None:
        """The training thread waits for the reducer from now on."""
        self._since = now()

    def goes_on(self) -> None:
        self.blocked.append((self._since, now()))

    def bucket_ready(self, bucket: int, signature: str) -> None:
        self.flights.append(Flight(bucket, signature, ready=self._since))

    def bucket_sent(self, bucket: int) -> None:
        next(flight for flight in self.flights if flight.bucket == bucket).sent = now()

    def end_step(self) -> None:
        self.goes_on()
        self.end = self.blocked[-1][1]

    # As what JSON holds, for another process.

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"blocked": [list(interval) for interval in self.blocked]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Step:
        blocked = [(begin, end) for begin, end in data["blocked"]]
        flights = [Flight(**flight) for flight in data["flights"]]
        return cls(**data | {"blocked": blocked, "flights": flights})


@dataclass
class Summary:
    """Of one rank, medians over steps, in seconds.

    `exposed`: by how much communication made the step longer; `late`: by how much waiting for others did;
    `overlap`: the share of communication behind which the rank computed. `cosine`, with lag: of the angle
    between the gradients of a step on this rank and the older averages that finish() brought in it, which
    says how far the gradients had turned; None without lag.
    """

    step: float
    compute: float
    exposed: float
    late: float
    communication: float
    overlap: float
    late_rank: int  # that was waited for longest; -1: none
    stolen: float  # processor time of the progress thread, per step
    cosine: float | None


class Trace:
    """See start(). After stop() every rank holds the steps of all."""

    def __init__(self, comm: Communicator, steps: int) -> None:
        self._comm: Communicator | None = comm
        self.ranks: list[list[Step]] = []  # by rank, after stop()
        self.stolen: list[float] = []  # by rank, seconds of the progress thread's processor time
        self.rank = comm.rank
        self._steps: deque[Step] = deque(maxlen=steps + 1)  # the last one has not ended
        self._kept = steps
        self._taken = 0  # steps, also those that are not kept
        self._numbers: dict[str, int] = {}  # of the latest step, by reducer
        comm.log_calls(64 * steps)
        self._progress = comm.progress_seconds
        _active[comm] = self

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.stop()
        elif self._comm is not None:
            _active.pop(self._comm, None)
            self._comm = None

    def stop(self) -> None:
        """Ends the trace, and collects it from all ranks: a collective call. A second stop() does nothing."""
        comm, self._comm = self._comm, None
        if comm is None:
            return
        comm.barrier(tag="trace.stop()")  # what was sent before has ended, and is in the log
        stolen = (comm.progress_seconds - self._progress) / max(self._taken, 1)
        calls, _ = comm.take_log()
        _active.pop(comm, None)
        comm.log_calls(0)
        ended = [step for step in self._steps if step.end]
        self._fill_in(ended, calls)
        whole = [step for step in ended if all(flight.finished for flight in step.flights)]
        mine = [step.as_dict() for step in whole[-self._kept :]]
        everyones: Any = comm.all_gather_object({"stolen": stolen, "steps": mine})
        self.stolen = [each["stolen"] for each in everyones]
        self.ranks = [[Step.from_dict(step) for step in each["steps"]] for each in everyones]
        _bring_together(self.ranks)

    def summary(self, rank: int) -> Summary:
        """What the steps of a rank cost; after stop(). Raises ValueError if no step was traced, IndexError if
        there is no such rank."""
        ranks = self._stopped()
        if not 0 <= rank < len(ranks):
            raise IndexError(f"`rank` is {rank}: there are {len(ranks)} ranks")
        steps = ranks[rank]
        shares = [_shares(step) for step in steps]
        waits: dict[int, int] = {}
        for flight in (flight for step in steps for flight in step.flights):
            waits[flight.late_rank] = waits.get(flight.late_rank, 0) + _length([flight.waits])
        late = max(waits, key=lambda each: waits[each], default=-1)
        step, compute, exposed, waiting, communication, overlap = map(median, zip(*shares, strict=True))
        late_rank = late if waits.get(late) else -1
        cosines = [each.cosine for each in steps if each.cosine is not None]
        cosine = median(cosines) if cosines else None
        return Summary(
            step, compute, exposed, waiting, communication, overlap, late_rank, self.stolen[rank], cosine
        )

    def report(self) -> str:
        """Prints a table of all ranks, and returns it."""
        lines = [
            f"{len(self._stopped()[0])} steps, medians in ms       of communication",
            "rank    step  compute  exposed  waiting (for)   total  overlap  progress thread",
        ]
        summaries = [self.summary(rank) for rank in range(len(self.ranks))]
        if any(s.cosine is not None for s in summaries):
            lines[1] += "  cosine"
        for rank, s in enumerate(summaries):
            late = f"({s.late_rank})" if s.late_rank >= 0 else ""
            lines.append(
                f"{rank:>4}{s.step * 1e3:>8.2f}{s.compute * 1e3:>9.2f}{s.exposed * 1e3:>9.2f}"
                f"{s.late * 1e3:>9.2f} {late:<5}{s.communication * 1e3:>8.2f}{s.overlap:>9.0%}"
                f"{s.stolen * 1e3:>17.2f}" + ("" if s.cosine is None else f"{s.cosine:>8.2f}")
            )
        text = "\n".join(lines)
        print(text)
        return text

    def save(self, path: str | Path) -> None:
        """Writes the trace as JSON for ui.perfetto.dev and chrome://tracing: a process for each rank."""
        events: list[dict[str, Any]] = []
        for rank, steps in enumerate(self._stopped()):
            events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})
            for row, name in enumerate(("training thread", "communication")):
                about = {"ph": "M", "pid": rank, "tid": row, "name": "thread_name", "args": {"name": name}}
                events.append(about)
            for step in steps:
                for interval in _without([(step.begin, step.end)], step.blocked):
                    events.append(_event(rank, 0, "compute", interval))
                for interval in step.blocked:
                    events.append(_event(rank, 0, "in the reducer", interval))
                for flight in step.flights:
                    what = {key: getattr(flight, key) for key in ("bytes", "algorithm", "codec", "signature")}
                    what |= {time: getattr(flight, time) / 1e3 for time in ("ready", "sent", "started")}
                    waits = f"waits for rank {flight.late_rank}"
                    events.append(_event(rank, 1, waits, flight.waits))
                    events.append(_event(rank, 1, f"bucket {flight.bucket}", flight.communicates, what))
        Path(path).write_text(json.dumps({"traceEvents": [e for e in events if e.get("dur") != 0]}))

    def plot(self, path: str | Path, step: int = -1) -> None:
        """Draws one of the traced steps, the latest by default, as a PNG: for each rank the training thread
        and below it the buckets. Needs matplotlib."""
        from matplotlib.figure import Figure

        chosen = [steps[step] for steps in self._stopped()]
        figure = Figure(figsize=(10, 1 + 0.9 * len(chosen)), layout="constrained")
        draw(figure.subplots(), chosen)
        figure.savefig(path, dpi=120)

    # ---- for the reducer ----

    def begin_step(self, reducer: str) -> Step:
        """The next step of a reducer, which counts once it has ended."""
        self._numbers[reducer] = self._numbers.get(reducer, -1) + 1
        step = Step(reducer, self._numbers[reducer], begin=now())
        self._steps.append(step)
        self._taken += 1
        return step

    # ---- inside ----

    def _fill_in(self, steps: list[Step], calls: list[Any]) -> None:
        """Brings the times of calls to the flights that they carried: a bucket's calls are in order. The
        oldest steps' calls may have left the log."""
        by_bucket = _by_bucket(calls)
        for step in reversed(steps):
            for flight in reversed(step.flights):
                ((_, bucket),) = layouts.lists(flight.signature)
                if not by_bucket.get(bucket):
                    continue
                found = by_bucket[bucket].pop()
                flight.algorithm, flight.codec = found[0][2:4]
                flight.bytes = sum(call[5] for call in found if layouts.lists(call[4])[-1][1] == bucket)
                flight.started, flight.finished = found[0][6], found[-1][7]

    def _stopped(self) -> list[list[Step]]:
        if not self.ranks:
            raise ValueError("the trace goes on: call stop(), on all ranks, or leave its `with` block")
        if not all(self.ranks):
            raise ValueError(
                "no whole step was traced: a step of a GradientReducer of this group lasts from one finish()"
                " to the next, so that it takes two to trace one"
            )
        return self.ranks


def now() -> int:
    return time.perf_counter_ns()


def draw(axes: Any, steps: Sequence[Step]) -> None:
    """Draws one step, as each rank saw it, into axes of matplotlib: `[steps[i] for steps in trace.ranks]`."""
    origin = min(step.begin for step in steps)

    def bars(intervals: Iterable[Interval]) -> list[tuple[float, float]]:
        return [((a - origin) / 1e6, (b - a) / 1e6) for a, b in intervals]

    for rank, step in enumerate(steps):
        computes = _without([(step.begin, step.end)], step.blocked)
        axes.broken_barh(bars(computes), (rank + 0.05, 0.4), color="#94a3b8")
        axes.broken_barh(bars(step.blocked), (rank + 0.05, 0.4), color="#dc2626")
        for flight in step.flights:
            color = ("#c2410c", "#f59e0b")[flight.bucket % 2]
            axes.broken_barh(bars([flight.waits]), (rank + 0.5, 0.4), color="#e2e8f0")
            axes.broken_barh(bars([flight.communicates]), (rank + 0.5, 0.4), color=color)
    axes.set(xlabel="ms", yticks=[rank + 0.5 for rank in range(len(steps))])
    axes.set_yticklabels([f"rank {rank}" for rank in range(len(steps))])
    axes.invert_yaxis()
    axes.set_title(
        "A step. Above: computing (gray), in the reducer (red); below: buckets on their way (orange),"
        " waiting for a late rank (light)",
        fontsize=9,
    )


def _by_bucket(calls: list[Any]) -> dict[str, list[list[Any]]]:
    """The calls of each bucket, in order, those of one step together: the bucket's own and what follows it.

    What a codec leaves out has a call of its own; the tag of the bucket's call names that list as well.
    """
    found: dict[str, list[list[Any]]] = {}
    part_of: dict[str, str] = {}
    for call in calls:
        *parts, (word, key) = layouts.lists(call[4]) or [("", "")]
        if word == "bucket":
            found.setdefault(key, []).append([call])
            part_of.update((part, key) for _, part in parts)
        elif bucket := found.get(part_of.get(key, key)):
            bucket[-1].append(call)
    return found


def _bring_together(ranks: list[list[Step]]) -> None:
    """Keeps the steps that every rank has, and brings to each flight when the other ranks sent the bucket.

    A rank comes with a bucket when its training thread sends it. That its progress thread starts the call
    later, for want of a core, makes communication longer, and nobody late.
    """
    common = set.intersection(*({(step.reducer, step.number) for step in steps} for steps in ranks))
    for steps in ranks:
        steps[:] = [step for step in steps if (step.reducer, step.number) in common]
    sent = [
        {(step.reducer, step.number, f.bucket): f.sent for step in steps for f in step.flights}
        for steps in ranks
    ]
    for rank, steps in enumerate(ranks):
        before = 0  # when the bucket before was back
        for step in steps:
            for flight in sorted(step.flights, key=lambda each: each.sent):
                key = step.reducer, step.number, flight.bucket
                others = {r: times[key] for r, times in enumerate(sent) if r != rank}
                last = max(others, key=lambda r: others[r], default=rank)
                flight.first_arrived = min(others.values(), default=0)
                flight.arrived = min(max(sent[last][key], flight.sent), flight.finished)
                flight.turn = min(max(flight.sent, before), flight.finished)
                flight.late_rank = last if flight.arrived > flight.turn else -1
                before = flight.finished


def _shares(step: Step) -> tuple[float, float, float, float, float, float]:
    """Of a step: its time, compute, exposed, late, communication, and overlap."""
    computes = _without([(step.begin, step.end)], step.blocked)
    communicates = _merged(flight.communicates for flight in step.flights)
    waits = _without(_merged(flight.waits for flight in step.flights), communicates)
    blocked = _merged(step.blocked)
    late = _length(blocked) - _length(_without(blocked, waits))
    hidden = _length(communicates) - _length(_without(communicates, computes))
    total = _length(communicates)
    return (
        (step.end - step.begin) / 1e9,
        _length(computes) / 1e9,
        (_length(blocked) - late) / 1e9,
        late / 1e9,
        total / 1e9,
        hidden / total if total else 0.0,
    )


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Their union: disjoint, in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif end > begin:
            merged.append((begin, end))
    return merged


def _without(intervals: Iterable[Interval], others: Iterable[Interval]) -> list[Interval]:
    """What of the intervals is in no other one."""
    left: list[Interval] = []
    holes = _merged(others)
    for begin, end in _merged(intervals):
        at = begin
        for hole in holes:
            if hole[1] <= at or hole[0] >= end:
                continue
            if hole[0] > at:
                left.append((at, hole[0]))
            at = max(at, hole[1])
        if at < end:
            left.append((at, end))
    return left


def _length(intervals: Iterable[Interval]) -> int:
    return sum(end - begin for begin, end in intervals)


def _event(
    rank: int, row: int, name: str, interval: Interval, args: dict[str, Any] | None = None
) -> dict[str, Any]:
    begin, end = interval
    found = {"ph": "X", "pid": rank, "tid": row, "name": name, "ts": begin / 1e3, "dur": (end - begin) / 1e3}
    return found | ({"args": args} if args else {})
