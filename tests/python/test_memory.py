"""Shared memory is given back: that of closed groups, pairs and symmetric arrays, also if ranks die."""

import os
import signal
from contextlib import suppress
from typing import Any

import numpy as np
import processes
import pytest

import pycomm
from pycomm import Communicator


def shared_bytes() -> int:
    """The shared memory of this process's nodes."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if "memfd:pycomm" in os.readlink(f"/proc/self/fd/{name}"):
                total += os.stat(f"/proc/self/fd/{name}").st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def use(comm: Communicator) -> None:
    """Uses everything that a group has memory for."""
    x = comm.empty(100_000)
    x[:] = 1
    assert comm.all_reduce(x)[0] == comm.size
    if comm.size > 1:
        right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        y = np.empty(300_000)
        comm.send_recv(np.full(300_000, float(comm.rank)), right, y, left)
        assert y[-1] == left


def split(comm: Communicator) -> None:
    group = comm.split(0)
    use(group)
    group.close()


def split_in_parts(comm: Communicator) -> None:
    group = comm.split(-1 if comm.rank == 0 else comm.rank % 2)
    if group is not None:
        with group:
            use(group)


def split_without_closing(comm: Communicator) -> None:
    use(comm.split(0, key=-comm.rank))


def allocate(comm: Communicator) -> None:
    arrays = [comm.empty(10_000) for _ in range(3)]
    if comm.rank == 0:
        arrays.reverse()  # dropped in another order
    while arrays:
        arrays.pop()


def refuse(comm: Communicator) -> None:
    with pytest.raises(ValueError, match="one size"):
        comm.empty(10_000 + comm.rank)


@pytest.mark.parametrize("turn", [split, split_in_parts, split_without_closing, allocate, refuse])
def test_groups_and_arrays_leave_nothing(turn: Any) -> None:
    def fn(comm: Communicator) -> None:
        taken = []
        for _ in range(2):
            for _ in range(30):
                turn(comm)
            comm.barrier()
            taken.append(shared_bytes())
            comm.barrier()
        assert taken[0] == taken[1]

    processes.run(fn, 3)


def test_pairs_of_a_group_leave_nothing() -> None:
    """The rank that opened the channel, and the one that did not."""

    def fn(comm: Communicator) -> None:
        taken = []
        for _ in range(2):
            for _ in range(20):
                with comm.split(0) as group:
                    if group.rank == 0:
                        group.send(np.ones(3), 1)  # needs no receiver
                    group.barrier()
                    if group.rank == 1:
                        group.recv(np.empty(3), 0)
            comm.barrier()
            taken.append(shared_bytes())
            comm.barrier()
        assert taken[0] == taken[1]

    processes.run(fn, 3)


@pytest.mark.parametrize("when", ["before the others close", "after the others have closed"])
def test_ranks_that_die_keep_nothing(when: str) -> None:
    survivors = 2

    def fresh(comm: Communicator) -> int:
        return shared_bytes()

    alone = max(processes.run(fresh, survivors))

    def fn(comm: Communicator) -> int:
        while comm.size > survivors:
            group = comm.split(0)
            use(group)
            with suppress(pycomm.CommError):  # a fast rank may have called shrink() meanwhile
                comm.barrier()
            if comm.rank == comm.size - 1:
                if when == "after the others have closed":
                    signal.sigtimedwait([], 0.3)
                os.kill(os.getpid(), signal.SIGKILL)
            if when == "before the others close":
                with pytest.raises(pycomm.CommError):
                    comm.barrier()
            group.close()
            left = comm.shrink()
            comm.close()
            comm = left
        for _ in range(2):  # the next rank to reserve or release finds the memory of the last one that died
            split(comm)
            comm.barrier()
        return shared_bytes()

    with processes.started(fn, 5) as ranks:
        for rank in ranks[:survivors]:
            assert rank.outcome() <= alone
