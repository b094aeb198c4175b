"""`pycomm run`: starts the ranks of a job on this machine, and ends them together.

One loop handles the ends of ranks, their calls of init() and the signals to the launcher; threads pass on
what they print (pycomm.pipes). A rank is a process group of its own. So a signal from the terminal reaches it
once, through the launcher, and the processes that it started can be ended with it, if it does not end well.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import re
import resource
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import cast

from pycomm.pipes import Output, Pump
from pycomm.rollcall import Rollcall
from pycomm.world import job_address

NOTICE_S = 3.0  # between a failure and SIGTERM: the other ranks get PeerLostError, and may save their state
GRACE_S = 5.0  # between SIGTERM, or a forwarded signal, and SIGKILL
ECHO_S = 0.1  # timeout(1) and others signal a process and its group: that counts as one signal
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FORWARDED = (*ENDING, signal.SIGUSR1, signal.SIGUSR2)  # schedulers warn of a job's end by the last two

_FILES = 64  # that the launcher opens besides those of the ranks, generously
_FILES_OF_A_RANK = 3  # two streams, and a pidfd
_COLORS = (36, 33, 35, 32, 34, 31)
_PR_SET_PDEATHSIG = 1


class StartError(RuntimeError):
    """The ranks cannot be started here; the message says what would help."""


def launch(command: Sequence[str], size: int, on_failure: str = "end") -> int:
    """Runs `command` as ranks 0 to size - 1; returns the exit code of the first that failed (128 + signal if
    by a signal), or 0. When one fails, the others are ended (`on_failure="end"`) or left alone ("wait")."""
    _check_limit(size)
    with _Job(size, on_failure) as job:
        each = split_cores(size)
        # Where ranks share cores, a pool of threads in each would spin in the others' time.
        shared = {"OMP_NUM_THREADS": "1"} if size > 1 and each[0] == each[-1] else {}
        for rank, cores in enumerate(each):
            job.start(rank, command, cores, shared)
        return job.run()


def _check_limit(size: int) -> None:
    files = "/proc/self/fd"  # missing if /proc is not mounted
    is_open = len(os.listdir(files)) if os.path.isdir(files) else 3
    needed = is_open + _FILES + _FILES_OF_A_RANK * size
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed > limit:
        remedy = "" if needed <= most else f" (as root: the hard limit is {most})"
        raise StartError(
            f"-n {size} needs up to {needed} open files, and the limit is {limit}: raise it with"
            f" `ulimit -n {needed}`{remedy}, or start fewer ranks"
        )


def split_cores(size: int) -> list[set[int]]:
    """The CPUs of each rank: neighbouring cores of its own, or all CPUs if there are not enough cores."""
    allowed = os.sched_getaffinity(0)
    cores: dict[tuple[int, int], list[int]] = {}
    for cpu in sorted(allowed):
        cores.setdefault(_place(cpu), []).append(cpu)
    # Hardware threads of one core stay together if there is a core for each rank.
    units = [cores[place] for place in sorted(cores)]
    if len(units) < size:
        units = [[cpu] for unit in units for cpu in unit]
    if len(units) < size:
        return [set(allowed) for _ in range(size)]
    bounds = [len(units) * rank // size for rank in range(size + 1)]
    return [{cpu for unit in units[bounds[r] : bounds[r + 1]] for cpu in unit} for r in range(size)]


def _place(cpu: int) -> tuple[int, int]:
    """Package, and the first hardware thread of the CPU's core."""
    topology = f"/sys/devices/system/cpu/cpu{cpu}/topology/"
    try:
        with (
            open(topology + "physical_package_id") as package,
            open(topology + "thread_siblings_list") as siblings,
        ):
            return int(package.read()), int(re.split("[,-]", siblings.read())[0])
    except (OSError, ValueError):
        return 0, cpu


@dataclass
class _Rank:
    rank: int
    process: subprocess.Popen[bytes]
    end: int  # a pidfd
    calls: int = 0  # of init(), as far as they were reported
    how: str = ""  # how it ended; empty while it runs
    ended_well: bool = False  # so the processes that it started are left alone


class _Job:
    """The ranks, and the loop that waits for them. On exit no rank is left, nor any process that a rank
    started, unless that rank ended well by itself.

    Ended ranks are not reaped before the job is over: while a dead leader holds its pid, no other process can
    get it, and its group can be signalled.
    """

    def __init__(self, size: int, on_failure: str) -> None:
        self._on_failure = on_failure
        self._environment = _environment(size)
        self._started: list[_Rank] = []
        self._running: list[_Rank] = []
        self._selector = selectors.DefaultSelector()
        self._failure = 0
        self._ending = False  # whether the ranks are being ended
        self._signalled: tuple[signal.Signals, float] | None = None  # the last signal received, and when
        self._deadline = math.inf  # when `_next` is due
        self._next: Callable[[], None] = self._terminate
        self._over = False
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> _Job:
        self._cleanup.enter_context(self._selector)
        signals = self._cleanup.enter_context(_caught_signals())
        self._selector.register(signals, selectors.EVENT_READ, lambda: self._forward(signals))
        address = job_address(self._environment["PYCOMM_JOB"])
        self._rollcall = self._cleanup.enter_context(contextlib.closing(Rollcall(address)))
        self._selector.register(self._rollcall, selectors.EVENT_READ, self._hear)
        self._output = Output()
        self._pumps = self._output.pumps
        for pump in self._pumps:
            self._selector.register(pump.ended, selectors.EVENT_READ, functools.partial(self._printed, pump))
        self._cleanup.callback(self._kill_and_reap)
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def start(self, rank: int, command: Sequence[str], cores: set[int], defaults: Mapping[str, str]) -> None:
        try:
            process = subprocess.Popen(
                command,
                bufsize=0,
                # Otherwise Python buffers what a rank prints to a pipe.
                env={
                    "PYTHONUNBUFFERED": "1",
                    **defaults,
                    **os.environ,
                    **self._environment,
                    **_numbers(rank),
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                preexec_fn=_child_setup(os.getpid(), cores),
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise StartError(
                f"rank {rank} cannot be started ({error}): start fewer ranks, or raise the limits of"
                " processes (`ulimit -u`) and memory"
            ) from None
        started = _Rank(rank, process, os.pidfd_open(process.pid))
        self._cleanup.callback(os.close, started.end)
        self._started.append(started)
        self._running.append(started)
        self._selector.register(started.end, selectors.EVENT_READ, lambda: self._end(started))
        assert process.stdout and process.stderr
        for name, source, sink in (
            ("stdout", process.stdout, sys.stdout),
            ("stderr", process.stderr, sys.stderr),
        ):
            self._output.add(source, name, _prefix(rank, sink.isatty()))

    def run(self) -> int:
        """Returns when all ranks have ended and their output is written, or the time for that is over."""
        self._output.start()
        while (self._running or self._pumps) and not self._over:
            left = self._deadline - time.monotonic()
            for key, _ in self._selector.select(None if left == math.inf else max(left, 0)):
                handle: Callable[[], None] = key.data
                handle()
            if time.monotonic() >= self._deadline:
                self._deadline = math.inf
                self._next()
        return self._failure

    def _after(self, seconds: float, do: Callable[[], None]) -> None:
        """Schedules the next step; a later call replaces it."""
        self._deadline, self._next = time.monotonic() + seconds, do

    def _printed(self, pump: Pump) -> None:
        self._selector.unregister(pump.ended)
        self._pumps.remove(pump)

    def _end(self, rank: _Rank) -> None:
        self._selector.unregister(rank.end)
        self._running.remove(rank)
        code, rank.how = _end_of(rank.process.pid)
        if code and not (self._failure and self._ending):
            self._fail(code, f"rank {rank.rank} {rank.how}", self._on_failure == "end")
        rank.ended_well = code == 0 and not self._ending
        if not rank.ended_well:
            os.killpg(rank.process.pid, signal.SIGTERM)  # the processes that it may have started
        self._hear()  # calls that it reported before it ended
        if not self._running:
            self._output.no_more_to_say()
            self._after(GRACE_S, self._let_go)

    def _fail(self, code: int, text: str, end: bool) -> None:
        self._failure = self._failure or code
        # Ranks that got a forwarded signal know already, and have their time to end.
        if self._running and not self._ending:
            text += f"; ending the others in {NOTICE_S:.0f} s" if end else "; the others go on"
            if end:
                self._ending = True
                self._after(NOTICE_S, self._terminate)
        self._output.say(text)

    def _hear(self) -> None:
        """Ends the job if ranks wait in init() for one that has ended. (If a rank ends after init(), the
        others notice it themselves.)"""
        for number, calls in self._rollcall.hear():
            if 0 <= number < len(self._started):
                rank = self._started[number]
                rank.calls = max(rank.calls, calls)
        ended = [rank for rank in self._started if rank.how]
        if self._ending or not ended or not self._running:
            return
        absent = min(ended, key=lambda rank: rank.calls)
        waiting = max(self._running, key=lambda rank: rank.calls)
        if absent.calls < waiting.calls:
            which = f"its call {absent.calls + 1} of " if absent.calls else ""
            text = (
                f"rank {absent.rank} {absent.how} before {which}pycomm.init(), in which rank {waiting.rank}"
                " waits for it: all ranks must make the same calls of init()"
            )
            self._fail(1, text, True)

    def _forward(self, signals: int) -> None:
        for number in map(signal.Signals, os.read(signals, 64)):
            if number not in ENDING:
                self._signal(number)
                continue
            before, self._signalled = self._signalled, (number, time.monotonic())
            if before is None:
                self._ending = True
                self._signal(number)
                self._after(GRACE_S if self._running else 0, self._kill)
            elif before[0] != number or time.monotonic() - before[1] > ECHO_S:
                self._after(0, self._kill)

    def _terminate(self) -> None:
        self._signal(signal.SIGTERM)
        self._after(GRACE_S, self._kill)

    def _kill(self) -> None:
        if self._running:
            self._output.say(f"killing rank {', '.join(str(rank.rank) for rank in self._running)}")
        for rank in self._running:
            os.killpg(rank.process.pid, signal.SIGKILL)
        self._over = not self._running

    def _let_go(self) -> None:
        """Stops waiting for processes that still hold the ranks' streams and, after a signal, for readers of
        the launcher's output."""
        self._output.finish()
        self._over = self._signalled is not None

    def _signal(self, number: signal.Signals) -> None:
        for rank in self._running:
            os.kill(rank.process.pid, number)

    def _kill_and_reap(self) -> None:
        for rank in self._started:
            if not rank.ended_well:
                os.killpg(rank.process.pid, signal.SIGKILL)
            rank.process.wait()


def _environment(size: int) -> dict[str, str]:
    """The variables that all ranks get: pycomm's own, and torchrun's for scripts that also use
    torch.distributed."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return {
        "PYCOMM_SIZE": str(size),
        "PYCOMM_JOB": secrets.token_hex(16),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _numbers(rank: int) -> dict[str, str]:
    return dict.fromkeys(("PYCOMM_RANK", "RANK", "LOCAL_RANK"), str(rank))


@contextlib.contextmanager
def _caught_signals() -> Iterator[int]:
    """A descriptor from which the numbers of the signals to forward can be read. Ignored signals (nohup) stay
    ignored."""
    forwarded = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
    source, sink = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = {number: signal.signal(number, _noted) for number in forwarded}
    # If SIGCHLD is ignored, the kernel reaps the ranks itself and keeps no exit code.
    before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    wakeup = signal.set_wakeup_fd(sink)
    try:
        yield source
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(source)
        os.close(sink)


def _noted(number: int, frame: FrameType | None) -> None:
    """Does nothing: the signal's number is already in the wakeup descriptor."""


def _child_setup(launcher: int, cores: set[int]) -> Callable[[], None]:
    prctl = ctypes.CDLL(None).prctl

    def setup() -> None:
        # A process group of its own, to be ended together with what the rank started. Not a session: the
        # kernel shares cores between sessions first, and ranks that wait for each other on one core would
        # wait for their session's turn.
        os.setpgid(0, 0)
        # The kernel kills the rank when the launcher ends, however it ends.
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)
        os.sched_setaffinity(0, cores)

    return setup


def _end_of(pid: int) -> tuple[int, str]:
    """The exit code of an ended process, in a shell's numbering, and how it ended."""
    end = cast(os.waitid_result, os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT))  # without reaping it
    if end.si_code == os.CLD_EXITED:
        return end.si_status, f"exited with code {end.si_status}"
    return 128 + end.si_status, f"was ended by signal {end.si_status} ({signal.strsignal(end.si_status)})"


def _prefix(rank: int, is_terminal: bool) -> bytes:
    if is_terminal and not os.environ.get("NO_COLOR"):
        return b"\x1b[%dm[%d]\x1b[0m " % (_COLORS[rank % len(_COLORS)], rank)
    return b"[%d] " % rank
