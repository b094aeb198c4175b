"""The inner loops, measured in turn with a copy of as many bytes by the same core and with other
implementations.

A family of kernels is a module with `cases(device, workloads)`, named in FAMILIES. Within a repetition the
copies, the kernel and its rivals run in turn, in an order that is shuffled each time, on the same memory. The
minimum over repetitions counts: these loops wait for nobody, so a slower run is due to something else. Of
several copies or rivals the fastest counts.
"""

from __future__ import annotations

import importlib
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from pycomm import _native
from pycomm.bench.machine import describe as machine
from pycomm.bench.workers.memory import plain

FAMILIES = {
    "pack": "pycomm.bench.pack_cases",
    "codec": "pycomm.bench.codec_cases",
    "topk": "pycomm.bench.topk_cases",
    "lossless": "pycomm.bench.lossless_cases",
}
CUDA_FAMILIES = dict.fromkeys(("reduce", "pack", "codec", "topk"), "pycomm.bench.cuda_cases")
CACHE_BYTES = 512 << 20  # more than any GPU's cache; buffers in rotation have this size together
REPETITION_S = 0.004  # the least duration of one turn
CASE_S = 2.0  # after this time a case ends with the least number of repetitions
REPETITIONS = (11, 40)

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One kernel at one size. `rivals`: other implementations of the same. `ratio`: the encoded bytes over
    the others, where the data decide it."""

    family: str
    kernel: str
    workload: str
    bytes: int  # read plus written
    run: Call
    rivals: Mapping[str, Call] = field(default_factory=dict)
    ratio: float | None = None


class Device(Protocol):
    """Where kernels run: how it makes copies and times calls."""

    def describe(self) -> str: ...

    def copies(self, size: int) -> dict[str, Call]:
        """Several ways to read and write `size` bytes; the fastest counts."""

    def seconds(self, call: Call, calls: int) -> float:
        """The time of `calls` calls in a row."""


class Cpu:
    """One core: the process is pinned, and torch uses one thread."""

    def __init__(self) -> None:
        self._machine = machine()
        self.core = max(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {self.core})
        self._memory = (plain(0, np.dtype(np.uint8)), plain(0, np.dtype(np.uint8)))

    def describe(self) -> str:
        return f"{self._machine}; on core {self.core}"

    def copies(self, size: int) -> dict[str, Call]:
        if size > self._memory[0].size:
            self._memory = (
                plain(size, np.dtype(np.uint8), huge=True),
                plain(size, np.dtype(np.uint8), huge=True),
            )
            for array in self._memory:
                array.fill(1)
        dst, src = (array[:size] for array in self._memory)
        return {
            "memcpy": lambda: _native.copy_bytes(dst, src),
            "non-temporal": lambda: _native.copy_bytes(dst, src, True),
        }

    def seconds(self, call: Call, calls: int) -> float:
        begin = time.thread_time()  # CPU time: others may use the core as well
        for _ in range(calls):
            call()
        return time.thread_time() - begin


class Cuda:
    """The current GPU, timed by its events. Copies rotate among more buffers than the cache holds."""

    def __init__(self) -> None:
        import torch

        import pycomm.cuda.arrays

        pycomm.cuda.arrays.native()  # raises an error if something is missing
        self._torch = torch
        self._buffers = torch.empty(0, dtype=torch.uint8, device="cuda")

    def describe(self) -> str:
        torch = self._torch
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return f"{found.name}, CUDA {torch.version.cuda}, torch {torch.__version__}"

    def copies(self, size: int) -> dict[str, Call]:
        torch = self._torch
        pairs = max(2, -(-CACHE_BYTES // (2 * size)))
        if self._buffers.numel() < 2 * pairs * size:
            self._buffers = torch.ones(2 * pairs * size, dtype=torch.uint8, device="cuda")
        parts = [self._buffers[i * size : (i + 1) * size] for i in range(2 * pairs)]
        turn = itertools.cycle(zip(parts[::2], parts[1::2], strict=True))

        def copy() -> object:
            dst, src = next(turn)
            return dst.copy_(src)

        return {"copy_": copy}

    def seconds(self, call: Call, calls: int) -> float:
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


DEVICES: dict[str, Callable[[], Device]] = {"cpu": Cpu, "cuda": Cuda}


def families(device: str) -> dict[str, str]:
    """The families of kernels that run on it, by name, with their modules."""
    return {"cpu": FAMILIES, "cuda": CUDA_FAMILIES}[device]


@dataclass(frozen=True)
class Times:
    """Microseconds per call, over the repetitions."""

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
    ratio: float | None

    @property
    def gbps(self) -> float:
        return self.bytes / self.times.min_us / 1e3

    @property
    def share(self) -> float:
        """The share of the copy's bandwidth."""
        return min(times.min_us for times in self.copies.values()) / self.times.min_us

    @property
    def fastest_rival(self) -> str | None:
        return min(self.rivals, key=lambda name: self.rivals[name].min_us, default=None)

    @property
    def speedup(self) -> float | None:
        """The fastest rival's time divided by the kernel's."""
        name = self.fastest_rival
        return self.rivals[name].min_us / self.times.min_us if name else None

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "gbps": self.gbps,
            "share": self.share,
            "fastest_rival": self.fastest_rival,
            "speedup": self.speedup,
        }


def measure(
    device: Device,
    families: Sequence[str],
    workloads: Sequence[str],
    modules: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """`modules`: the modules with the families' cases; FAMILIES by default."""
    for module in dict.fromkeys((modules or FAMILIES)[family] for family in families):
        for case in importlib.import_module(module).cases(device, workloads):
            if case.family in families:
                yield measure_case(device, case)


def measure_case(device: Device, case: Case) -> Row:
    turns = {("copy", name): call for name, call in device.copies(case.bytes // 2).items()}
    turns["kernel", ""] = case.run
    turns |= {("rival", name): call for name, call in case.rivals.items()}
    calls = {}
    for key, call in turns.items():
        device.seconds(call, 1)  # the first call is slow
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
    return Row(
        case.family,
        case.kernel,
        case.workload,
        case.bytes,
        times["kernel", ""],
        of["copy"],
        of["rival"],
        case.ratio,
    )
