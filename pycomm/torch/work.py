"""The handle of a call of torch.distributed: pycomm's callback completes it, and no thread waits for it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Work as _TorchWork

from pycomm import CommError, CommTimeoutError, Work
from pycomm.torch.uncompiled import uncompiled


class _Thread(threading.local):
    calls_back = False  # it runs callbacks of futures


_THREAD = _Thread()
Finish = Callable[[], None]


def seconds(timeout: timedelta | None) -> float | None:
    """torch says "no timeout of its own" with zero and with negative ones."""
    found = 0.0 if timeout is None else timeout.total_seconds()
    return found if found > 0 else None


@uncompiled
class Handle(_TorchWork):  # type: ignore[misc]  # torch is not typed here
    """What a collective returns to torch.

    `result` is the tensors that the call fills, kept alive until then. The future holds them, or fails with
    the error's text in a RuntimeError, which is all that torch's futures keep of an error.
    """

    _stays = False  # when nobody in Python needs it any more

    def __init__(self, result: list[Any]) -> None:
        super().__init__()
        self._result = result
        self.source = -1  # of a receive: the rank that sent
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._native: list[Work] = []
        self._callbacks: list[Finish] = []
        self._trigger: Any = None
        self._future: Any = None

    def __del__(self) -> None:
        if self._stays:
            _DROPPED.append(self)

    def follow(self, works: list[Work], finish: Finish | None = None) -> None:
        """Completes when all of `works` have and `finish` has brought results to the caller's tensors."""
        self._native = works
        self._stays = len(self._result) == 1 and self._result[0].numel() == 1
        left = len(works)

        def one_less(work: Work) -> None:
            nonlocal left
            with self._lock:
                left -= 1
                last = left == 0
            if last:
                self._settle(finish)

        for work in works:
            work.add_done_callback(one_less)
        if not works:
            self._settle(finish)

    def _settle(self, finish: Finish | None) -> None:
        error = next((e for e in (work.exception() for work in self._native) if e is not None), None)
        if error is None and finish is not None:
            try:
                finish()
            except Exception as raised:
                error = raised
        self.complete(error)

    def complete(self, error: BaseException | None = None) -> None:
        with self._lock:
            self._error = error
            self._native = []
            for callback in self._callbacks:
                callback()
            self._done.set()
            trigger = self._trigger
        if trigger is None:
            return
        outer, _THREAD.calls_back = _THREAD.calls_back, True
        try:
            trigger.set_result(None)
        finally:
            _THREAD.calls_back = outer

    def when_complete(self, callback: Finish) -> None:
        """Calls it before whoever waits goes on; at once if the call has completed."""
        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def wait(self, timeout: timedelta | None = None) -> bool:
        limit = seconds(timeout)
        while not self._done.is_set() and (works := self._works()):
            for work in works:  # whoever waits for pycomm's Work drives it
                try:
                    work.wait(limit)
                except CommError:
                    if not work.is_completed():
                        raise
            self._done.wait(1e-5)  # another thread may be about to say so
        if not self._done.wait(limit):
            raise CommTimeoutError(f"the call has not completed within {limit} s; it goes on")
        if self._error is not None:
            raise self._error
        return True

    def _works(self) -> list[Work]:
        """What to wait for now."""
        return self._native

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._done.is_set()

    def is_success(self) -> bool:
        return self._done.is_set() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def _source_rank(self) -> int:
        return self.source

    def result(self) -> list[Any]:
        self.wait()
        return self._result

    def get_future(self) -> Any:
        """In a callback of another future, it waits for the call: that thread drives calls, and the future's
        wait() would not."""
        self._stays = False
        if _THREAD.calls_back and self._works():
            with suppress(Exception):  # the future will say
                self.wait()
        with self._lock:
            if self._future is not None:
                return self._future
            # Future.set_exception would end the process where C++ waits, as DDP's backward does. What a
            # callback raises reaches C++ as a RuntimeError.
            trigger = torch.futures.Future()
            self._future = trigger.then(self._outcome)
            if not self._done.is_set():
                self._trigger = trigger
                return self._future
        trigger.set_result(None)
        return self._future

    def _outcome(self, _: Any) -> list[Any]:
        if self._error is not None:
            raise self._error
        return self._result


# DDP's join() hands the work of an all_reduce of one element from Python to C++, which keeps the C++ half
# alone: it would find no methods of a Handle that is gone, and wait forever. Python does not learn when C++
# has let go. So the latest of such handles stay.
_DROPPED: deque[Handle] = deque(maxlen=64)


@uncompiled
class Receive(Handle):
    """A receive from one rank. `reading`: the read that goes on there, which may bring its message."""

    def __init__(self, result: list[Any], reading: Callable[[], Work | None]) -> None:
        super().__init__(result)
        self._reading = reading

    def _works(self) -> list[Work]:
        work = self._reading()
        return [] if work is None else [work]


@uncompiled
class FromAny(Handle):
    """A receive from any rank, which goes on while somebody waits for it or asks whether it has completed.

    `look` takes what has come, and raises where no message can come any more. `limit`: how many seconds
    wait() waits.
    """

    def __init__(self, result: list[Any], look: Callable[[], None], limit: float | None) -> None:
        super().__init__(result)
        self._look, self._limit = look, limit

    def wait(self, timeout: timedelta | None = None) -> bool:
        if _THREAD.calls_back:
            raise ValueError("a receive from any rank in a callback: pass `src`, or receive outside of it")
        limit = seconds(timeout) or self._limit or float("inf")
        end, pause = time.monotonic() + limit, 1e-5
        while not self._done.is_set():
            self._look()
            if not self._done.wait(pause) and time.monotonic() > end:
                raise CommTimeoutError(
                    f"no message has come from any rank within {limit} s; the receive goes on"
                )
            pause = min(2 * pause, 1e-3)
        return super().wait()

    def is_completed(self) -> bool:
        with suppress(CommError):  # wait() raises it
            self._done.is_set() or self._look()
        return self._done.is_set()

    def get_future(self) -> Any:
        raise ValueError(
            "a receive from any rank goes on while somebody waits for it: call wait(), or pass `src`"
        )


def completed(result: list[Any]) -> Handle:
    handle = Handle(result)
    handle.complete()
    return handle
