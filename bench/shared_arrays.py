"""What pycomm.shared_arrays() costs a program that makes arrays: `python bench/shared_arrays.py`.

Prints the time of np.empty and np.zeros, of the first arrays of a size and of later ones, whose memory was
used before, also with what it takes to write them; the resident memory of a workload that makes no calls; and
what is resident while three ranks make and drop 10^5 arrays under calls, one of them is killed meanwhile, and
the others go on, with the error that they got.
"""

from __future__ import annotations

import functools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import pycomm

SIZES = {"64 KiB": 64 << 10, "1 MiB": 1 << 20, "64 MiB": 64 << 20}
WAYS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "plain": nullcontext,
    "shared": pycomm.shared_arrays,
}
ARRAYS = 100_000
LEAST, MOST = 20_000, 30_000  # elements of those arrays


def timed(make: Callable[[int], Any], size: int, write: bool) -> tuple[float, Any]:
    begin = time.perf_counter()
    array = make(size)
    if write:
        array[:] = 1
    return time.perf_counter() - begin, array


def first_and_later(name: str, size: int, write: bool) -> None:
    """Prints medians in microseconds: of arrays that are all kept, and of arrays that are dropped at once."""
    make = {"np.empty": np.empty, "np.zeros": np.zeros}[name]
    of_bytes = functools.partial(make, dtype=np.uint8)
    kept = [timed(of_bytes, size, write) for _ in range(max(3, min(100, (256 << 20) // size)))]
    first = statistics.median(seconds for seconds, _ in kept)
    del kept
    later = statistics.median(timed(of_bytes, size, write)[0] for _ in range(50))
    print(f"{first * 1e6:.1f} | {later * 1e6:.1f}")


def in_process(way: str, call: str) -> str:
    """What a call of this file's prints in a process of its own, whose memory nothing has used before."""
    code = f"import shared_arrays as s\nwith s.WAYS[{way!r}](): s.{call}"
    here = os.path.dirname(os.path.abspath(__file__))
    return subprocess.run(
        [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True
    ).stdout.strip()


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def workload() -> None:
    """Prints the most that is resident, in MiB, while a program makes temporary arrays of all sizes."""
    random = np.random.default_rng(1)
    weights = [random.random(int(size)) for size in random.integers(1_000, 2_000_000, 20)]
    most = 0
    for _ in range(20):
        for w in weights:
            result = np.sqrt(w * w + 1) - w
            most = max(most, resident())
            del result
    print(most >> 20)


def times() -> None:
    print("| | plain: first, us | later | shared: first | later |")
    print("|---|---:|---:|---:|---:|")
    for name in ("np.empty", "np.zeros"):
        for size, count in SIZES.items():
            for write in (False, True):
                found = [in_process(way, f"first_and_later({name!r}, {count}, {write})") for way in WAYS]
                print(
                    f"| {name}, {size}{', and written' if write else ''} | {' | '.join(found)} |", flush=True
                )


def memory() -> None:
    for way in WAYS:
        print(f"resident, a workload without calls, {way}: {in_process(way, 'workload()')} MiB")


@dataclass
class Report:
    """What a rank that lives has seen; memory in bytes."""

    before: int  # held before the first array
    held: list[int] = field(default_factory=list)  # after each tenth of the arrays
    lost_at: int = 0  # the array whose call failed, counted from 1
    lost: str = ""  # how it failed


def under_calls(comm: pycomm.Communicator, arrays: int, measure: Callable[[], int] = resident) -> Report:
    """Makes arrays, and drops each after a call on it. Half way rank 0 kills rank 1, whatever that rank is
    doing; the others go on as the group that is left. `measure` tells what is held at the moment."""
    pids = comm.all_gather(np.array([os.getpid()]))
    report = Report(before=measure())
    made = 0
    with pycomm.shared_arrays():
        while made < arrays:
            if made == arrays // 2 and comm.rank == 0:
                os.kill(int(pids[1]), signal.SIGKILL)
            x = np.full(LEAST + made % (MOST - LEAST), comm.rank + 1, np.float32)
            made += 1
            try:
                comm.all_reduce(x)
            except pycomm.PeerLostError as error:
                report.lost_at, report.lost = made, f"{type(error).__name__}: {error}"
                failed, comm = comm, comm.shrink()
                failed.close()
                # One may have finished the call in which another one failed.
                made = int(comm.all_reduce(np.array([made]), op="max")[0])
            else:
                assert (x == comm.size * (comm.size + 1) / 2).all()
            if made * 10 // arrays > len(report.held):
                report.held.append(measure())
    return report


def as_a_rank() -> None:
    with pycomm.init() as comm:
        report = under_calls(comm, ARRAYS)
    before, *tenths = (f"{held / 2**20:.1f}" for held in (report.before, *report.held))
    lost = (report.lost_at - 1) * 10 // ARRAYS
    print(f"array {report.lost_at} of {ARRAYS}: {report.lost}")
    print(
        f"resident, MiB: {before} before the first array; after each tenth {', '.join(tenths[:lost])},"
        f" and after the error {', '.join(tenths[lost:])}"
    )


def main() -> None:
    times()
    print()
    memory()
    print(f"\n3 ranks make and drop {ARRAYS} arrays each, under calls; half way one is killed:", flush=True)
    ranks = [sys.executable, "-m", "pycomm", "run", "-n", "3", "--on-failure=wait", __file__, "as_a_rank"]
    subprocess.run(ranks, check=False)  # it fails as its rank does


if __name__ == "__main__":
    if sys.argv[1:] == ["as_a_rank"]:
        as_a_rank()
    else:
        main()
