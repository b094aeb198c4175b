"""Ranks as real processes. They are forked, which is cheap and lets them run a test's own function."""

import os
import pickle
import secrets
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pycomm

Fn = Callable[[pycomm.Communicator], Any]


class Died(Exception):
    """The process ended without a result: by this signal (negative) or with this exit code."""


class Rank:
    """A process that runs `fn(comm)` as one rank of a job, or another given function."""

    def __init__(self, body: Callable[[], Any], others: list["Rank"]) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for pipe in [read, *(other.pipe for other in others)]:
                os.close(pipe)
            with os.fdopen(write, "wb") as file:
                file.write(_outcome(body))
            os._exit(0)
        os.close(write)
        self.pipe = read
        self.status: int | None = None

    def outcome(self, timeout: float = 60) -> Any:
        """Returns the result of `fn`; raises its exception, or Died."""
        parts: list[bytes] = []
        deadline = time.monotonic() + timeout
        while True:
            ready, _, _ = select.select([self.pipe], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"process {self.pid} is still at it after {timeout} s")
            part = os.read(self.pipe, 1 << 20)
            if not part:
                break
            parts.append(part)
        self.wait()
        if not parts:
            raise Died(self.status)
        good, value = pickle.loads(b"".join(parts))
        if good:
            return value
        raise value

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.status is None:
            os.kill(self.pid, number)

    def wait(self) -> None:
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Gate:
    """A gate at which processes report that they have arrived."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def arrive(self) -> None:
        os.write(self._write, b"x")

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert select.select([self._read], [], [], 30)[0], "a process has not arrived within 30 s"
            os.read(self._read, 1)

    def __del__(self) -> None:
        os.close(self._read)
        os.close(self._write)


def shared_bytes() -> int:
    """The bytes that this process's shared memory holds: groups', arenas', and in a job its peers' arenas."""
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            if "memfd:pycomm" in os.readlink(f"/proc/self/fd/{fd}"):
                total += os.stat(f"/proc/self/fd/{fd}").st_blocks * 512
    return total


@contextmanager
def started(fn: Fn, size: int, timeout: float = 60) -> Iterator[list[Rank]]:
    """Starts `size` processes that run `fn(comm)`; none is left at the end."""
    job = secrets.token_hex(8)

    def body(rank: int) -> Any:
        os.environ.update(PYCOMM_RANK=str(rank), PYCOMM_SIZE=str(size), PYCOMM_JOB=job)
        with pycomm.init(timeout=timeout) as comm:
            return fn(comm)

    ranks: list[Rank] = []
    try:
        for rank in range(size):
            ranks.append(Rank(lambda rank=rank: body(rank), ranks))
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            os.close(rank.pipe)


def run(fn: Fn, size: int, timeout: float = 60) -> list[Any]:
    """pycomm.run_local with processes."""
    with started(fn, size, timeout) as ranks:
        outcomes = outcomes_of(ranks, timeout + 10)
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if errors:
        consequences = (pycomm.PeerLostError, pycomm.AbortedError)
        raise next((error for error in errors if not isinstance(error, consequences)), errors[0])
    return outcomes


def outcomes_of(ranks: list[Rank], timeout: float = 60) -> list[Any]:
    """The result or exception of each."""

    def outcome(rank: Rank) -> Any:
        try:
            return rank.outcome(timeout)
        except BaseException as error:
            return error

    return [outcome(rank) for rank in ranks]


def _outcome(body: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps((True, body()))
    except BaseException as error:
        where = traceback.format_exc()
        try:
            error.args = (f"{error}\n{where}",)
            return pickle.dumps((False, error))
        except Exception:
            return pickle.dumps((False, RuntimeError(where)))
