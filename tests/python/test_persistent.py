"""all_reduce_init: bound once, run many times."""

import gc
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pycomm
from pycomm import Communicator

Ranks = Callable[..., list[Any]]

pytestmark = pytest.mark.links


def test_runs_on_the_same_buffers(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        n, me = comm.size, comm.rank
        for count in (0, 1, 3, 1000, 300_001):
            x, y = np.empty(count, np.float32), np.empty(count, np.float32)
            in_place, apart = comm.all_reduce_init(x), comm.all_reduce_init(x, out=y, op="max")
            for step in range(3):
                x[:] = me + step
                assert apart() is y
                assert (y == n - 1 + step).all()
                assert in_place() is x
                assert (x == n * step + n * (n - 1) / 2).all()

    for size in (1, 2, 3):
        ranks(fn, size)


def test_symmetric_and_interleaved_with_others(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = comm.empty(5000)
        op = comm.all_reduce_init(x, op="avg", algorithm="two_shot", tag="step")
        for step in range(20):
            x[:] = comm.rank + step
            work = comm.all_reduce(np.ones(3), async_op=True) if step % 3 == 0 else None
            op()
            assert (x == step + 0.5).all()
            if work:
                assert work.is_completed()
            comm.broadcast(np.zeros(4), root=step % 2)

    ranks(fn, 2)


def test_binding_is_local(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.all_reduce_init(np.ones(3))
        assert comm.all_reduce(np.ones(3))[0] == 2

    ranks(fn, 2)


def test_keeps_its_buffers_and_its_group(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = np.full(4, comm.rank + 1.0)
        references = sys.getrefcount(x)
        group = comm.split(0)
        op = group.all_reduce_init(x)
        assert sys.getrefcount(x) > references
        del group
        gc.collect()
        assert (op() == 3).all()
        del op
        gc.collect()
        assert sys.getrefcount(x) == references
        op = comm.all_reduce_init(bytearray(b"\1\2"))  # and a buffer that only the call refers to
        assert op() == b"\2\4"

    ranks(fn, 2)


def test_errors(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        op = comm.all_reduce_init(np.ones(3))
        with pytest.raises(TypeError, match="no arguments"):
            op(1)
        with pytest.raises(TypeError, match="no arguments"):
            op(x=1)
        with pytest.raises(TypeError):
            type(op)()
        with pytest.raises(TypeError, match="band"):
            comm.all_reduce_init(np.ones(3), op="band")
        with pytest.raises(ValueError, match='"ring"'):
            comm.all_reduce_init(np.ones(3), algorithm="ring", deterministic=True)
        op()
        comm.close()
        with pytest.raises(pycomm.AbortedError, match="closed"):
            op()

    ranks(fn, 2)


def test_mismatch_is_found(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        op = comm.all_reduce_init(np.ones(3 + comm.rank))
        with pytest.raises(pycomm.MismatchError, match="count=3.*count=4|count=4.*count=3"):
            op()

    ranks(fn, 2)
