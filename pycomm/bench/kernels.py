"""The inner loops, in turn with a copy of as many bytes by the same core and with others' ways to do it.

A family of kernels is a module with `cases(device, workloads)`, named in FAMILIES. Within a repetition the
copies, the kernel and its rivals have their turn, in an order that is shuffled anew, on the same memory.
Shares and speedups are medians over repetitions of the ratio within one, so that a machine that grows slower
is slower for all. Of several copies, or rivals, the one with the least time counts.
"""

from __future__ import annotations

import importlib
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from pycomm import _native
from pycomm.bench.report import machine
from pycomm.bench.workers.data import plain

FAMILIES = {"pack": "pycomm.bench.pack_cases"}
REPETITION_S = 0.004  # what a repetition of one turn takes at least
CASE_S = 2.0  # after this long a case's fewest repetitions are enough
REPETITIONS = (9, 25)

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One kernel at one size. `rivals`: other ways to the same result."""

    family: str
    kernel: str
    workload: str
    bytes: int  # read plus written
    run: Call
    rivals: Mapping[str, Call] = field(default_factory=dict)


class Device(Protocol):
    """Where kernels run: how its copies are made and its calls are timed."""

    def describe(self) -> str: ...

    def copies(self, size: int) -> dict[str, Call]:
        """Ways to read and write `size` bytes each; the fastest counts."""

    def seconds(self, call: Call, calls: int) -> float:
        """What so many calls in a row take."""


class Cpu:
    """One core: the process is pinned, and torch's threads are one."""

    def __init__(self) -> None:
        self._machine = machine()
        self.core = max(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {self.core})
        self._memory = (plain(0, np.dtype(np.uint8)), plain(0, np.dtype(np.uint8)))

    def describe(self) -> str:
        return f"{self._machine}; on core {self.core}"

    def copies(self, size: int) -> dict[str, Call]:
        if size > self._memory[0].size:
            self._memory = (plain(size, np.dtype(np.uint8)), plain(size, np.dtype(np.uint8)))
            for array in self._memory:
                array.fill(1)
        dst, src = (array[:size] for array in self._memory)
        return {
            "memcpy": lambda: _native.copy_bytes(dst, src),
            "non-temporal": lambda: _native.copy_bytes(dst, src, True),
        }

    def seconds(self, call: Call, calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - begin


DEVICES: dict[str, Callable[[], Device]] = {"cpu": Cpu}


@dataclass(frozen=True)
class Times:
    """In microseconds for a call, over the repetitions."""

    min_us: float
    median_us: float


@dataclass
class Row:
    family: str
    kernel: str
    workload: str
    bytes: int
    times: Times
    copies: dict[str, Times]
    rivals: dict[str, Times]
    share: float  # of the copy's bandwidth
    fastest_rival: str | None
    speedup: float | None  # its time over the kernel's

    @property
    def gbps(self) -> float:
        return self.bytes / self.times.min_us / 1e3

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gbps": self.gbps}


def measure(device: Device, families: Sequence[str], workloads: Sequence[str]) -> Iterator[Row]:
    for family in families:
        for case in importlib.import_module(FAMILIES[family]).cases(device, workloads):
            yield measure_case(device, case)


def measure_case(device: Device, case: Case) -> Row:
    turns = {("copy", name): call for name, call in device.copies(case.bytes // 2).items()}
    turns["kernel", ""] = case.run
    turns |= {("rival", name): call for name, call in case.rivals.items()}
    calls = {}
    for key, call in turns.items():
        device.seconds(call, 1)  # the first is slow
        calls[key] = max(1, round(REPETITION_S / max(device.seconds(call, 1), 1e-7)))
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in turns}
    order = list(turns)
    shuffle = random.Random(0).shuffle
    fewest, most = REPETITIONS
    begin = time.monotonic()
    for repetition in range(most):
        if repetition >= fewest and time.monotonic() - begin > CASE_S:
            break
        shuffle(order)
        for key in order:
            samples[key].append(device.seconds(turns[key], calls[key]) / calls[key] * 1e6)
    times = {key: Times(min(found), statistics.median(found)) for key, found in samples.items()}
    of = {kind: {name: t for (k, name), t in times.items() if k == kind} for kind in ("copy", "rival")}

    def over_kernel(kind: str, name: str) -> float:
        pairs = zip(samples[kind, name], samples["kernel", ""], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    def fastest(kind: str) -> str | None:
        return min(of[kind], key=lambda name: of[kind][name].min_us, default=None)

    copy, rival = fastest("copy"), fastest("rival")
    assert copy
    return Row(
        case.family,
        case.kernel,
        case.workload,
        case.bytes,
        times["kernel", ""],
        of["copy"],
        of["rival"],
        over_kernel("copy", copy),
        rival,
        over_kernel("rival", rival) if rival else None,
    )
