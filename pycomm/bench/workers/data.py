"""The data that ranks send, and a count of the wrong elements that they receive. Needs only NumPy.

Every rank's data is its own pattern of prime length, so that a misplaced chunk is detected. The values are
integers so small that the result is exact in the type, in any order of the operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

PERIOD = 10_007
TILES = 8  # periods that are compared at a time, so that the check's data stays in the cache

# (elements of a rank's input, of its output) as multiples of the count, for n ranks
SHAPES: dict[str, Callable[[int], tuple[int, int]]] = {
    "all_reduce": lambda n: (1, 1),
    "reduce_scatter": lambda n: (n, 1),
    "all_gather": lambda n: (1, n),
    "broadcast": lambda n: (1, 1),
    "reduce": lambda n: (1, 1),
    "gather": lambda n: (1, n),
    "scatter": lambda n: (n, 1),
    "all_to_all": lambda n: (n, n),
    "barrier": lambda n: (0, 0),
    "send_recv": lambda n: (1, 1),
    **dict.fromkeys(("ping_pong", "one_way", "two_way"), lambda n: (1, 1)),
}
# Between two ranks: there and back; a window of messages to rank 1; and one in each direction at once.
POINT_TO_POINT = ("ping_pong", "one_way", "two_way")
WINDOW = 64  # messages in flight at once, as in the OSU benchmarks
REDUCING = ("all_reduce", "reduce_scatter", "reduce")
ROOTED = ("broadcast", "reduce", "gather", "scatter")
OPS = {
    "sum": np.add,
    "avg": np.add,
    "prod": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "band": np.bitwise_and,
    "bor": np.bitwise_or,
    "bxor": np.bitwise_xor,
}


@dataclass(frozen=True)
class Case:
    """One call to measure. `count`: elements of one rank's part (of the whole, if there are no parts)."""

    collective: str
    count: int
    dtype: str
    op: str = "sum"
    root: int = 0

    def elements(self, size: int) -> tuple[int, int]:
        sent, received = SHAPES[self.collective](size)
        return sent * self.count, received * self.count


def numpy_dtype(name: str) -> np.dtype[Any]:
    try:
        return np.dtype(name)
    except TypeError:
        try:
            import ml_dtypes  # bfloat16, float8_e4m3fn, ...

            found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
            return found
        except ImportError:
            raise ValueError(
                f"{name!r} is not a type of NumPy; for bfloat16 and float8: pip install ml_dtypes"
            ) from None
        except AttributeError:
            raise ValueError(f"{name!r} is a type of neither NumPy nor ml_dtypes") from None


def fill(x: Array, case: Case, rank: int, size: int) -> None:
    """Fills x with the input of rank `rank`."""
    _write(x, _pattern(case, rank, size), 0)


def spoil(x: Array) -> None:
    """Fills x with wrong values, so that elements which the call does not write are detected."""
    x.view(np.uint8)[:] = 0x7B


def wrong(x: Array, out: Array, case: Case, rank: int, size: int, lossy: bool = False) -> int:
    """How many elements of `out`, and of `x` if that is other memory, are wrong. With `lossy`, an element is
    wrong if it is off by more than half the largest magnitude, as many are in a misplaced chunk."""
    count = 0
    if not np.may_share_memory(x, out):
        count += _differ(x, _pattern(case, rank, size), 0, case)
    patterns = [_pattern(case, source, size) for source in range(size)]
    mine = rank * case.count
    if case.collective in ("all_gather", "gather"):
        parts = [(pattern, 0) for pattern in patterns]
    elif case.collective == "all_to_all":
        parts = [(pattern, mine) for pattern in patterns]
    elif case.collective in ("broadcast", "scatter"):
        parts = [(patterns[case.root], mine if case.collective == "scatter" else 0)]
    elif case.collective == "one_way" and rank == 0:
        return count
    elif case.collective in ("send_recv", *POINT_TO_POINT):
        parts = [(patterns[rank - 1], 0)]
    else:
        total = reduce(OPS[case.op], patterns)
        if case.op == "avg":
            total = total / size
        parts = [(total, mine if case.collective == "reduce_scatter" else 0)]
    if case.collective in ("gather", "reduce") and rank != case.root:
        return count
    for place, (pattern, start) in enumerate(parts):
        count += _differ(out[place * case.count : (place + 1) * case.count], pattern, start, case, lossy)
    return count


def _pattern(case: Case, rank: int, size: int) -> Array:
    dtype = numpy_dtype(case.dtype)
    exact = _largest_exact(dtype)  # all integers up to it are exact
    if case.op == "prod":
        low, high = 1, 2 if size < 8 else 1
    elif dtype.kind == "b":
        low, high = 0, 1
    else:
        high = min(100, exact // size)
        low = 0 if dtype.kind == "u" else -high
    # Averages are whole numbers, too.
    scale = size if case.op == "avg" and high >= size else 1
    values = np.random.default_rng(rank).integers(low // scale, high // scale + 1, PERIOD)
    return values * scale


def _largest_exact(dtype: np.dtype[Any]) -> int:
    if dtype.kind in "iu":
        return int(np.iinfo(dtype).max)
    if dtype.kind == "b":
        return 1
    if dtype.isbuiltin == 1:  # not one that ml_dtypes has registered
        return int(2 ** (np.finfo(dtype).nmant + 1))
    import ml_dtypes

    return int(2 ** (ml_dtypes.finfo(dtype).nmant + 1))


def _tile(pattern: Array, start: int, dtype: np.dtype[Any]) -> Array:
    return np.tile(np.roll(pattern, -(start % PERIOD)), TILES).astype(dtype)


def _write(x: Array, pattern: Array, start: int) -> None:
    tile = _tile(pattern, start, x.dtype)
    for at in range(0, x.size, tile.size):
        part = x[at : at + tile.size]
        part[:] = tile[: part.size]


def _differ(x: Array, pattern: Array, start: int, case: Case, lossy: bool = False) -> int:
    tile = _tile(pattern, start, x.dtype)
    count = 0
    for at in range(0, x.size, tile.size):
        part = x[at : at + tile.size]
        expected = tile[: part.size]
        unequal = part != expected
        if lossy:
            apart = np.abs(part.astype(np.float64) - expected.astype(np.float64))
            unequal = ~(apart <= np.abs(pattern).max() / 2)
        if unequal.any() and case.op == "avg" and x.dtype.kind not in "iub":
            # A division, or a product with the reciprocal: the last bit may differ.
            near = np.abs(part.astype(np.complex128) - expected.astype(np.complex128))
            unequal = ~(near <= np.abs(expected.astype(np.complex128)) * 2 / _largest_exact(x.dtype))
        count += int(np.count_nonzero(unequal))
    return count
