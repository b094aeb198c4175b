"""Vectors that every rank can compute for all ranks, and comparisons for tests of codecs."""

from typing import Any

import numpy as np

from pycomm import Communicator, codecs

Array = np.ndarray[Any, Any]
F32 = np.float32
COUNT = 1 << 17


def gaussian(rank: int, count: int = COUNT, dtype: Any = F32) -> Array:
    return np.random.default_rng([rank, count]).standard_normal(count).astype(dtype)


def mean(size: int, count: int = COUNT) -> Array:
    return np.mean([gaussian(rank, count).astype(np.float64) for rank in range(size)], axis=0)


def without_feedback(name: str) -> Any:
    kinds = {"sign": codecs.Sign(error_feedback=False), "topk": codecs.TopK(error_feedback=False)}
    return kinds.get(name, name)


def everyone_has_the_same(comm: Communicator, x: Any, *context: object) -> None:
    mine = np.ascontiguousarray(x).view(np.uint8).ravel()
    everyones = comm.all_gather(mine).reshape(comm.size, -1)
    assert (everyones == everyones[0]).all(), context
