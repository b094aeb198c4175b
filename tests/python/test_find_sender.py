"""Communicator.find_sender: whose message a rank could receive now."""

import os
import time

import numpy as np
import pytest
from processes import started

import pycomm
from pycomm import Communicator


def found(comm: Communicator) -> int:
    """Waits for a sender."""
    for _ in range(20_000):
        if (sender := comm.find_sender()) is not None:
            return sender
        time.sleep(0.001)
    raise TimeoutError("no sender within 20 s")


def test_senders_are_found_in_turn() -> None:
    def fn(comm: Communicator) -> None:
        x = np.zeros(1)
        assert comm.find_sender() is None
        comm.barrier()
        works = []
        if comm.rank > 0:
            works = [comm.send(np.full(1, 10.0 * comm.rank + i), 0, async_op=True) for i in range(3)]
        comm.barrier()  # the first message of each has come
        if comm.rank == 0:
            assert {comm.find_sender(), comm.find_sender()} == {1, 2}
            assert comm.find_sender(skip=[1]) == comm.find_sender(skip=[1]) == 2
            assert comm.find_sender(skip=[1, 2]) is None
            order = []
            for _ in range(6):
                source = found(comm)
                comm.recv(x, source)
                order.append(float(x[0]))
            assert sorted(order) == [10, 11, 12, 20, 21, 22]
            assert [x for x in order if x < 20] == [10, 11, 12] and [x for x in order if x >= 20] == [
                20,
                21,
                22,
            ]
        for work in works:
            work.wait()
        assert comm.find_sender() is None
        comm.barrier()

    pycomm.run_local(fn, 3)


def test_a_message_that_is_being_received_is_not_found() -> None:
    def fn(comm: Communicator) -> None:
        x, y = np.zeros(1), np.zeros(1)
        if comm.rank == 0:
            works = [comm.recv(x, 1, async_op=True), comm.recv(y, 1, async_op=True)]
            assert comm.find_sender() is None
            comm.barrier()
            assert comm.find_sender() is None
            for work in works:
                work.wait()
            assert found(comm) == 1
            comm.recv(x, 1)
            assert (x[0], y[0]) == (3, 2)
        else:
            comm.barrier()
            for i in (1, 2, 3):
                comm.send(np.full(1, float(i)), 0)

    pycomm.run_local(fn, 2)


def test_beside_a_call_that_is_under_way() -> None:
    """The progress thread sleeps in it."""

    def fn(comm: Communicator) -> None:
        x = np.ones(1)
        if comm.rank == 0:
            work = comm.all_reduce(np.ones(1), async_op=True)
            comm.recv(x, found(comm))
            comm.send(x, 1)
            work.wait()
        else:
            comm.send(x, 0)
            comm.recv(x, 0)
            comm.all_reduce(np.ones(1))

    pycomm.run_local(fn, 2)


def test_a_sender_that_has_left_is_found_and_then_missed() -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank > 0:
            comm.send(np.full(1, float(comm.rank)), 0)
            comm.close()
            return
        x = np.zeros(1)
        time.sleep(0.1)
        senders = []
        for _ in range(2):
            senders.append(found(comm))
            comm.recv(x, senders[-1])
            assert x[0] == senders[-1]
        assert sorted(senders) == [1, 2]
        with pytest.raises(pycomm.PeerLostError, match="all other ranks have closed"):
            found(comm)
        with pytest.raises(pycomm.AbortedError):
            comm.find_sender()

    pycomm.run_local(fn, 3)


def test_a_rank_that_has_ended_is_named() -> None:
    def fn(comm: Communicator) -> str:
        if comm.rank == 1:
            comm.send(np.ones(1), 0)
            os._exit(1)
        time.sleep(0.3)
        assert found(comm) == 1  # what it sent before counts
        comm.recv(np.zeros(1), 1)
        with pytest.raises(pycomm.PeerLostError) as lost:
            found(comm)
        return str(lost.value)

    with started(fn, 2) as ranks:
        assert "rank 1 (pid" in ranks[0].outcome(10)


def test_on_several_nodes_it_is_refused() -> None:
    def fn(comm: Communicator) -> None:
        with pytest.raises(ValueError, match="this group is on several"):
            comm.find_sender()
        comm.barrier()

    pycomm.run_local(fn, 2, nodes=2)


def test_alone() -> None:
    with pycomm.init() as comm:
        assert comm.find_sender() is None
