"""The contents of a bucket in a line short enough for ranks to compare, and the difference between two such
lines.

The tag of a call holds some 200 characters. A short list of tensors is written out, as in
`of 2, #1a2b3c4d: 'w' (64, 32); 'b' (32,)`. A longer one has a letter for each run of tensors, and each rank
adds its own tensors in words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

_LONGEST = 130
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_RANKS = re.compile(r"rank (\d+) called ")
_LIST = re.compile(r"(\w+) (of \d+, #[0-9a-f]{8})")
_SIGNATURE = re.compile(r"bucket of (\d+), #([0-9a-f]{8}): ([^\"]*)\"")


def signature(names: Sequence[str], shapes: Sequence[Any]) -> str:
    whole = hashlib.blake2b(repr((names, shapes)).encode(), digest_size=4).hexdigest()
    text = "; ".join(_tensors(names, shapes))
    plain = text.isascii() and '"' not in text and text.count("; ") == max(len(names) - 1, 0)
    short = plain and len(text) <= _LONGEST
    return f"of {len(names)}, #{whole}: {text if short else _letters(names, shapes)}"


def lists(tag: str) -> list[tuple[str, str]]:
    """The lists of tensors that the tag of a call begins with: for each the word before it, and what tells it
    from others. `exempt of 1, #0a1b2c3d, bucket of 2, #1a2b3c4d: ...` has two."""
    return _LIST.findall(tag.split(":", 1)[0])


def first_difference(text: str, names: Sequence[str], shapes: Sequence[Any]) -> str:
    """Finds where the two buckets in a MismatchError's text differ; one has these names and shapes."""
    found = _SIGNATURE.findall(text)
    if len(found) != 2 or found[0][1] == found[1][1]:
        return ""
    (count, _, here), (other, _, there) = found
    in_words = [part.endswith(")") for part in (here, there)]
    if all(in_words):
        pairs = zip_longest(here.split("; "), there.split("; "), fillvalue="no tensor")
        i, (a, b) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        here, there = (f" on rank {rank}" for rank in _RANKS.findall(text)[:2])
        return f" The first tensor that differs is `tensors[{i}]`: {a}{here} and {b}{there}."
    if any(in_words) or _run(int(count)) != _run(int(other)):
        return f" The buckets have {count} and {other} tensors."
    run = _run(int(count))
    different = [i for i, (a, b) in enumerate(zip_longest(here, there)) if a != b]
    if not different:  # two different runs of tensors may have the same letter
        return ""
    i = different[0]
    own = _tensors(names, shapes)[i * run : (i + 1) * run]
    which = f"`tensors[{i}]`" if run == 1 else f"in `tensors[{i * run}:{(i + 1) * run}]`"
    return f" The first tensor that differs is {which}: {', '.join(own) or 'no tensor'} on this rank."


def _tensors(names: Sequence[str], shapes: Sequence[Any]) -> list[str]:
    shown = (shape if isinstance(shape, tuple) else (shape,) for shape in shapes)
    return [f"{name!r} {shape}" for name, shape in zip(names, shown, strict=True)]


def _letters(names: Sequence[str], shapes: Sequence[Any]) -> str:
    tensors, run = _tensors(names, shapes), _run(len(names))
    runs = [tensors[i : i + run] for i in range(0, len(tensors), run)]
    digests = (hashlib.blake2b(repr(each).encode(), digest_size=1).digest()[0] for each in runs)
    return "".join(_LETTERS[digest % len(_LETTERS)] for digest in digests)


def _run(count: int) -> int:
    """How many tensors share a letter."""
    return max(1, -(-count // _LONGEST))
