"""The text: the sources of the standard library, which every Python includes.

A batch is a pure function of (seed, step): every rank draws the same global batch and takes its share of
the rows, so that the ranks together train on exactly what one rank alone would train on.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

VOCABULARY = 128  # ASCII; anything else reads as "?"

Tokens = NDArray[np.uint8]


def read_text() -> Tokens:
    """The top-level modules of the standard library, in order of name: about 4.7 MB."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    return np.frombuffer(text.encode("ascii", errors="replace"), np.uint8)


def split_text(text: Tokens) -> tuple[Tokens, Tokens]:
    """Returns the first 95 % to train on, and the rest, held out to measure what was learnt."""
    cut = len(text) * 95 // 100
    return text[:cut], text[cut:]


def rank_batch(
    text: Tokens, context: int, global_batch: int, *, seed: int, step: int, rank: int = 0, size: int = 1
) -> tuple[Tokens, Tokens]:
    """This rank's rows of the global batch of `step`: (rows of `context` bytes, the byte after each row)."""
    if global_batch % size:
        # The average over ranks is the average over the batch only if all ranks have equally many rows.
        raise ValueError(f"a global batch of {global_batch} rows cannot be divided among {size} ranks")
    windows = np.lib.stride_tricks.sliding_window_view(text, context + 1)
    chosen = np.random.default_rng([seed, step]).integers(len(windows), size=global_batch)
    rows = global_batch // size
    mine = windows[chosen[rank * rows : (rank + 1) * rows]]
    return mine[:, :context], mine[:, context]
