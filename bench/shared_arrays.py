"""What pycomm.shared_arrays() costs a program that makes arrays: `python bench/shared_arrays.py`.

Prints the time of np.empty and np.zeros, of the first arrays of a size and of later ones, whose memory was
used before, also with what it takes to write them; the resident memory of a workload that makes no calls; and
what is resident while 10^5 arrays are made and dropped under calls of two ranks.
"""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

import pycomm

SIZES = {"64 KiB": 64 << 10, "1 MiB": 1 << 20, "64 MiB": 64 << 20}
WAYS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "plain": nullcontext,
    "shared": pycomm.shared_arrays,
}
ARRAYS = 100_000


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


def under_calls(comm: pycomm.Communicator) -> list[int]:
    """What is resident after each tenth of the arrays, in MiB."""
    held = []
    for i in range(ARRAYS):
        x = np.empty(20_000 + i % 10_000, np.float32)
        x[0] = comm.rank
        comm.all_reduce(x[:20_000])
        if (i + 1) % (ARRAYS // 10) == 0:
            held.append(resident() >> 20)
    return held


def main() -> None:
    times()
    print()
    memory()
    with pycomm.shared_arrays():
        [held, _] = pycomm.run_local(under_calls, 2)
    print(f"resident while two ranks make and drop {ARRAYS} arrays each, after each tenth: {held} MiB")


if __name__ == "__main__":
    main()
