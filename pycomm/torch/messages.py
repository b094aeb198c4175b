"""send and recv with the meaning that torch gives to tags: a receive takes the first message of its tag.

pycomm delivers the messages of a pair in the order in which they were sent. So each message is sent as two: a
header with its tag, dtype and size, then its data, if it has any. The receiver reads a header, then the data:
into the tensor of the receive that waits for this tag, or aside, until a receive asks for it. It does so in
callbacks; no thread waits. A receive from any rank alone is driven by whoever waits for it.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Generator
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from pycomm import Communicator, Work
from pycomm.torch.work import FromAny, Handle, Receive

_HEADER = struct.Struct("<qq16s")


class _Header(NamedTuple):
    tag: int
    elements: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.elements} {self.dtype} with tag {self.tag}"


def _header(tag: int, x: Any) -> _Header:
    return _Header(tag, x.numel(), str(x.dtype).removeprefix("torch."))


def as_bytes(x: Any) -> Any:
    """The memory of a contiguous tensor, whatever its dtype."""
    return x.reshape(-1).view(torch.uint8)


class Outbox:
    """The messages to one rank."""

    def __init__(self, comm: Communicator, target: int) -> None:
        self._comm, self._target = comm, target
        self._lock = threading.Lock()

    def send(self, x: Any, tag: int) -> list[Work]:
        """`x` is contiguous, and stays as it is until the works have completed."""
        header = _HEADER.pack(tag, x.numel(), _header(tag, x).dtype.encode())
        with self._lock:  # a header and its data follow each other
            parts = [header, as_bytes(x)] if x.numel() else [header]
            return [self._comm.send(part, self._target, async_op=True) for part in parts]


class _Receive(NamedTuple):
    source: int | None  # None: any rank
    wanted: _Header
    out: Any  # contiguous
    handle: Handle
    copy_to: Any  # the caller's tensor, if that is not `out`


class _Message(NamedTuple):
    source: int
    header: _Header
    data: Any

    def matches(self, source: int | None, tag: int) -> bool:
        return source in (None, self.source) and tag == self.header.tag


class _Turn:
    """For two who come at any time, of whom the second goes on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def second(self) -> bool:
        return not self._lock.acquire(blocking=False)


_Reads = Generator[Any, None, None]  # of buffers to be read


class Inbox:
    """The messages from all ranks.

    It reads from a rank while a receive names that rank. For a receive from any rank it looks, while somebody
    waits for that one, which rank has sent something, and reads one message of that rank.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._lock = threading.Lock()
        self._receives: list[_Receive] = []  # that no message has come for, the earliest first
        self._aside: list[_Message] = []  # that no receive has asked for, the earliest first
        self._reading: set[int] = set()
        self._works: dict[int, Work] = {}  # the latest read, by rank

    def receive(self, x: Any, source: int, tag: int) -> Handle:
        handle = Receive([x], lambda: self._works.get(source) if source in self._reading else None)
        if not self._await(x, source, tag, handle) and source != self._comm.rank:
            self._start(source)
        return handle

    def receive_any(self, x: Any, tag: int, timeout: float | None) -> Handle:
        """The first message with this tag of any rank: of each rank, messages come in their order."""
        handle = FromAny([x], self._look, timeout)
        self._await(x, None, tag, handle)
        return handle

    def put(self, x: Any, tag: int) -> None:
        """A message from this rank to itself."""
        self._arrived(_Message(self._comm.rank, _header(tag, x), as_bytes(x).clone()))

    def _await(self, x: Any, source: int | None, tag: int, handle: Handle) -> bool:
        """True if the message has come already."""
        out = x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
        receive = _Receive(source, _header(tag, x), out, handle, None if out is x else x)
        with self._lock:
            message = next((m for m in self._aside if m.matches(source, tag)), None)
            if message is None:
                self._receives.append(receive)
                return False
            self._aside.remove(message)
        self._hand_over(receive, message)
        return True

    def _look(self) -> None:
        """Reads a message for receives from any rank, if there is one."""
        with self._lock:
            reading = list(self._reading)
        if (source := self._comm.find_sender(reading)) is not None:
            self._start(source)

    def _start(self, source: int) -> None:
        with self._lock:
            if source in self._reading:
                return
            self._reading.add(source)
        self._drive(self._read(source), source)

    def _read(self, source: int) -> _Reads:
        """Reads a message, and more of them while receives name their rank."""
        receive: _Receive | None = None
        try:
            while True:
                packed = bytearray(_HEADER.size)
                yield packed
                tag, count, dtype = _HEADER.unpack(packed)
                header = _Header(tag, count, dtype.rstrip(b"\0").decode())
                with self._lock:
                    receive = self._take(source, tag)
                if receive is not None and receive.wanted == header:
                    data = as_bytes(receive.out)
                else:
                    data = torch.empty(count * getattr(torch, header.dtype).itemsize, dtype=torch.uint8)
                if count:
                    yield data
                message = _Message(source, header, data)
                if receive is not None:
                    self._hand_over(receive, message)
                else:
                    self._arrived(message)
                with self._lock:
                    receive = None
                    if not any(each.source == source for each in self._receives):
                        self._reading.remove(source)
                        return
        except Exception as error:
            with self._lock:
                self._reading.remove(source)
                failed = [each for each in self._receives if each.source in (None, source)]
                self._receives = [each for each in self._receives if each.source not in (None, source)]
            for each in failed if receive is None else [receive, *failed]:
                each.handle.complete(error)

    def _drive(self, reads: _Reads, source: int, error: BaseException | None = None) -> None:
        """Reads what `reads` asks for, now and in callbacks. In a loop where it has arrived at once: calls
        upon calls would fill the stack."""
        with suppress(StopIteration):
            while True:
                target = next(reads) if error is None else reads.throw(error)
                turn = _Turn()

                def done(work: Work, turn: _Turn = turn) -> None:
                    if turn.second():
                        self._drive(reads, source, work.exception())

                try:
                    work = self._comm.recv(target, source, async_op=True)
                except Exception as raised:
                    error = raised
                    continue
                self._works[source] = work
                work.add_done_callback(done)
                if not turn.second():
                    return
                error = work.exception()

    def _arrived(self, message: _Message) -> None:
        with self._lock:
            receive = self._take(message.source, message.header.tag)
            if receive is None:
                self._aside.append(message)
        if receive is not None:
            self._hand_over(receive, message)

    def _take(self, source: int, tag: int) -> _Receive | None:
        """The first receive that such a message is for."""
        found = next((r for r in self._receives if r.source in (None, source) and r.wanted.tag == tag), None)
        if found is not None:
            self._receives.remove(found)
        return found

    def _hand_over(self, receive: _Receive, message: _Message) -> None:
        if receive.wanted != message.header:
            receive.handle.complete(
                ValueError(
                    f"rank {message.source} sent {message.header}, which rank {self._comm.rank} receives as"
                    f" {receive.wanted}: pass tensors of the same size and dtype"
                )
            )
            return
        target = as_bytes(receive.out)
        if target.data_ptr() != message.data.data_ptr():
            target.copy_(message.data)
        if receive.copy_to is not None:
            receive.copy_to.copy_(receive.out)
        receive.handle.source = message.source
        receive.handle.complete()
