"""What the backend promises beyond Gloo, its errors, and how it is started and left."""

import datetime
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from groups import IS_THE_GROUP, on_ranks

import pycomm


def test_tensors_that_are_not_contiguous() -> None:
    def fn() -> None:
        rank, n = dist.get_rank(), dist.get_world_size()
        table = torch.zeros(3, 4)
        table[:, 1] = rank + 1
        dist.all_reduce(table[:, 1])
        assert table.tolist() == [[0, 3, 0, 0]] * 3
        turned = torch.arange(6.0).reshape(2, 3).t() if rank == 0 else torch.zeros(3, 2)
        dist.broadcast(turned, 0)  # the same elements, whatever the strides
        assert turned.tolist() == [[0, 3], [1, 4], [2, 5]]
        out = torch.zeros(2 * n, 2).t()
        dist.all_gather_into_tensor(out, torch.full((2, 2), float(rank)).t())
        assert out.reshape(-1).tolist() == [0.0] * 4 + [1.0] * 4
        parts = [torch.zeros(2, 4)[:, ::2] for _ in range(n)]
        work = dist.all_gather(parts, torch.full((2, 2), float(rank)), async_op=True)
        work.wait()
        assert [part.unique().tolist() for part in parts] == [[0], [1]]
        column = torch.zeros(4, 2)
        if rank == 0:
            dist.send(torch.arange(8.0).reshape(4, 2)[:, 1], 1)
        else:
            dist.recv(column[:, 0], 0)
            assert column.tolist() == [[1, 0], [3, 0], [5, 0], [7, 0]]
        with pytest.raises(ValueError, match="same place"):
            dist.all_reduce(torch.zeros(1).expand(4))

    on_ranks(fn, 2)


def test_operators() -> None:
    def fn() -> None:
        rank = dist.get_rank()
        for factor in (0.5, torch.tensor([0.5])):
            x = torch.full((3,), 2.0 * rank + 2)
            dist.all_reduce(x, dist._make_nccl_premul_sum(factor))
            assert x.tolist() == [3.0] * 3
            out = torch.zeros(2)
            dist.reduce_scatter_tensor(out, torch.full((4,), 2.0), dist._make_nccl_premul_sum(factor))
            assert out.tolist() == [2.0] * 2
        x = torch.full((3,), float(rank))
        dist.all_reduce(x, dist.ReduceOp.AVG)
        assert x.tolist() == [0.5] * 3
        for op, expected in [
            ("SUM", [1, 1, 0]),
            ("PRODUCT", [1, 0, 0]),
            ("MAX", [1, 1, 0]),
            ("BAND", [1, 0, 0]),
        ]:
            x = torch.tensor([True, rank == 1, False])
            dist.all_reduce(x, getattr(dist.ReduceOp, op))
            assert x.view(torch.uint8).tolist() == expected  # 1, where Gloo's bytes are 2
        with pytest.raises(TypeError, match="'band' makes no sense on float32"):
            dist.all_reduce(torch.ones(1), dist.ReduceOp.BAND)
        loss = (torch.ones(3, requires_grad=True) * 2).sum()
        dist.all_reduce(loss)  # with a history, as torch takes it
        assert loss.item() == 12
        learned = torch.ones(3, requires_grad=True) * 1  # has a grad_fn
        if rank == 0:
            dist.send(learned, 1)
            dist.broadcast(learned, 0)
        else:
            out = torch.zeros(3)
            dist.recv(out, 0)
            dist.broadcast(learned, 0)
            assert out.tolist() == [1, 1, 1]
        assert learned.requires_grad

    on_ranks(fn, 2)


def test_sparse_tensors() -> None:
    def fn() -> None:
        rank = dist.get_rank()
        small = 1.0 if rank == 0 else 2.0**-8  # bfloat16 has no 1 + 2**-8, but 1 + 2**-7
        x = torch.sparse_coo_tensor([[2]], [small], (4,), dtype=torch.bfloat16)
        dist.all_reduce(x)
        assert x.to_dense().tolist() == [0, 0, 1 + 2.0**-7, 0]
        x = torch.sparse_coo_tensor([[2]], [1.0], (4,))
        with pytest.raises(ValueError, match="'max' of sparse tensors"):
            dist.all_reduce(x, dist.ReduceOp.MAX)
        # torch's own group, of 2.14 and later, refuses it before pycomm sees it.
        refusal = "layout torch.sparse_coo cannot be sent" if IS_THE_GROUP else "c10d::broadcast_"
        with pytest.raises(ValueError if IS_THE_GROUP else NotImplementedError, match=refusal):
            dist.broadcast(x, 0)
        with pytest.raises(ValueError, match=r"\(5,\) with 1 sparse, \(6,\) with 1 sparse"):
            dist.all_reduce(torch.sparse_coo_tensor([[2]], [1.0], (5 + rank,)))
        dist.all_reduce(x)  # the group is as it was
        assert x.to_dense().tolist() == [0, 0, 3, 0]

    on_ranks(fn, 3)


def test_copies_of_any_dtype() -> None:
    def fn() -> None:
        rank, n = dist.get_rank(), dist.get_world_size()
        for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "uint16", "bool"):
            dtype = getattr(torch, name)
            mine = torch.tensor([1, rank], dtype=torch.float32).to(dtype)
            out = [torch.zeros(2).to(dtype) for _ in range(n)]
            dist.all_gather(out, mine)
            assert [part.float().tolist() for part in out] == [[1, 0], [1, 1]]
            swapped = torch.zeros(2).to(dtype)
            dist.all_to_all_single(swapped, mine)
            assert swapped.float().tolist() == ([1, 1] if rank == 0 else [0, 1])
            unequal = torch.zeros(2 - rank).to(dtype)  # rank 0 keeps an element and gets one
            dist.all_to_all_single(
                unequal, mine[: 1 + rank], [1, 1] if rank == 0 else [0, 1], [1, 0] if rank == 0 else [1, 1]
            )
            assert unequal.float().tolist() == ([1, 1] if rank == 0 else [1])
            dist.broadcast(mine, 1)
            assert mine.float().tolist() == [1, 1]
            if rank == 0:
                dist.send(mine, 1)
            else:
                dist.recv(mine, 0)

    on_ranks(fn, 2)


def test_lists_of_unequal_tensors() -> None:
    """all_to_all and reduce_scatter take them; the others say that they do not."""

    def fn() -> None:
        rank, n = dist.get_rank(), dist.get_world_size()
        out = [torch.zeros(i + 2 * rank) for i in range(n)]  # rank i sends i + 2 r elements to rank r
        dist.all_to_all(out, [torch.full((rank + 2 * i,), float(rank)) for i in range(n)])
        assert [part.tolist() for part in out] == [[float(i)] * (i + 2 * rank) for i in range(n)]
        part = torch.zeros(rank + 1)
        dist.reduce_scatter(part, [torch.full((i + 1,), float(i)) for i in range(n)])
        assert part.tolist() == [float(rank * n)] * (rank + 1)
        with pytest.raises(ValueError, match=r"tensor_list\[1\] is .*shape \(3,\).*shape \(2,\): unequal"):
            dist.all_gather([torch.zeros(2), torch.zeros(3)], torch.zeros(2))
        with pytest.raises(ValueError, match="2 times as many"):
            dist.all_gather_into_tensor(torch.zeros(3), torch.zeros(2))
        with pytest.raises(ValueError, match="`tensor_list` has 1 items: pass 2"):
            dist.all_gather([torch.zeros(2)], torch.zeros(2))
        with pytest.raises(ValueError, match="3 rows, which do not divide by 2 ranks"):
            dist.all_to_all_single(torch.zeros(3), torch.zeros(3))
        with pytest.raises(ValueError, match=r"input_split_sizes is \[1, 1\].*whose sum is 3"):
            dist.all_to_all_single(torch.zeros(3), torch.zeros(3), [2, 1], [1, 1])
        x = torch.ones(1)  # nothing had moved
        dist.all_reduce(x)
        assert x.item() == n

    on_ranks(fn, 2)


def test_ranks_that_gather_unequal_tensors() -> None:
    def fn() -> str:
        mine = torch.zeros(2 + dist.get_rank())
        with pytest.raises(RuntimeError) as caught:
            dist.all_gather([torch.zeros_like(mine) for _ in range(2)], mine)
        return str(caught.value)

    for message in on_ranks(fn, 2):
        assert "rank 0 called all_gather(count=2" in message and "rank 1 called all_gather(count=3" in message


def test_messages() -> None:
    def fn() -> None:
        rank = dist.get_rank()
        # To itself, in either order.
        sent, out = torch.ones(2), torch.zeros(2)
        works = [dist.isend(sent, rank, tag=4), dist.irecv(out, rank, tag=4)]
        sent.zero_()
        later = torch.zeros(3)
        works += [dist.irecv(later, rank), dist.isend(torch.full((3,), 7.0), rank)]
        for work in works:
            work.wait()
        assert out.tolist() == [1, 1] and later.tolist() == [7, 7, 7]
        # Hundreds that have been sent when they are asked for, the last first.
        count = 600
        if rank == 0:
            works = [dist.isend(torch.full((i % 3,), float(i)), 1, tag=i) for i in range(count)]
            dist.barrier()
            for work in works:
                work.wait()
        else:
            dist.barrier()
            outs = [torch.zeros(i % 3) for i in range(count)]
            works = [dist.irecv(outs[i], 0, tag=i) for i in reversed(range(count))]
            for work in works:
                work.wait()
            assert all((x == i).all() for i, x in enumerate(outs))
        # Messages of one tag keep their order, and one of another size is an error that leaves the rest.
        if rank == 0:
            dist.send(torch.ones(2), 1, tag=1)
            dist.send(torch.full((2,), 2.0), 1, tag=1)
            dist.send(torch.ones(5), 1, tag=2)
            dist.send(torch.ones(3), 1, tag=3)
        else:
            first, second, third = torch.zeros(2), torch.zeros(2), torch.zeros(3)
            works = [dist.irecv(x, 0, tag=1) for x in (first, second)]
            short = dist.irecv(torch.zeros(4), 0, tag=2)
            dist.recv(third, 0, tag=3)
            for work in works:
                work.wait()
            assert (first.tolist(), second.tolist(), third.tolist()) == ([1, 1], [2, 2], [1, 1, 1])
            with pytest.raises(ValueError, match="rank 0 sent 5 float32 with tag 2.*receives as 4 float32"):
                short.wait()

    on_ranks(fn, 2)


def test_a_late_rank_is_named_at_the_deadline() -> None:
    def fn() -> str:
        group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=0.5))
        message = ""
        if dist.get_rank() == 0:
            work = dist.all_reduce(torch.ones(1), group=group, async_op=True)
            with pytest.raises(RuntimeError, match="not completed within 0.1.* s; it goes on"):
                work.wait(datetime.timedelta(seconds=0.1))
            with pytest.raises(pycomm.CommTimeoutError) as caught:
                work.wait()
            if IS_THE_GROUP:  # torch's own group keeps the rest of the handle to itself
                assert work.is_completed() and not work.is_success() and work.exception() is caught.value
            with pytest.raises(RuntimeError, match="CommTimeoutError: .*rank 1"):
                work.get_future().wait()
            message = str(caught.value)
        dist.barrier()  # the default group is as it was
        return message

    assert "rank 1" in on_ranks(fn, 2)[0]


@pytest.mark.parametrize("waiting", ["collective", "work", "future", "receive", "backward"])
def test_a_killed_rank_is_named(waiting: str) -> None:
    def fn() -> str:
        rank = dist.get_rank()
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
        group = dist.new_group([0, 1, 2])
        if rank == 1:
            dist.send(torch.tensor([os.getpid()]), 0)
            signal.pause()
        if rank == 0:
            pid = torch.zeros(1, dtype=torch.int64)
            dist.recv(pid, 1)
        calls = {
            "collective": lambda: dist.all_reduce(torch.ones(5), group=group),
            "work": lambda: dist.all_reduce(torch.ones(5), group=group, async_op=True).wait(),
            "future": lambda: dist.all_reduce(torch.ones(5), group=group, async_op=True).get_future().wait(),
            "receive": lambda: dist.recv(torch.ones(5), 1, group=group),
            "backward": lambda: model(torch.ones(2, 3)).sum().backward(),
        }
        if rank == 0:
            os.kill(int(pid), signal.SIGKILL)
        with pytest.raises(RuntimeError) as caught:
            calls[waiting]()
        return str(caught.value)

    first, _, last = on_ranks(fn, 3, died=(1,))
    assert "rank 1" in first and "rank 1" in last


def test_groups_come_and_go() -> None:
    def fn() -> None:
        def count() -> int:
            return len(os.listdir("/proc/self/fd"))

        dist.all_reduce(torch.ones(1))
        before = count()
        for _ in range(5):
            group = dist.new_group([0, 1])
            dist.all_reduce(torch.ones(1), group=group)
            assert dist.get_backend(group) == "pycomm"
            assert group.size() == 2 and group.rank() == dist.get_rank()
            dist.destroy_process_group(group)
            with pytest.raises(pycomm.AbortedError):
                group.barrier()
            del group
            gc.collect()
            assert count() == before

    on_ranks(fn, 2)


def test_the_same_store_twice(tmp_path: Path) -> None:
    """A second group of the same name does not find the first one's address."""

    def fn() -> None:
        store = dist.FileStore(str(tmp_path / "store"), dist.get_world_size())
        rank, size = dist.get_rank(), dist.get_world_size()
        dist.destroy_process_group()
        for _ in range(3):
            dist.init_process_group("cpu:pycomm", store=store, rank=rank, world_size=size)
            x = torch.ones(1)
            dist.all_reduce(x)
            assert x.item() == size
            dist.destroy_process_group()
        dist.init_process_group("pycomm", store=dist.PrefixStore("end", store), rank=rank, world_size=size)

    on_ranks(fn, 2)


PROGRAM = """
import torch, torch.distributed as dist
import pycomm.torch
dist.init_process_group("pycomm")
x = torch.ones(3)
dist.all_reduce(x)
print(f"sum {x.tolist()}\\n", end="", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    "launcher", [["torch.distributed.run", "--nproc-per-node", "2"], ["pycomm", "run", "-n", "2"]]
)
def test_launchers(launcher: list[str], tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(script)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum [2.0, 2.0, 2.0]") == 2
