"""Passes on what ranks print to the launcher's stdout and stderr: whole lines that start with a prefix.

One thread for each of the two reads and writes. It reads nothing before it has written what came earlier, so
a slow reader of the launcher slows the ranks that print, but never the loop that handles signals.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import IO

CHUNK = 1 << 16  # bytes read at once; a line of up to this size is held until it is complete
PAUSE_S = 1.0  # how long other streams wait for the next part of a longer line, which is passed on in parts


class Output:
    """The ranks' streams, and the launcher's own lines among them."""

    def __init__(self) -> None:
        self._own, self._say = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._say, False)  # if nobody reads the output, these lines may be lost as well
        sinks = sys.stdout.fileno(), sys.stderr.fileno()
        # If both lead to one file, two threads would split each other's lines.
        same = os.path.samestat(os.fstat(sinks[0]), os.fstat(sinks[1]))
        err = Pump(sinks[1])
        out = err if same else Pump(sinks[0], os.dup(self._say))
        self._pumps = {"stdout": out, "stderr": err}
        err.add(os.fdopen(self._own, "rb", 0), b"pycomm run: ")

    @property
    def pumps(self) -> set[Pump]:
        return set(self._pumps.values())

    def add(self, source: IO[bytes], name: str, prefix: bytes) -> None:
        """Adds a stream; all must be added before `start`."""
        self._pumps[name].add(source, prefix)

    def start(self) -> None:
        for pump in self.pumps:
            pump.start()

    def say(self, text: str) -> None:
        if self._say >= 0:
            _say(self._say, text)

    def no_more_to_say(self) -> None:
        if self._say >= 0:
            os.close(self._say)
        self._say = -1

    def finish(self) -> None:
        """Still passes on what has been printed, then stops waiting for processes that hold a stream."""
        for pump in self.pumps:
            pump.finish()


@dataclass(eq=False)
class _Source:
    file: IO[bytes]
    prefix: bytes
    held: bytearray = field(default_factory=bytearray)  # the start of an incomplete line


class Pump:
    """A thread that passes on lines from its sources to one sink, until all sources have ended."""

    def __init__(self, sink: int, complaints: int | None = None) -> None:
        """`complaints`: the descriptor for one message that the sink cannot be written to. It is closed at
        the end."""
        self.ended = os.eventfd(0, os.EFD_CLOEXEC)  # becomes readable when the thread ends
        self._sink = sink
        self._complaints = complaints
        self._failed = False
        self._selector = selectors.DefaultSelector()
        self._finishing = os.eventfd(0, os.EFD_CLOEXEC)
        self._selector.register(self._finishing, selectors.EVENT_READ)
        self._last: _Source | None = None  # the source that was written last; `_tail` is its last byte
        self._tail = b"\n"
        self._patience = 0.0
        # A daemon: the process may end while the thread waits for a reader.
        self._thread = threading.Thread(target=self._run, daemon=True)

    def add(self, file: IO[bytes], prefix: bytes) -> None:
        self._selector.register(file, selectors.EVENT_READ, _Source(file, prefix))

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        os.eventfd_write(self._finishing, 1)

    def _run(self) -> None:
        try:
            while len(self._selector.get_map()) > 1:
                ready = self._ready()
                for source in filter(None, ready):
                    self._read(source)
                    if self._is_within_a_line and None not in ready:
                        break
                if None in ready:
                    break
            for key in list(self._selector.get_map().values()):
                if key.data:
                    self._end(key.data)
        finally:
            if self._complaints is not None:
                os.close(self._complaints)
            os.eventfd_write(self.ended, 1)

    def _ready(self) -> list[_Source | None]:
        """The sources that can be read; None among them means that finish() was called."""
        if self._last and self._is_within_a_line:
            poll = select.poll()
            poll.register(self._last.file, select.POLLIN)
            poll.register(self._finishing, select.POLLIN)
            ready = poll.poll(max(self._patience - time.monotonic(), 0) * 1000)
            if [number for number, _ in ready] == [self._last.file.fileno()]:
                return [self._last]
        return [key.data for key, _ in self._selector.select()]

    def _read(self, source: _Source) -> None:
        data = os.read(source.file.fileno(), CHUNK)
        if not data:
            self._end(source)
            return
        # Only new bytes are searched, so a long line costs no more per byte than a short one.
        whole = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        if whole:
            source.held += data[:whole]
            self._pass_on(source)
        source.held += data[whole:]
        if len(source.held) >= CHUNK:
            self._pass_on(source)

    def _end(self, source: _Source) -> None:
        if source.held or (self._is_within_a_line and source is self._last):
            source.held += b"\n"
            self._pass_on(source)
        self._selector.unregister(source.file)
        source.file.close()

    @property
    def _is_within_a_line(self) -> bool:
        return self._tail not in b"\r\n"

    def _pass_on(self, source: _Source) -> None:
        """Writes the held bytes: whole lines, or a part of a long one. A progress bar ends its lines with a
        carriage return."""
        text = bytes(source.held)
        source.held.clear()
        lines = text.splitlines(keepends=True)
        goes_on = source is self._last and (
            self._is_within_a_line or (self._tail == b"\r" and text.startswith(b"\n"))
        )
        begin = [] if goes_on else [b"\n" if self._is_within_a_line else b""]
        self._write(source.prefix.join(begin + lines))
        self._last, self._tail = source, text[-1:]
        self._patience = time.monotonic() + PAUSE_S

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._sink, rest) :]
            except BlockingIOError:  # shared with a process that made it non-blocking
                poll = select.poll()
                poll.register(self._sink, select.POLLOUT)
                poll.poll()
            except OSError as error:
                if self._complaints is not None and not self._failed:
                    _say(
                        self._complaints,
                        f"stdout cannot be written ({error.strerror}): its lines are dropped, and the ranks"
                        " go on; end the job with Ctrl-C or SIGTERM",
                    )
                self._failed = True
                return


def _say(to: int, text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(to, text.encode() + b"\n")
