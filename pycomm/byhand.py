"""Jobs that no launcher started: what names them, so that two of them never mix.

Whoever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT by hand may start two jobs with the same ones. With
torch.distributed rank 0 holds the port, and a rank of the other job may join it all the same. Here ranks are
of one job if one process started them, with the same arguments and environment. What tells a rank from its
siblings does not count: variables that name ranks, devices or places, and values that may be a rank.
PYCOMM_JOB, one word of the user's for all ranks, takes the place of all that.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

PLACE = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # as other libraries name a job
_WARN_AFTER_S = 3.0
_NOT_OF_A_JOB = re.compile(
    r"RANK|VISIBLE_DEVICES|AFFINITY|CPU_LIST|^OMP_PLACES$|^PYCOMM_|^_$|^SHLVL$|PWD$|^COLUMNS$|^LINES$|^PYTEST_"
)


@dataclass(frozen=True)
class Start:
    """How a rank was started."""

    parent: int
    arguments: tuple[str, ...]
    environ: Mapping[str, str]

    def name(self) -> str:
        variables = sorted(map("=".join, self.environ.items()))
        text = "\0".join([str(self.parent), *self.arguments, "", *variables])
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def difference(self, other: Start) -> str:
        """In words, what the other one has and this one has not; empty if they are of one job."""
        names = sorted(
            name
            for name in {*self.environ, *other.environ}
            if self.environ.get(name) != other.environ.get(name)
        )
        if names:
            first = names[0]
            more = f" (and {len(names) - 1} more variables)" if names[1:] else ""
            return f"{_shown(other, first)} there, {_shown(self, first)} here{more}"
        if self.parent != other.parent:
            return f"process {other.parent} started it, {self.parent} this one"
        return "" if self.arguments == other.arguments else "it has other arguments"


def this_start(size: int) -> Start:
    """How this process, one of `size`, was started; what it has set in os.environ since does not count."""
    return _start(os.getpid(), size, _environ_of(os.getpid()) or os.environ)


def parent_of(pid: int, rank_name: str) -> int:
    """The process that started a rank: the nearest ancestor that is not part of the rank itself, as a shell
    between launcher and Python would be."""
    with contextlib.suppress(OSError):  # it has just ended
        pid = _parent(pid)
        while pid > 1 and rank_name in (_environ_of(pid) or {}):
            pid = _parent(pid)
    return pid


@contextlib.contextmanager
def watching(rank: int, size: int) -> Iterator[None]:
    """Warns, if it lasts, that others wait with the same MASTER_PORT for a job that is not this one."""
    timer = threading.Timer(_WARN_AFTER_S, lambda: _warn(rank, stranger(size)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def stranger(size: int) -> str:
    """Says what tells a process from this one that names the same place and is of another job; or nothing."""
    own = this_start(size)
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or int(entry) == os.getpid():
            continue
        pid = int(entry)
        theirs = _environ_of(pid)
        if theirs is None or any(theirs.get(name) != os.environ.get(name) for name in PLACE):
            continue
        if theirs.get("RANK") is None or not _is_python(pid):
            continue
        # Its arguments cannot be told from its interpreter's: they are taken to be the same.
        with contextlib.suppress(OSError):
            difference = own.difference(_start(pid, size, theirs))
            if difference:
                return f"process {pid} has RANK={theirs['RANK']} and the same MASTER_PORT, but {difference}"
    return ""


def remedy(found: str) -> str:
    """What to do about a stranger, where it is none."""
    return (
        f"{found}: they are taken for two jobs. If they are one, start all ranks with the same"
        " PYCOMM_JOB=<any word>, or with `pycomm run`"
    )


def _warn(rank: int, found: str) -> None:
    if found:
        waits = f"pycomm: rank {rank} (pid {os.getpid()}) waits for the other ranks."
        print(waits, remedy(found), file=sys.stderr, flush=True)


def _start(pid: int, size: int, environ: Mapping[str, str]) -> Start:
    def may_be_a_rank(value: str) -> bool:
        return value.isdecimal() and int(value) < size

    shared = {k: v for k, v in environ.items() if not may_be_a_rank(v) and not _NOT_OF_A_JOB.search(k)}
    arguments = tuple("" if may_be_a_rank(part.rpartition("=")[2]) else part for part in sys.argv)
    return Start(parent_of(pid, "RANK"), arguments, shared)


def _shown(start: Start, name: str) -> str:
    return f"{name}={start.environ[name]!r}" if name in start.environ else f"no {name}"


def _environ_of(pid: int) -> dict[str, str] | None:
    """The environment that a process of ours was started with."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            entries = file.read().decode("utf-8", "surrogateescape").split("\0")
    except OSError:
        return None
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _is_python(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith("python")
    return False


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The name before it is in parentheses and may hold anything.
        return int(file.read().rpartition(b")")[2].split()[1])
