"""The memory that calls send from and receive into, and the caches that hold it. Needs only NumPy.

A user's array begins where the allocator puts it: NumPy's large arrays lie 16 bytes beyond a page, torch's on
a cache line. Copies and vectors are faster at some addresses than at others, so nothing is aligned unless
requested.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 << 20


def plain(count: int, dtype: np.dtype[Any], offset: int | None = None, huge: bool = False) -> Array:
    """Memory from NumPy; with `offset` its first byte lies that many bytes beyond a page.

    `huge`: large arrays lie entirely in huge pages. NumPy asks for them, too, but what it gets depends on
    what was freed before."""
    size = count * dtype.itemsize
    if huge and size >= HUGE_PAGE:
        memory = mmap.mmap(-1, size + 2 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return placed(np.frombuffer(memory, np.uint8), count, dtype, offset or 0, HUGE_PAGE)
    if offset is None:
        return np.empty(count, dtype)
    return placed(np.empty(size + 2 * PAGE, np.uint8), count, dtype, offset)


def placed(whole: Array, count: int, dtype: np.dtype[Any], offset: int, page: int = PAGE) -> Array:
    """The array in `whole` that begins `offset` bytes beyond a page."""
    start = -whole.ctypes.data % page + offset
    array: Array = whole[start : start + count * dtype.itemsize].view(dtype)
    return array


class Caches:
    """Flushes the caches: afterwards their contents are only in memory."""

    def __init__(self) -> None:
        # Reading and writing twice the largest cache replaces everything; stores alone may bypass caches.
        self._filler = np.zeros(2 * max(_sizes(), default=32 << 20), np.uint8)

    def flush(self) -> None:
        np.add(self._filler, 1, out=self._filler)


def _sizes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> list[int]:
    found = []
    for file in folder.glob("index*/size"):
        if says := re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip()):  # some kernels give none
            found.append(int(says[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[says[2]])
    return found
