"""A description of the machine, to compare records by: processor, caches, instruction sets, memory."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pycomm
from pycomm import _native

CPU = Path("/sys/devices/system/cpu")
NODES = Path("/sys/devices/system/node")
HUGE = Path("/sys/kernel/mm/transparent_hugepage")
# The processor's flags that matter to kernels.
FLAGS = re.compile(r"avx.*|sse4_.|fma|f16c|bmi.|erms|fsrm|amx.*|neon|asimd.*|sve.*|bf16|i8mm|movdir.*|clwb")


@dataclass(frozen=True)
class Cache:
    level: int
    kind: str  # Data, Instruction, Unified
    bytes: int
    shared_by: str  # a set of CPUs, in the kernel's notation

    def __str__(self) -> str:
        name = f"L{self.level}{ {'Data': 'd', 'Instruction': 'i'}.get(self.kind, '') }"
        size = f"{self.bytes >> 20} MiB" if self.bytes >= 1 << 20 else f"{self.bytes >> 10} KiB"
        return f"{name} {size}"


@dataclass(frozen=True)
class Processor:
    model: str
    family: str  # "AMD Zen 3" if the numbers are known, else the numbers
    caches: tuple[Cache, ...]  # those of the first CPU
    flags: tuple[str, ...]
    isa: str  # that of the kernels that run
    cpus: int
    threads_per_core: int
    numa_nodes: int


@cache
def processor() -> Processor:
    lines = [line.partition(":") for line in read("/proc/cpuinfo").split("\n\n")[0].splitlines()]
    facts = {name.strip(): value.strip() for name, _, value in lines}
    siblings = read(CPU / "cpu0/topology/thread_siblings_list") or "0"
    nodes = list(NODES.glob("node[0-9]*")) if NODES.is_dir() else []
    return Processor(
        facts.get("model name") or platform.processor() or platform.machine(),
        _family(facts),
        caches(),
        tuple(
            word
            for word in (facts.get("flags") or facts.get("Features", "")).split()
            if FLAGS.fullmatch(word)
        ),
        _native.isa(),
        os.cpu_count() or 1,
        count(siblings),
        max(len(nodes), 1),
    )


def caches() -> tuple[Cache, ...]:
    found = []
    for index in sorted((CPU / "cpu0/cache").glob("index*")):
        text = read(index / "size")
        if size := re.fullmatch(r"(\d+)([KM]?)", text):
            unit = {"K": 1 << 10, "M": 1 << 20, "": 1}[size[2]]
            shared = read(index / "shared_cpu_list")
            found.append(Cache(int(read(index / "level")), read(index / "type"), int(size[1]) * unit, shared))
    return tuple(found)


def describe() -> str:
    """A line for tables and charts."""
    p = processor()
    cores = len(os.sched_getaffinity(0))
    data = ", ".join(str(cache) for cache in p.caches if cache.kind != "Instruction")
    family = f" ({p.family})" if p.family else ""
    return (
        f"{p.model}{family}, {cores} core{'s' * (cores > 1)}, {data}, Linux {platform.release()}, {p.isa},"
        f" pycomm {pycomm.__version__}"
    )


def as_dict() -> dict[str, Any]:
    p = processor()
    return {
        **asdict(p),
        "allowed_cpus": sorted(os.sched_getaffinity(0)),
        "huge_pages": {"private": huge_pages("enabled"), "shared": huge_pages("shmem_enabled")},
        "kernel": platform.release(),
        "machine": platform.machine(),
    }


def slug() -> str:
    """The processor, for the name of a file: amd-epyc-zen-3-2-cores."""
    p = processor()
    text = f"{p.model} {p.family.removeprefix(p.model.split()[0])} {len(os.sched_getaffinity(0))} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def huge_pages(setting: str) -> str:
    """The choice in force: always, madvise, never, advise; empty if the kernel has no such setting."""
    return read(HUGE / setting).partition("[")[2].partition("]")[0]


def read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def count(cpus: str) -> int:
    """How many CPUs a set such as "0-3,8" has."""
    runs = [part.split("-") for part in cpus.split(",") if part]
    return sum(int(run[-1]) - int(run[0]) + 1 for run in runs)


def _family(facts: dict[str, str]) -> str:
    """The microarchitecture, since the names of virtual machines' processors hide it."""
    if "cpu family" not in facts:
        return f"part {facts['CPU part']}" if "CPU part" in facts else ""
    vendor, family, model = facts.get("vendor_id", ""), int(facts["cpu family"]), int(facts.get("model", 0))
    if vendor == "AuthenticAMD":
        # Families 0x17, 0x19 and 0x1a, each in two generations.
        zen = {23: 2 if model >= 0x30 else 1, 25: 4 if 0x10 <= model < 0x20 or model >= 0x60 else 3, 26: 5}
        if family in zen:
            return f"AMD Zen {zen[family]}"
    return f"family {family} model {model}"
