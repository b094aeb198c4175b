"""send and recv."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pycomm
from pycomm import Communicator

Ranks = Callable[..., list[Any]]


def test_messages_arrive_in_order(ranks: Ranks) -> None:
    counts = [0, 1, 7, 1000, 50_000, 3, 1_000_003]

    def fn(comm: Communicator) -> None:
        for source in range(3):
            for target in range(3):
                for i, count in enumerate(counts):
                    if comm.rank == source != target:
                        x = np.arange(count, dtype=np.float64) + 1000 * source + i
                        assert comm.send(x, target) is None
                        x[:] = -1  # it may be used again
                    elif comm.rank == target != source:
                        y = np.full(count, -2.0)
                        assert comm.recv(y, src=source) is y
                        assert np.array_equal(y, np.arange(count) + 1000 * source + i)
        comm.barrier()

    ranks(fn, 3)


def test_both_directions_at_once(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        other = 1 - comm.rank
        for count in (1, 1000, 10_000):
            x, y = np.full(count, comm.rank, np.int32), np.full(count, -1, np.int32)
            sent = comm.send(x, dst=other, async_op=True)
            received = comm.recv(y, src=other, async_op=True)
            assert received.wait() is y
            assert sent.wait() is None
            assert (y == other).all()

    ranks(fn, 2)


def test_large_messages_that_face_each_other_are_late_not_stuck(ranks: Ranks) -> None:
    """A group's calls run in their order, so that one of the two has to receive first."""

    def fn(comm: Communicator) -> None:
        other = 1 - comm.rank
        x, y = np.full(2_000_001, comm.rank), np.full(2_000_001, -1)
        if comm.rank == 0:
            comm.send(x, other)
            comm.recv(y, other)
        else:
            comm.recv(y, other)
            comm.send(x, other)
        assert (y == other).all()
        with pytest.raises((pycomm.CommTimeoutError, pycomm.AbortedError)):
            comm.send(x, other, timeout=0.3)

    ranks(fn, 2)


def test_a_ring_of_small_messages(ranks: Ranks) -> None:
    """A short message is gone before it is received, so everybody may send first."""

    def fn(comm: Communicator) -> None:
        n, me = comm.size, comm.rank
        token = np.array([me])
        for _ in range(50):
            comm.send(token, (me + 1) % n)
            comm.recv(token, (me - 1) % n)
        assert token == [(me - 50) % n]

    ranks(fn, 3)


def test_pairs_do_not_disturb_collectives(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        for i in range(100):
            if comm.rank == 0:
                comm.send(np.full(i, i), 1)
            elif comm.rank == 1:
                assert (comm.recv(np.zeros(i, int), 0) == i).all()
            assert comm.all_reduce(np.array([i])) == [3 * i]

    ranks(fn, 3)


def test_types_and_buffers(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = comm.empty(3000)
        x[:] = comm.rank
        if comm.rank == 0:
            comm.send(x, 1, tag="grad")
            comm.send(b"bytes", 1)
            comm.send(np.array(3 + 4j), 1)
        else:
            assert (comm.recv(x, 0, tag="grad") == 0).all()
            assert comm.recv(bytearray(5), 0) == b"bytes"
            assert comm.recv(np.zeros((1, 1), complex), 0) == 3 + 4j

    ranks(fn, 2)


@pytest.mark.parametrize(
    ("send", "recv", "match"),
    [
        ({"count": 5}, {"count": 6}, "count=5.*count=6|count=6.*count=5"),
        ({"dtype": "f4"}, {"dtype": "i4"}, "float32.*int32|int32.*float32"),
        ({"tag": "a"}, {"tag": "b"}, "a.*b|b.*a"),
        ({"tag": "a"}, {}, "tag"),
    ],
)
def test_mismatches_name_both(ranks: Ranks, send: dict[str, Any], recv: dict[str, Any], match: str) -> None:
    def fn(comm: Communicator) -> None:
        mine = send if comm.rank == 1 else recv
        x = np.ones(mine.get("count", 5), mine.get("dtype", "f4"))
        with pytest.raises(pycomm.CommError) as caught:
            if comm.rank == 1:
                comm.send(x, 2, tag=mine.get("tag"))
                comm.barrier()  # a short send may be over before it is seen
            elif comm.rank == 2:
                comm.recv(x, 1, tag=mine.get("tag"))
            else:
                comm.barrier()
        if comm.rank == 2:
            assert isinstance(caught.value, pycomm.MismatchError)
            caught.match("rank 1.*rank 2|rank 2.*rank 1")
            caught.match(match)

    ranks(fn, 3)


def test_a_receiver_that_waits_in_vain(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank == 0:
            started = time.monotonic()
            with pytest.raises(pycomm.CommTimeoutError, match="rank 1"):
                comm.recv(np.zeros(3), 1, timeout=0.3)
            assert time.monotonic() - started < 5
        else:
            with pytest.raises(pycomm.CommError):
                comm.barrier()

    ranks(fn, 2)


def test_a_sender_that_has_left(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank == 0:
            with pytest.raises(pycomm.PeerLostError, match="rank 1"):
                comm.recv(np.zeros(3), 1)
        else:
            comm.close()

    ranks(fn, 2)
