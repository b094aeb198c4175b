"""How a process comes by a communicator, and what a communicator can do that need not be fast.

The collectives themselves are native methods, called with no Python frame between.
"""

from __future__ import annotations

import itertools
import math
import operator
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from pycomm import _native, checks, objects
from pycomm.algorithm import introduce
from pycomm.byhand import Watch
from pycomm.rollcall import report
from pycomm.sharing import shared_arrays
from pycomm.world import World, by_hand, find_world, take

T = TypeVar("T")


class Store(Protocol):
    """Where ranks leave each other a few bytes. The stores of torch.distributed are such."""

    def set(self, key: str, value: bytes, /) -> object: ...
    def get(self, key: str, /) -> bytes | str:
        """Waits until the key is there."""


@dataclass(frozen=True)
class premul_sum:
    """The operator that multiplies every rank's values by `factor` as they are read, and sums them.

    `comm.all_reduce(x, op=pycomm.premul_sum(0.5))`, likewise reduce and reduce_scatter. `factor` is the same
    on all ranks: MismatchError otherwise. Raises TypeError or ValueError if it is not a finite number.
    """

    factor: float

    def __post_init__(self) -> None:
        found = checks.number(self.factor, "factor")
        if not math.isfinite(found):
            raise ValueError(f"`factor` is {checks.shown(self.factor)}: pass a finite number")
        object.__setattr__(self, "factor", found)


class Communicator(_native.Communicator):
    """A group of ranks that communicate, as one of them sees it.

    It is also a context manager that closes the group at the end.
    """

    def __init__(self, other: _native.Communicator | None = None, in_threads: bool = False) -> None:
        if not isinstance(other, _native.Communicator):
            raise TypeError(
                "a Communicator is not made by hand: use pycomm.init(), or pycomm.run_local(fn, n)"
            )
        super().__init__(other)
        self._in_threads = in_threads  # ranks of one process share what a process has once
        introduce(self)

    def broadcast_object(self, obj: object, root: int = 0) -> objects.Object:
        """Rank `root`'s object, on every rank; the others' `obj` is ignored.

        For the types of JSON and bytes (see pycomm.objects). What root cannot encode is root's TypeError and
        a ValueError on the others; the group stays usable.
        """
        payload, error = _try_encode(obj) if self.rank == root else (b"", None)
        length = np.array([-1 if error else len(payload)], np.int64)
        self.broadcast(length, root=root, tag="broadcast_object")
        _raise_failures(error, [root] if length[0] < 0 else [])
        data = _buffer(payload) if self.rank == root else np.empty(int(length[0]), np.uint8)
        self.broadcast(data, root=root, tag="broadcast_object")
        return objects.decode(data.tobytes())

    def all_gather_object(self, obj: object) -> list[objects.Object]:
        """Every rank's object, in rank order, on every rank; with broadcast_object's types and errors."""
        payload, error = _try_encode(obj)
        lengths = np.empty(self.size, np.int64)
        mine = np.array([-1 if error else len(payload)], np.int64)
        self.all_gather(mine, out=lengths, tag="all_gather_object")
        _raise_failures(error, [rank for rank, length in enumerate(lengths) if length < 0])
        data = np.empty(int(lengths.sum()), np.uint8)
        self.all_gather(_buffer(payload), out=data, counts=lengths.tolist(), tag="all_gather_object")
        return [objects.decode(part.tobytes()) for part in np.split(data, np.cumsum(lengths)[:-1])]

    def split(self, color: int, key: int = 0) -> Communicator | None:
        """The group of those ranks that gave the same color, ordered by key and then by rank here; None for a
        negative color. Collective."""
        group = super().split(color, key)
        return None if group is None else type(self)(group, self._in_threads)

    def shrink(self) -> Communicator:
        """The group of those ranks that are still there, in the same order: to go on after a PeerLostError.

        Collective among them. The old communicator is of no more use, nor is symmetric memory made with it.
        Raises CommTimeoutError if a rank that lives does not come.
        """
        return type(self)(super().shrink(), self._in_threads)

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            with suppress(_native.CommError):  # the error that is on its way says more
                self.leave(_in_words(error))

    def __repr__(self) -> str:
        return f"<pycomm.Communicator rank {self.rank} of {self.size}>"


def init(
    *,
    store: Store | None = None,
    rank: int | None = None,
    size: int | None = None,
    timeout: float | None = None,
) -> Communicator:
    """Joins the other ranks and returns the communicator of all of them.

    The world is what the launcher says (pycomm.world), or what `store`, `rank` and `size` say, which go
    together. `timeout`, in seconds, is how long to wait for a rank that is late, here and in every call on
    the group; without it PYCOMM_TIMEOUT holds. Every call of `init` makes a group of its own, and all ranks
    make the same calls in the same order.

    Raises ValueError where the environment or the arguments describe no world (docs/environment.md), or one
    of several machines; MemoryError where there is no space for the group's shared memory; CommTimeoutError
    where a rank does not come.
    """
    if store is not None and rank is not None and size is not None:
        if not 0 <= rank < size:
            raise ValueError(f"rank={rank} does not fit size={size}: ranks go from 0 to size - 1")
        address = _meet_at(store, rank)
    elif store is None and rank is None and size is None:
        world = find_world()
        take(world)
        rank, size = world.rank, world.size
        call = next(_init_calls)
        address = f"{world.address}|{call}"
        report(world.address, rank, call + 1)
        if by_hand(world):
            return Communicator(_join_by_hand(world, address, timeout))
    else:
        raise ValueError(
            f"store={store!r}, rank={rank!r}, size={size!r}: give all three, or none to take the"
            " launcher's word"
        )
    return Communicator(_native.join(rank, size, address, timeout))


def _join_by_hand(world: World, address: str, timeout: float | None) -> _native.Communicator:
    with Watch(world.rank) as watch:
        try:
            return _native.join(world.rank, world.size, address, timeout)
        except _native.CommTimeoutError as error:
            remedy = watch.remedy()
            raise _native.CommTimeoutError(f"{error} {remedy}" if remedy else str(error)) from None


def run_local(
    fn: Callable[[Communicator], T],
    n: int,
    *,
    timeout: float | None = None,
    nodes: int | Sequence[int] = 1,
    delays: int | None = None,
) -> list[T]:
    """Runs `fn(comm)` on `n` rank threads of this process; returns what they returned, in rank order.

    If one raises, the others get PeerLostError rather than wait for it, and when all have ended, the error
    that came first is raised here. A communicator is closed when its rank returns. `timeout` is as in init.
    For tests and notebooks: rank threads share the interpreter's lock between calls, and all that is not made
    in `fn`. A model from outside is one model, which all of them change. Inside of shared_arrays(), `fn` runs
    inside of it as well.

    `nodes` makes up nodes, to try what several machines will do: that many, with as many ranks each as
    they can share evenly in order, or a node for each rank, as in nodes=[0, 0, 1]. Data then goes between
    nodes by messages alone. `delays` is a seed, which decides how long each message takes, and which
    overtakes which: to find what depends on it.
    """
    if not callable(fn):
        raise TypeError(f"`fn` is {fn!r}: pass a function first, then how many ranks: run_local(fn, 2)")
    n = checks.integer(n, "n")
    if n < 1:
        raise ValueError(f"n={n}: a group has at least one rank")
    joined = _native.join_threads(n, timeout, _node_of_each(nodes, n), delays)
    comms = [Communicator(comm, in_threads=True) for comm in joined]
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    memory = shared_arrays if _native.makes_shared_arrays() else nullcontext

    def run(comm: Communicator) -> None:
        try:
            with memory():
                results[comm.rank] = fn(comm)
            comm.close()
        except BaseException as error:
            errors.append(error)
            comm.abandon()
            with suppress(_native.CommError):
                comm.leave(_in_words(error))

    threads = [
        threading.Thread(target=run, args=(comm,), name=f"pycomm rank {rank}", daemon=True)
        for rank, comm in enumerate(comms)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:  # Ctrl-C comes to this thread only
        for comm in comms:
            comm.abandon()
        raise
    if errors:
        consequences = (_native.PeerLostError, _native.AbortedError)
        raise next((error for error in errors if not isinstance(error, consequences)), errors[0])
    return [results[rank] for rank in range(n)]


def _node_of_each(nodes: int | Sequence[int], n: int) -> list[int]:
    """The node of each rank, by numbers from 0 on."""
    try:
        if hasattr(nodes, "__index__") and np.ndim(nodes) == 0:
            count = operator.index(nodes)
            if not 1 <= count <= n:
                raise ValueError(f"nodes={nodes}: {n} ranks can be on 1 to {n} nodes")
            return [rank * count // n for rank in range(n)]
        if not isinstance(nodes, Sequence | np.ndarray) or isinstance(nodes, str | bytes):
            raise TypeError
        names = [operator.index(node) for node in nodes]
    except TypeError:
        raise TypeError(
            f"`nodes` is {nodes!r}: pass how many nodes, or a list with the number of each rank's node"
        ) from None
    if len(names) != n:
        raise ValueError(f"nodes={nodes!r} names {len(names)} nodes for {n} ranks: name one for each rank")
    known = list(dict.fromkeys(names))
    return [known.index(name) for name in names]


def _in_words(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


_init_calls = itertools.count()
_store_calls: WeakKeyDictionary[Store, itertools.count[int]] = WeakKeyDictionary()


def _meet_at(store: Store, rank: int) -> str:
    """Rank 0 makes up the address; the others read it."""
    key = f"pycomm/{next(_store_calls.setdefault(store, itertools.count()))}"
    if rank == 0:
        address = secrets.token_hex(16)
        store.set(key, address.encode())
        return address
    value = store.get(key)
    return value if isinstance(value, str) else bytes(value).decode()


def _buffer(payload: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(bytearray(payload), np.uint8)  # of a bytearray: writable


def _try_encode(obj: object) -> tuple[bytes, Exception | None]:
    # Raised only after the others have been told: they would wait for this rank until the deadline.
    try:
        return objects.encode(obj), None
    except (TypeError, ValueError) as error:
        return b"", error


def _raise_failures(error: Exception | None, failed: list[int]) -> None:
    if error:
        raise error
    if failed:
        ranks = ", ".join(map(str, failed))
        raise ValueError(
            f"rank {ranks} gave an object that cannot be sent: the TypeError or ValueError there says why"
        )
