"""Receives from any rank: recv and irecv without `src`."""

import datetime
import os
import signal

import pytest
import torch
import torch.distributed as dist
from groups import IS_THE_GROUP, on_ranks

import pycomm


def receive(x: torch.Tensor) -> int | None:
    """The source, if torch can be told who has sent: from 2.14 on, recv without `src` raises in the end."""
    if IS_THE_GROUP:
        return dist.recv(x)
    dist.irecv(x).wait()
    return None


def test_workers_that_leave() -> None:
    """The usual pattern: a rank collects results, and a worker that has sent its own ends."""

    def fn() -> None:
        rank, n = dist.get_rank(), dist.get_world_size()
        if rank > 0:
            dist.send(torch.full((100_000,), float(rank)), 0)
            return
        out = torch.zeros(100_000)
        sources = []
        for _ in range(n - 1):
            source = receive(out)
            sources.append(int(out[0]))
            assert (out == sources[-1]).all() and source in (None, sources[-1])
        assert sorted(sources) == [1, 2]
        with pytest.raises(pycomm.PeerLostError, match="all other ranks have closed"):
            receive(out)

    on_ranks(fn, 3)


def test_beside_receives_that_name_a_rank() -> None:
    """The first receive that a message is for takes it."""

    def fn() -> None:
        rank = dist.get_rank()
        outs = [torch.zeros(1) for _ in range(4)]
        if rank == 0:
            works = [
                dist.irecv(outs[0], tag=3),
                dist.irecv(outs[1], 1),
                dist.irecv(outs[2]),
                dist.irecv(outs[3], 1),
            ]
            dist.barrier()
            for work in reversed(works):
                work.wait()
            assert [out.item() for out in outs] == [13, 10, 11, 12]
            if IS_THE_GROUP:
                assert [work._source_rank() for work in works] == [1] * 4
        else:
            dist.barrier()
            for x, tag in [(10.0, 0), (11.0, 0), (12.0, 0), (13.0, 3)]:
                dist.send(torch.tensor([x]), 0, tag=tag)

    on_ranks(fn, 2)


def test_a_receive_goes_on_while_somebody_asks() -> None:
    def fn() -> None:
        rank = dist.get_rank()
        out = torch.zeros(3, 2)
        if rank == 0:
            work = dist.irecv(out[:, 1])
            assert not work.is_completed()
            with pytest.raises(
                pycomm.CommTimeoutError, match="no message has come from any rank within 0.05 s"
            ):
                work.wait(datetime.timedelta(seconds=0.05))
            with pytest.raises(ValueError, match="call wait"):
                work.get_future()
            dist.barrier()
            if IS_THE_GROUP:
                while not work.is_completed():
                    pass
            else:  # torch does not ask
                work.wait()
            assert out.tolist() == [[0, 5]] * 3
            with pytest.raises(ValueError, match="rank 1 sent 2 float32 with tag 0.*receives as 3 float32"):
                receive(torch.zeros(3))
        else:
            dist.barrier()
            dist.send(torch.full((3,), 5.0), 0)
            dist.send(torch.zeros(2), 0)
        dist.barrier()

    on_ranks(fn, 2)


def test_a_message_to_itself() -> None:
    def fn() -> None:
        out = torch.zeros(2)
        works = [dist.irecv(out), dist.isend(torch.ones(2), dist.get_rank())]
        for work in works:
            work.wait()
        assert out.tolist() == [1, 1]

    on_ranks(fn, 1)
    on_ranks(fn, 2)


def test_a_killed_rank_is_named() -> None:
    def fn() -> str:
        rank = dist.get_rank()
        if rank == 1:
            dist.send(torch.tensor([os.getpid()]), 0)
            signal.pause()
        pid = torch.zeros(1, dtype=torch.int64)
        if rank == 0:
            receive(pid)
            os.kill(int(pid), signal.SIGKILL)
        with pytest.raises(pycomm.PeerLostError) as lost:
            receive(pid)
        return str(lost.value)

    first, _, last = on_ranks(fn, 3, died=(1,))
    assert "rank 1 " in first and "rank 1 " in last
