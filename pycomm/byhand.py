"""Jobs that no launcher started: how they are named, so that two of them never mix.

A user who sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT by hand may start two jobs with the same values.
With torch.distributed rank 0 holds the port, and a rank of the other job may still join it. Here ranks belong
to one job if the same process started them, with the same arguments and environment. Variables and options
that differ between ranks (those that name ranks and devices, and the terminal's own variables) do not count.
PYCOMM_JOB, a word that the user gives all ranks, replaces this rule. If two parts of one job are mistaken for
two jobs, they wait in vain and say why; if two jobs were mistaken for one, their results would be wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

PLACE = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # how other libraries name a job
_WARN_AFTER_S = 3.0
_OF_A_RANK = re.compile(
    r"^((LOCAL|NODE|GROUP|ROLE|GLOBAL|WORLD|PROCESS)?_?RANK|RANK_?ID|DEVICE(_?ID)?|GPU(_?ID)?|GPUS|CARD"
    r"|NUMA(_?NODE)?|WORKER(_?ID)?|SLOT|.*VISIBLE_DEVICES|.*AFFINITY|OMP_PLACES)$",
    re.IGNORECASE,
)
_OF_A_TERMINAL = re.compile(r"^(PYCOMM_TAKEN|_|SHLVL|OLDPWD|PWD|COLUMNS|LINES|PYTEST_CURRENT_TEST)$")


@dataclass(frozen=True)
class Start:
    """How a rank was started."""

    parent: str
    arguments: tuple[str, ...]
    environ: Mapping[str, str]
    command: tuple[str, ...] = field(compare=False)  # including the interpreter's own arguments

    def name(self) -> str:
        variables = sorted(map("=".join, self.environ.items()))
        text = "\0".join([self.parent, *self.arguments, "", *variables])
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def difference(self, other: Start) -> str:
        """In words, how the other one differs; empty if they look like ranks of one job."""
        names = sorted(
            (
                name
                for name in {*self.environ, *other.environ}
                if self.environ.get(name) != other.environ.get(name)
            ),
            key=lambda name: (name != "PYCOMM_JOB", name),
        )
        if names:
            more = f" and {len(names) - 1} more variables" if names[1:] else ""
            return f"its {names[0]}{more} differ{'' if more else 's'}"
        if self.command != other.command:
            return "its command line differs"
        return "another process started it" if self.parent != other.parent else ""


def this_start() -> Start:
    """How this process was started; later changes to os.environ do not count."""
    pid = os.getpid()
    return _start(pid, _environ_of(pid) or os.environ, sys.argv)


def parent_of(pid: int, rank_name: str) -> int:
    """The process that started a rank: the nearest ancestor that is not part of the rank itself, as a shell
    between launcher and Python is."""
    parent = os.getppid() if pid == os.getpid() else 0
    with contextlib.suppress(OSError):  # the process has just ended, or there is no /proc
        parent = _parent(pid)
        while parent > 1 and rank_name in (_environ_of(parent) or {}):
            parent = _parent(parent)
    return parent


class Watch:
    """If a rank waits long for the others, warns of processes that have the same address but belong to
    another job."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._start = this_start()  # now: a parent may end while its ranks wait
        self._timer = threading.Timer(_WARN_AFTER_S, self._warn)
        self._timer.daemon = True
        self._found = ""

    def __enter__(self) -> Watch:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()

    def remedy(self) -> str:
        """What was found, and what to do about it."""
        self._found = self._found or stranger(self._start)
        if not self._found:
            return ""
        return (
            f"{self._found}: they are taken for two jobs. If they are one, start all ranks with the same"
            " PYCOMM_JOB=<any word>, or with `pycomm run`"
        )

    def _warn(self) -> None:
        if remedy := self.remedy():
            waits = f"pycomm: rank {self._rank} (pid {os.getpid()}) waits for the other ranks."
            print(waits, remedy, file=sys.stderr, flush=True)


def stranger(own: Start) -> str:
    """Finds a process that has this one's address but belongs to another job. Returns how it differs, or ""
    if there is none."""
    with contextlib.suppress(OSError):
        for entry in filter(str.isdecimal, os.listdir("/proc")):
            pid, theirs = int(entry), _environ_of(int(entry))
            if pid == os.getpid() or theirs is None or "RANK" not in theirs or not _is_python(pid):
                continue
            if any(theirs.get(name) != os.environ.get(name) for name in PLACE):
                continue
            with contextlib.suppress(OSError):
                if difference := own.difference(_start(pid, theirs, ())):
                    return (
                        f"Process {pid} has RANK={theirs['RANK']} and the same MASTER_PORT, but {difference}"
                    )
    return ""


def _start(pid: int, environ: Mapping[str, str], argv: Sequence[str]) -> Start:
    shared = {k: v for k, v in environ.items() if not (_OF_A_RANK.match(k) or _OF_A_TERMINAL.match(k))}
    return Start(
        _origin(parent_of(pid, "RANK")), _without_rank(argv), shared, _without_rank(_command_of(pid))
    )


def _without_rank(arguments: Sequence[str]) -> tuple[str, ...]:
    """--local_rank=1, --local-rank 1 and cuda:1 without their numbers."""
    kept: list[str] = []
    of_a_rank = False
    for part in arguments:
        option, is_option, _ = part.partition("=")
        named = bool(_OF_A_RANK.match(option.lstrip("-").replace("-", "_"))) and option.startswith("-")
        kept.append(option if named else "" if of_a_rank else re.sub(r"(?<=\bcuda:)\d+$", "", part))
        of_a_rank = named and not is_option
    return tuple(kept)


def _origin(parent: int) -> str:
    """Identifies a process: a pid alone does not, since pids are reused and each namespace has its own."""
    try:
        space = os.readlink("/proc/self/ns/pid")
        with open(f"/proc/{parent}/stat", "rb") as file:
            return f"{parent} {space} {file.read().rpartition(b')')[2].split()[19].decode()}"
    except OSError:
        return str(parent)


def _environ_of(pid: int) -> dict[str, str] | None:
    """The environment that a process of this user was started with."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            entries = file.read().decode("utf-8", "surrogateescape").split("\0")
    except OSError:
        return None
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _command_of(pid: int) -> list[str]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().decode("utf-8", "surrogateescape").split("\0")[:-1]
    except OSError:
        return []


def _is_python(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith("python")
    return False


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The process name before it is in parentheses and may contain anything.
        return int(file.read().rpartition(b")")[2].split()[1])
