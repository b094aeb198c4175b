"""In which order the buckets of a step are sent, the same on all ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from pycomm import _native
from pycomm.group import Communicator

Send = Callable[[int], Any]  # makes the asynchronous call of a bucket, and returns its Work


class Flights(Protocol):
    """The buckets of one step. Each is packed once, in any order, and then sent once."""

    works: list[Any]  # of the calls that were made

    def packed(self, bucket: int) -> None:
        """The bucket's gradients are all there: it may be sent."""

    def send_all(self) -> None:
        """Once all are packed: blocks until all are sent, which need not be until all have arrived."""


class InOrder:
    """Bucket k is sent when it and all before it are packed."""

    def __init__(self, send: Send, count: int) -> None:
        self.works: list[Any] = []
        self._send = send
        self._packed = [False] * count

    def packed(self, bucket: int) -> None:
        self._packed[bucket] = True
        while len(self.works) < len(self._packed) and self._packed[len(self.works)]:
            self.works.append(self._send(len(self.works)))

    def send_all(self) -> None:
        pass


class ByPriority:
    """One bucket flies at a time. Of those that are packed when it has arrived, the most urgent one is next.

    Ranks pack at different times, so rank 0 chooses for all, and broadcasts its choice right before the
    bucket. Another rank that has not packed that bucket yet sends it as soon as it has. (Peng et al., A
    generic communication scheduler for distributed DNN training acceleration, SOSP 2019.)
    """

    def __init__(self, send: Send, urgency: list[int], comm: Communicator) -> None:
        self.works: list[Any] = []
        self._send = send
        self._urgency = urgency  # by bucket: the lowest is sent first
        self._comm = comm
        self._lock = threading.RLock()  # a call that completes at once calls back at once
        self._waiting: set[int] = set()  # packed and not sent
        self._left = len(urgency)
        self._choice = np.zeros(1, np.int64)
        self._wanted: int | None = None  # rank 0's choice, which this rank has not packed
        self._last: Any = None  # the work that the next choice waits for
        self._failure: _native.CommError | None = None  # met in a callback

    def packed(self, bucket: int) -> None:
        with self._lock:
            self._raise_failure()
            self._waiting.add(bucket)
            if self._comm.rank == 0:
                self._choose()
            elif self._wanted == bucket:
                self._follow(bucket)
            elif self._last is None and self._wanted is None:  # the first one of the step
                self._await_choice()

    def send_all(self) -> None:
        while True:
            with self._lock:
                self._raise_failure()
                if self._left == 0:
                    return
                last = self._last
            last.wait()
            with self._lock:  # its callback may come later, or have come
                self._raise_failure()
                self._go_on(last)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _choose(self) -> None:
        """On rank 0, unless a bucket flies."""
        if not self._waiting or (self._last is not None and not self._last.is_completed()):
            return
        bucket = min(self._waiting, key=lambda each: self._urgency[each])
        self._choice = np.array([bucket])
        self._broadcast_choice()
        self._last = self._send_now(bucket)
        self._last.add_done_callback(self._called_back)

    def _await_choice(self) -> None:
        """On the other ranks."""
        self._last = self._broadcast_choice()
        self._last.add_done_callback(self._called_back)

    def _called_back(self, work: Any) -> None:
        with self._lock:
            try:
                self._go_on(work)
            except _native.CommError as error:  # for the thread that comes next
                self._failure = error

    def _go_on(self, work: Any) -> None:
        """After what the next choice waited for; the second time it does nothing."""
        with self._lock:
            if work is not self._last or work.exception() is not None or self._left == 0:
                return
            if self._comm.rank == 0:
                self._choose()
                return
            bucket = int(self._choice[0])
            if bucket in self._waiting:
                self._follow(bucket)
            else:
                self._last, self._wanted = None, bucket

    def _follow(self, bucket: int) -> None:
        self._send_now(bucket)
        self._wanted = None
        if self._left:
            self._await_choice()

    def _broadcast_choice(self) -> Any:
        work = self._comm.broadcast(self._choice, root=0, tag="GradientReducer: next bucket", async_op=True)
        self.works.append(work)
        return work

    def _send_now(self, bucket: int) -> Any:
        work = self._send(bucket)
        self.works.append(work)
        self._waiting.discard(bucket)
        self._left -= 1
        return work
