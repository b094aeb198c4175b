"""send and recv with the meaning that torch gives to tags: a receive takes the first message of its tag.

pycomm delivers the messages of a pair in the order in which they were sent. So each message is sent as two: a
header with its tag, dtype and size, then its data, if it has any. The receiver reads a header, then the data:
into the tensor of the receive that waits for this tag, or aside, until a receive asks for it. It does so in
callbacks; no thread waits.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Generator
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from pycomm import Communicator, Work
from pycomm.torch.work import Handle

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
    wanted: _Header
    out: Any  # contiguous
    handle: Handle
    copy_to: Any  # the caller's tensor, if that is not `out`


class _Message(NamedTuple):
    header: _Header
    data: Any


class _Turn:
    """For two who come at any time, of whom the second goes on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def second(self) -> bool:
        return not self._lock.acquire(blocking=False)


_Reads = Generator[Any, None, None]  # of buffers to be read


class Inbox:
    """The messages from one rank."""

    def __init__(self, comm: Communicator, source: int) -> None:
        self._comm, self._source = comm, source
        self._lock = threading.Lock()
        self._receives: list[_Receive] = []  # that no message has come for
        self._aside: list[_Message] = []  # that no receive has asked for
        self._reading = False

    def receive(self, x: Any, tag: int) -> Handle:
        handle = Handle([x])
        out = x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
        receive = _Receive(_header(tag, x), out, handle, None if out is x else x)
        with self._lock:
            message = next((m for m in self._aside if m.header.tag == tag), None)
            if message is not None:
                self._aside.remove(message)
            else:
                self._receives.append(receive)
            starts = message is None and not self._reading and self._source != self._comm.rank
            self._reading |= starts
        if message is not None:
            self._hand_over(receive, message)
        elif starts:
            self._drive(self._read())
        return handle

    def put(self, x: Any, tag: int) -> None:
        """A message from this rank to itself."""
        self._arrived(_Message(_header(tag, x), as_bytes(x).clone()))

    def _read(self) -> _Reads:
        """Reads messages while receives wait for any."""
        receive: _Receive | None = None
        try:
            while True:
                packed = bytearray(_HEADER.size)
                yield packed
                tag, count, dtype = _HEADER.unpack(packed)
                header = _Header(tag, count, dtype.rstrip(b"\0").decode())
                with self._lock:
                    receive = self._take(tag)
                if receive is not None and receive.wanted == header:
                    data = as_bytes(receive.out)
                else:
                    data = torch.empty(count * getattr(torch, header.dtype).itemsize, dtype=torch.uint8)
                if count:
                    yield data
                if receive is not None:
                    self._hand_over(receive, _Message(header, data))
                else:
                    self._arrived(_Message(header, data))
                with self._lock:
                    receive, self._reading = None, bool(self._receives)
                    if not self._reading:
                        return
        except Exception as error:
            with self._lock:
                receives, self._receives, self._reading = self._receives, [], False
            for each in receives if receive is None else [receive, *receives]:
                each.handle.complete(error)

    def _drive(self, reads: _Reads, error: BaseException | None = None) -> None:
        """Reads what `reads` asks for, now and in callbacks. In a loop where it has arrived at once: calls
        upon calls would fill the stack."""
        with suppress(StopIteration):
            while True:
                target = next(reads) if error is None else reads.throw(error)
                turn = _Turn()

                def done(work: Work, turn: _Turn = turn) -> None:
                    if turn.second():
                        self._drive(reads, work.exception())

                try:
                    work = self._comm.recv(target, self._source, async_op=True)
                except Exception as raised:
                    error = raised
                    continue
                work.add_done_callback(done)
                if not turn.second():
                    return
                error = work.exception()

    def _arrived(self, message: _Message) -> None:
        with self._lock:
            receive = self._take(message.header.tag)
            if receive is None:
                self._aside.append(message)
        if receive is not None:
            self._hand_over(receive, message)

    def _take(self, tag: int) -> _Receive | None:
        found = next((receive for receive in self._receives if receive.wanted.tag == tag), None)
        if found is not None:
            self._receives.remove(found)
        return found

    def _hand_over(self, receive: _Receive, message: _Message) -> None:
        if receive.wanted != message.header:
            receive.handle.complete(
                ValueError(
                    f"rank {self._source} sent {message.header}, which rank {self._comm.rank} receives as"
                    f" {receive.wanted}: pass tensors of the same size and dtype"
                )
            )
            return
        target = as_bytes(receive.out)
        if target.data_ptr() != message.data.data_ptr():
            target.copy_(message.data)
        if receive.copy_to is not None:
            receive.copy_to.copy_(receive.out)
        receive.handle.complete()
