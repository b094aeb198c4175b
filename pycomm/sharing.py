"""Arrays that the other ranks of a node use in place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar, cast, overload

from pycomm import _native, checks

F = TypeVar("F", bound=Callable[..., Any])
_RUN_LATER = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)


class _Block(AbstractContextManager[None]):
    """The block, and the decorator that it is when it gets a function."""

    def __init__(self) -> None:
        self._entered: list[_native.SharedArrays] = []

    def __enter__(self) -> None:
        self._entered.append(_native.SharedArrays())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.pop().end()

    def __call__(self, function: F) -> F:
        if not callable(function):
            raise TypeError(
                f"shared_arrays({checks.shown(function)}): write `with pycomm.shared_arrays():`, or decorate"
                " a function"
            )
        if any(runs_later(function) for runs_later in _RUN_LATER):
            raise TypeError(
                f"shared_arrays decorates {getattr(function, '__qualname__', function)}, whose body runs"
                " after the call has returned: write `with pycomm.shared_arrays():` in the body"
            )

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with _Block():
                return function(*args, **kwargs)

        return cast(F, inside)


@overload
def shared_arrays() -> _Block: ...
@overload
def shared_arrays(function: F, /) -> F: ...
def shared_arrays(function: F | None = None, /) -> _Block | F:
    """NumPy's arrays of 64 KiB and more that are made inside lie in memory that the other ranks can map.

    `with pycomm.shared_arrays():`, or as a decorator of a function, with or without parentheses (not of a
    generator or an async function). Collectives on such arrays copy nothing, as those on comm.empty()'s, and
    no rank has to make them together with others: each says with the call where its own lie. That holds for a
    call if the buffers of all its ranks are such, also views, slices, and tensors made by torch.from_numpy;
    else it runs as with other arrays. Tensors that torch makes are not covered.

    It counts for this thread's context (contextvars): other threads enter it themselves; run_local enters it
    on its rank threads if its caller is inside. Arrays live as long as they are used, past the block and past
    close(). A child of fork() has copies of its own, and makes arrays in plain memory until it enters this
    or calls init() itself. docs/shared-arrays.md has the limits. Raises CommError where the system has no
    shared memory; where it has too little for an array, that array lies in plain memory.
    """
    return _Block() if function is None else _Block()(function)
