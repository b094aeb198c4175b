"""Algorithms written in Python, from the same steps as the library's own: see docs/algorithms.md."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from weakref import WeakSet

from pycomm import _native
from pycomm._native import Builder, Chunk, Ref, World

__all__ = ["Algorithm", "Builder", "Chunk", "Ref", "World"]


class Algorithm(str):
    """An algorithm for `collective`, written by `write(builder, world)`, which adds the steps of one rank per
    call.

    It is a string, its name. From its construction on every communicator of the process knows the name, so
    that both `comm.all_reduce(x, algorithm=star)` and `algorithm="star"` run it. All ranks must define it
    alike. `write` must be pure: the steps depend only on its two arguments.

    Each of its plans is proved before it first runs; a wrong one is a ValueError with the counterexample,
    before any rank has moved. A second algorithm of the same name replaces the first.
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

        Without `roots`, three stand for all if the collective has a root: the first rank, one in the middle
        and the last. Raises ValueError with the call and the first counterexample in words: the rank, the
        step, the value found and the value required. Nothing is run, and no other rank is needed.
        """
        for size, count, placement, in_place in itertools.product(sizes, counts, placements, (False, True)):
            inside = {0, size // 2, size - 1} if self.collective in _native.ROOTED else {0}
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
        except ValueError as error:  # the steps are not a schedule at all
            return str(error)


_algorithms: dict[tuple[str, str], Algorithm] = {}
_communicators: WeakSet[_native.Communicator] = WeakSet()
_lock = threading.Lock()


def introduce(comm: _native.Communicator) -> None:
    """Makes all algorithms of this process, present and future, known to `comm`."""
    with _lock:
        _communicators.add(comm)
        for (collective, name), algorithm in _algorithms.items():
            _native.add_algorithm(comm, collective, name, algorithm.write)
