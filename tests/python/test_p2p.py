"""send and recv."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pycomm
from pycomm import Communicator

Ranks = Callable[..., list[Any]]

pytestmark = pytest.mark.links


def test_messages_arrive_in_order(ranks: Ranks) -> None:
    counts = [0, 1, 7, 1000, 50_000, 3, 1_000_003]

    def fn(comm: Communicator) -> None:
        for source in range(3):
            for target in range(3):
                for i, count in enumerate(counts):
                    if comm.rank == source != target:
                        x = np.arange(count, dtype=np.float64) + 1000 * source + i
                        assert comm.send(x, target) is None
                        x[:] = -1  # the buffer may be reused
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


COUNTS = (1, 10_000, 2_000_001)  # the last one far exceeds a pair's window


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("first", ["send", "recv"])
@pytest.mark.parametrize("background", ["both", "first"])
def test_messages_that_face_each_other(ranks: Ranks, first: str, background: str, count: int) -> None:
    """The usual pattern: start one, do the other, wait."""

    def fn(comm: Communicator) -> None:
        other = 1 - comm.rank
        x, y = np.full(count, comm.rank), np.full(count, -1)
        calls = {
            "send": lambda **more: comm.send(x, other, **more),
            "recv": lambda **more: comm.recv(y, other, **more),
        }
        second = "recv" if first == "send" else "send"
        for _ in range(3):
            y[:] = -1
            started = calls[first](async_op=True)
            if background == "both":
                calls[second](async_op=True).wait()
            else:
                calls[second]()
            started.wait()
            assert (y == other).all()

    ranks(fn, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_send_recv_along_a_ring(ranks: Ranks, size: int) -> None:
    """Repeatedly with the same buffers, and with others: both are remembered."""

    def fn(comm: Communicator) -> None:
        me, right, left = comm.rank, (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        for count in (0, 1, 7, 1000, 50_001, 1_000_003):
            for x, y in [(np.empty(count, np.float32), np.empty(count, np.float32)) for _ in range(2)]:
                for turn in range(3):
                    x[:], y[:] = 10 * me + turn, -1
                    assert comm.send_recv(x, right, y, left) is y
                    x[:] = -2  # the buffer may be reused
                    assert (y == 10 * left + turn).all()
        if size == 1:
            return
        received = np.empty(3, np.int64)  # the two messages may differ in type and length
        if me == 0:
            comm.send_recv(b"words", 1, received, src=size - 1, tag=None, timeout=60)
            assert (received == size - 1).all()
        elif me == 1:
            assert comm.recv(bytearray(5), 0) == b"words"
        if me == size - 1:
            comm.send(np.full(3, me), dst=0)

    ranks(fn, size)


@pytest.mark.parametrize("count", COUNTS)
def test_send_recv_beside_what_is_queued(ranks: Ranks, count: int) -> None:
    """It follows earlier messages of the pair, and joins the queue if another thread makes a call."""

    def fn(comm: Communicator) -> None:
        other = 1 - comm.rank
        outs = [np.full(count, -1) for _ in range(4)]
        works = [comm.send(np.full(count, 10 * comm.rank), other, async_op=True)]
        works.append(comm.recv(outs[0], other, async_op=True))
        total = comm.all_reduce(np.ones(count), async_op=True)
        comm.send_recv(np.full(count, 10 * comm.rank + 1), other, outs[1], other)

        def reduce() -> None:
            assert (comm.all_reduce(np.ones(count)) == 2).all()

        thread = threading.Thread(target=reduce)
        if comm.rank == 0:
            thread.start()
        comm.send_recv(np.full(count, 10 * comm.rank + 2), other, outs[2], other)
        if comm.rank == 1:
            thread.start()
        comm.send_recv(np.full(count, 10 * comm.rank + 3), other, outs[3], other)
        thread.join()
        for work in works:
            work.wait()
        assert (total.wait() == 2).all()
        for i, out in enumerate(outs):
            assert (out == 10 * other + i).all()

    ranks(fn, 2)


def test_send_recv_refuses_before_anything_moves(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x, out, me, other = np.ones(4), np.zeros(4), comm.rank, 1 - comm.rank
        read_only = np.zeros(4)
        read_only.flags.writeable = False
        whole = np.zeros(6)
        for error, match, call in [
            (TypeError, "needs `x`", lambda: comm.send_recv()),
            (TypeError, "needs `dst`", lambda: comm.send_recv(x)),
            (TypeError, "needs `out`", lambda: comm.send_recv(x, other)),
            (TypeError, "needs `src`", lambda: comm.send_recv(x, other, out)),
            (TypeError, "positional", lambda: comm.send_recv(x, other, out, other, 5)),
            (TypeError, "multiple values", lambda: comm.send_recv(x, other, out, other, dst=other)),
            (
                TypeError,
                "unexpected keyword argument 'async_op'",
                lambda: comm.send_recv(x, other, out, other, async_op=True),
            ),
            (ValueError, "`dst` is this rank", lambda: comm.send_recv(x, me, out, other)),
            (ValueError, "`src` is this rank", lambda: comm.send_recv(x, other, out, me)),
            (ValueError, "`out` has 3 elements where `x` has 4", lambda: comm.send_recv(x, me, out[:3], me)),
            (
                TypeError,
                "`out` is float32 where `x` is float64",
                lambda: comm.send_recv(x, me, out.astype("f4"), me),
            ),
            (ValueError, "overlap", lambda: comm.send_recv(x, me, x, me)),
            (ValueError, "`src` is 7", lambda: comm.send_recv(x, other, out, 7)),
            (ValueError, "`out`.*read-only", lambda: comm.send_recv(x, other, read_only, other)),
            (ValueError, "overlap", lambda: comm.send_recv(x, other, x, other)),
            (ValueError, "overlap", lambda: comm.send_recv(whole[:4], other, whole[2:], other)),
            (TypeError, "`out`", lambda: comm.send_recv(x, other, "text", other)),
        ]:
            with pytest.raises(error, match=match):
                call()
        comm.send_recv(whole[:3], other, whole[3:], other)
        with pytest.raises(ValueError, match="`stream` is for GPU buffers"):
            comm.send_recv(whole[:3], other, whole[3:], other, stream=object())  # though the call is known
        comm.send(x, other)
        assert (comm.recv(out, other) == 1).all()

    ranks(fn, 2)


def test_send_recv_names_what_differs(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        other = 1 - comm.rank
        with pytest.raises(pycomm.CommError) as caught:
            comm.send_recv(np.ones(5 + comm.rank), other, np.empty(5), other)
            comm.barrier()  # a short send may be over before it is seen
        if comm.rank == 0:
            assert isinstance(caught.value, pycomm.MismatchError)
            caught.match("rank 0 called recv.*count=5.*rank 1 called send.*count=6")

    ranks(fn, 2)


def test_messages_and_collectives_do_not_wait_for_each_other(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        n, me = comm.size, comm.rank
        get = [np.full(300_000, -1.0) for _ in range(n)]
        pending = [comm.recv(get[r], r, async_op=True) for r in range(n) if r != me]
        for _ in range(5):
            assert comm.all_reduce(np.ones(1000))[0] == n
        sums = [comm.all_reduce(np.full(100_000, float(i)), async_op=True) for i in range(3)]
        for r in range(n):
            if r != me:
                comm.send(np.full(300_000, float(10 * me + r)), r)
        for i, work in enumerate(sums):
            assert (work.wait() == i * n).all()
        for work in reversed(pending):
            work.wait()
        assert all((get[r] == 10 * r + me).all() for r in range(n) if r != me)

    ranks(fn, 3)


def test_threads_of_a_rank_may_wait_for_each_other(ranks: Ranks) -> None:
    """One thread receives a message that is sent only after another thread has sent."""

    def fn(comm: Communicator) -> None:
        x, y = np.zeros(400_000), np.zeros(3)
        if comm.rank == 1:
            comm.recv(x, 0)
            comm.send(x[:3] + 1, 0)
            return
        receiver = threading.Thread(target=comm.recv, args=(y, 1))
        receiver.start()
        time.sleep(0.1)  # until it is blocked
        comm.send(np.full(400_000, 7.0), 1)
        receiver.join(20)
        assert (y == 8).all()

    ranks(fn, 2)


def test_large_messages_that_only_send_are_late_not_stuck(ranks: Ranks) -> None:
    """Two ranks that both send first, blocking, wait for each other, as in MPI."""

    def fn(comm: Communicator) -> None:
        with pytest.raises((pycomm.CommTimeoutError, pycomm.AbortedError)):
            comm.send(np.zeros(2_000_001), 1 - comm.rank, timeout=0.3)

    ranks(fn, 2)


def test_a_ring_of_small_messages(ranks: Ranks) -> None:
    """A short send ends before it is received, so all ranks may send first."""

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
