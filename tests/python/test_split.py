"""Groups made from groups."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pycomm
from pycomm import Communicator

Ranks = Callable[..., list[Any]]

pytestmark = pytest.mark.links


def test_colors_and_keys(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> tuple[int, int, list[int]]:
        group = comm.split(comm.rank % 2, key=-comm.rank)
        members = group.all_gather(np.array([comm.rank])).tolist()
        assert isinstance(group, Communicator)
        return group.rank, group.size, members

    assert ranks(fn, 5) == [
        (2, 3, [4, 2, 0]),
        (1, 2, [3, 1]),
        (1, 3, [4, 2, 0]),
        (0, 2, [3, 1]),
        (0, 3, [4, 2, 0]),
    ]


def test_equal_keys_keep_the_order(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> list[int]:
        with comm.split(2**40, key=comm.rank // 2 * -1) as group:
            return group.all_gather(np.array([comm.rank])).tolist()

    assert ranks(fn, 4) == [[2, 3, 0, 1]] * 4


def test_a_negative_color_is_no_group(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> object:
        group = comm.split(-1 if comm.rank == 1 else 7)
        if group is None:
            return None
        return group.size, group.all_reduce(np.array([comm.rank])).tolist()

    assert ranks(fn, 3) == [(2, [2]), None, (2, [2])]


def test_groups_run_side_by_side(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        row, column = comm.split(comm.rank // 2), comm.split(comm.rank % 2)
        for step in range(100):
            x = np.full(1 + 331 * step, comm.rank, np.float32)
            row.all_reduce(x)
            assert (x == 2 * (comm.rank // 2 * 2) + 1).all()
            column.all_reduce(x)
            assert (x == 6).all()
            if comm.rank < 2:  # one group makes more calls than the other
                row.all_reduce(x)
        assert comm.all_reduce(np.ones(1)) == [4]

    ranks(fn, 4)


def test_groups_of_groups_with_memory_of_their_own(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        half = comm.split(comm.rank // 2)
        same = half.split(0)
        x, y = half.empty(5000), comm.empty(5000)
        x[:] = y[:] = comm.rank
        assert (same.all_reduce(x.copy()) == 4 * (comm.rank // 2) + 1).all()
        assert (half.all_reduce(x) == 4 * (comm.rank // 2) + 1).all()
        assert (half.all_reduce(y, out=np.empty(5000, "f")) == 4 * (comm.rank // 2) + 1).all()
        assert (comm.all_reduce(y) == 6).all()

    ranks(fn, 4)


def test_closing_one_leaves_the_others(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        group = comm.split(0)
        group.close()
        with pytest.raises(pycomm.AbortedError, match="closed"):
            group.barrier()
        assert comm.all_reduce(np.ones(1)) == [2]
        other = comm.split(0)
        comm.close()
        assert other.all_reduce(np.ones(1)) == [2]

    ranks(fn, 2)


def test_a_failure_stays_in_its_group(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        group = comm.split(0)
        with pytest.raises(pycomm.MismatchError):
            group.all_reduce(np.ones(1 + comm.rank))
        assert comm.all_reduce(np.ones(1)) == [2]

    ranks(fn, 2)


def test_many_groups(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        for i in range(60):
            with comm.split(0) as group:
                assert group.all_reduce(np.array([i])) == [2 * i]

    ranks(fn, 2)
