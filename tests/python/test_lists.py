"""Lists of buffers, made up in many examples: accepted lists are reduced exactly and nothing else is written;
refused lists change nothing.

PYCOMM_FUZZ_ROUNDS: how many lists are made, 2,000 by default.
"""

import os
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

import pycomm
from pycomm import Communicator

ROUNDS = int(os.environ.get("PYCOMM_FUZZ_ROUNDS", "2000"))
DTYPES = ["f4", "f8", "f2", "i4", "u1", "i8", "c8"]
SMALL, LARGE = (
    3 << 10,
    600 << 10,
)  # bytes of the items' memory; some items are large enough for calls of their own


class Item(NamedTuple):
    """An item's place in that memory, the same on all ranks."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    step: int  # 1: contiguous
    frozen: bool  # marked as read-only

    def within(self, memory: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        count = int(np.prod(self.shape)) * self.step
        span = memory[self.begin : self.begin + count * np.dtype(self.dtype).itemsize]
        view = span.view(self.dtype)[:: self.step].reshape(self.shape)
        view.flags.writeable = not self.frozen
        return view

    @property
    def strided(self) -> bool:
        return self.step > 1 and int(np.prod(self.shape)) > 1


def make_items(rng: random.Random, room: int) -> list[Item]:
    items: list[Item] = []
    for _ in range(rng.choice([0, 1, 2, 3, 8, 30])):
        if items and rng.random() < 0.05:
            items.append(rng.choice(items))  # the same tensor again
            continue
        dtype = rng.choice(DTYPES)
        size = np.dtype(dtype).itemsize
        step = 2 if rng.random() < 0.01 else 1
        most = max(room // size // step // 8, 1)
        shape = tuple(rng.choice([0, 1, 1, 2, 3, 7]) for _ in range(rng.randrange(3)))
        if rng.random() < 0.3:
            shape = (rng.randrange(most),)
        count = int(np.prod(shape)) * step
        begin = rng.randrange(0, room - count * size + 1)
        begin -= 0 if rng.random() < 0.2 else begin % size  # some lie off their type's alignment
        items.append(Item(dtype, shape, begin, step, rng.random() < 0.01))
    return items


def spans(items: Sequence[Item]) -> list[tuple[int, int]]:
    sizes = [int(np.prod(i.shape)) * i.step * np.dtype(i.dtype).itemsize for i in items]
    return [(i.begin, i.begin + size) for i, size in zip(items, sizes, strict=True) if size]


def lie_apart(items: Sequence[Item]) -> bool:
    """Whether the items lie apart; the same tensor may occur twice."""
    found = sorted(set(spans(items)))
    return all(a[1] <= b[0] for a, b in pairwise(found))


def one(comm: Communicator, rng: random.Random) -> str:
    """Tries one list; all ranks draw the same."""
    room = LARGE if rng.random() < 0.02 else SMALL
    items, collective, root = (
        make_items(rng, room),
        rng.choice(["all_reduce", "broadcast"]),
        rng.randrange(comm.size),
    )
    if collective == "broadcast":  # only the root may read items marked as read-only
        items = [item._replace(frozen=False) for item in items]
    others = rng.random() < 0.3  # into `out`, which has its own memory
    seed, asynchronous = rng.getrandbits(32), rng.random() < 0.2
    wrong_out = others and bool(items) and rng.random() < 0.03
    memories = [
        np.random.default_rng([seed, rank]).integers(0, 2, room, np.uint8) for rank in range(comm.size)
    ]
    for rank, memory in enumerate(memories):
        for item in items:  # sums are exact in every type; if items share memory, the last one's values stay
            values = np.arange(np.prod(item.shape, dtype=int)).reshape(item.shape) + item.begin
            np.copyto(item._replace(frozen=False).within(memory), (values + rank) % 5, casting="unsafe")
    inputs = [[item.within(memory).copy() for item in items] for memory in memories]
    mine, before = memories[comm.rank], memories[comm.rank].copy()
    x = [item.within(mine) for item in items]
    outs = [np.full(item.shape, 9, item.dtype) for item in items]
    if wrong_out:
        outs[-1] = np.zeros((*items[-1].shape, 2), items[-1].dtype)
    keywords: dict[str, Any] = {"out": outs} if others else {}
    if collective == "broadcast":
        keywords["root"] = root
    refused = any(item.strided or (item.frozen and not others) for item in items)
    refused = refused or (asynchronous and not items)  # nothing to wait for
    refused = refused or (wrong_out and items[-1].shape.count(0) == 0)
    try:
        got = getattr(comm, collective)(x, async_op=asynchronous, **keywords)
        if asynchronous:
            got.wait()
    except ValueError:
        assert refused, (items, collective, others)
        assert (mine == before).all() and all((out == 9).all() for out in outs[: len(outs) - wrong_out])
        return "refused"
    assert not refused, (items, collective, others)
    sums = [sum(parts[1:], start=parts[0]) for parts in zip(*inputs, strict=True)]
    wanted = sums if collective == "all_reduce" else inputs[root]
    if others:
        assert (mine == before).all()
        if not wrong_out:
            for out, want in zip(outs, wanted, strict=True):
                np.testing.assert_array_equal(out, want)
        return "into others"
    untouched = np.ones(room, bool)
    for begin, end in spans(items):
        untouched[begin:end] = False
    assert (mine == before)[untouched].all()
    if not lie_apart(items):
        return "shared memory"
    for item, want in zip(items, wanted, strict=True):
        np.testing.assert_array_equal(item.within(mine), want)
    return "in place"


def test_made_up_lists() -> None:
    def fn(comm: Communicator) -> set[str]:
        rng = random.Random(ROUNDS)
        return {one(comm, rng) for _ in range(ROUNDS)}

    for seen in pycomm.run_local(fn, 2, timeout=60):
        assert seen == {"refused", "into others", "shared memory", "in place"}
