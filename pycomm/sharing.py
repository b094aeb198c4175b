"""Arrays that the other ranks of a node use in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, overload

from pycomm import _native

F = TypeVar("F", bound=Callable[..., Any])


@overload
def shared_arrays() -> AbstractContextManager[None]: ...
@overload
def shared_arrays(function: F, /) -> F: ...
def shared_arrays(function: F | None = None, /) -> AbstractContextManager[None] | F:
    """NumPy's arrays of 64 KiB and more that are made inside lie in memory that the other ranks can map.

    `with pycomm.shared_arrays():`, or as a decorator, with or without parentheses. Collectives on such arrays
    copy nothing, as those on comm.empty()'s, and no rank has to make them together with others: each says
    with the call where its own lie. That holds for a call if the buffers of all its ranks are such, also
    views, slices, and tensors made by torch.from_numpy; else it runs as with other arrays. Tensors that torch
    makes are not covered.

    It counts for this thread's context (contextvars): other threads enter it themselves; run_local enters it
    on its rank threads if its caller is inside. Arrays live as long as they are used, past the block and past
    close(). A child of fork() has copies of its own, and makes arrays in plain memory until it enters this
    or calls init() itself. docs/shared-arrays.md has the limits. Raises CommError where the system has no
    shared memory; where it has too little for an array, that array lies in plain memory.
    """
    return _block() if function is None else _block()(function)


@contextmanager
def _block() -> Iterator[None]:
    shared = _native.SharedArrays()
    try:
        yield
    finally:
        shared.end()
