"""Algorithms written in Python, of the same steps as the library's own: see docs/algorithms.md."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from weakref import WeakSet

from pycomm import _native
from pycomm._native import Builder, Chunk, Ref, World

__all__ = ["Algorithm", "Builder", "Chunk", "Ref", "World"]

_ROOTED = ("broadcast", "reduce", "gather", "scatter")


class Algorithm(str):
    """An algorithm for `collective` that `write(builder, world)` writes, one rank's steps a call.

    It is a string, its name, and from its construction on the name is known to every communicator of the
    process, so that both `comm.all_reduce(x, algorithm=star)` and `algorithm="star"` run it. All ranks must
    define it alike. `write` must be pure: the steps depend on its two arguments and on nothing else.

    A plan that it gives is proved before it first runs; a wrong one is a ValueError with the counterexample,
    before any rank has moved. A second algorithm of the same name takes the place of the first.
    """

    collective: str
    write: Callable[[Builder, World], None]

    def __new__(cls, name: str, collective: str, write: Callable[[Builder, World], None]) -> Algorithm:
        if not name or name in _native.algorithms(collective):
            raise ValueError(f"name={name!r}: {collective} has an algorithm of this name; choose another")
        self = super().__new__(cls, name)
        self.collective = collective
        self.write = write
        with _lock:
            _algorithms[collective, name] = self
            for comm in _communicators:
                _native.add_algorithm(comm, collective, name, write)
        return self

    def verify(
        self,
        sizes: Iterable[int] = range(1, 9),
        counts: Iterable[int] = (0, 1, 7, 1001, 300_007),
        placements: Iterable[str] = ("plain", "symmetric"),
        roots: Iterable[int] | None = None,
        *,
        dtype: str = "float32",
        op: str = "sum",
    ) -> None:
        """Proves the plans for these worlds, element counts and placements, in place and not.

        Without `roots`, and where the collective has one, the first rank, one inside and the last stand for
        all. Raises ValueError with the call and the first counterexample in words: the rank, the step, what
        is there and what should be. Nothing is run, and no other rank is needed.
        """
        for size, count, placement, in_place in itertools.product(sizes, counts, placements, (False, True)):
            inside = {0, size // 2, size - 1} if self.collective in _ROOTED else {0}
            for root in sorted(inside) if roots is None else roots:
                wrong = self._counterexample(size, count, dtype, op, root, placement, in_place)
                if wrong:
                    ranks = f"{size} rank{'s' * (size > 1)}{f', root {root}' if root else ''}"
                    raise ValueError(
                        f"algorithm {str(self)!r} is wrong. {self.collective} of {count} {dtype} ({op}) on"
                        f" {ranks}, {placement} buffers{', in place' if in_place else ''}: {wrong}"
                    )

    def _counterexample(
        self, size: int, count: int, dtype: str, op: str, root: int, placement: str, in_place: bool
    ) -> str | None:
        try:
            return _native.verify(
                self,
                self.collective,
                size,
                count,
                dtype=dtype,
                op=op,
                root=root,
                placement=placement,
                in_place=in_place,
                write=self.write,
            )
        except ValueError as error:  # steps that are no schedule at all
            return str(error)


_algorithms: dict[tuple[str, str], Algorithm] = {}
_communicators: WeakSet[_native.Communicator] = WeakSet()
_lock = threading.Lock()


def introduce(comm: _native.Communicator) -> None:
    """Makes the algorithms that there are, and those still to come, known to `comm`."""
    with _lock:
        _communicators.add(comm)
        for (collective, name), algorithm in _algorithms.items():
            _native.add_algorithm(comm, collective, name, algorithm.write)
