"""Process groups as objects: the forms of their methods, names, timeouts, how they are split and left, and
another backend beside pycomm in one."""

import gc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import IS_THE_GROUP, on_ranks
from torch.distributed.distributed_c10d import _abort_process_group

import pycomm
import pycomm.torch

CPU = torch.device("cpu")
LONG = timedelta(seconds=50)


def full(value: float, count: int = 2) -> Any:
    return torch.full((count,), float(value))


def test_methods_in_short_forms() -> None:
    """As torch's own ProcessGroup takes them, on the group object."""

    def fn() -> None:
        group, rank = dist.group.WORLD, dist.get_rank()
        total, largest, ones = 3.0, 2.0, [1.0, 1.0]
        for args, more, expected in [
            ((), {}, total),
            ((dist.ReduceOp.MAX,), {}, largest),
            ((dist.ReduceOp.MAX, LONG), {}, largest),
            ((), {"op": dist.ReduceOp.MAX, "timeout": LONG}, largest),
        ]:
            for wrap in (lambda x: x, lambda x: [x]):
                x = full(rank + 1)
                group.allreduce(wrap(x), *args, **more).wait()
                assert x.tolist() == [expected] * 2
        for args, more in [((1,), {}), ((1, LONG), {}), ((), {"root": 1})]:
            x = full(rank)
            group.broadcast(x, *args, **more).wait()
            assert x.tolist() == ones
        x = full(rank + 1)
        group.broadcast([x]).wait()  # from rank 0
        assert x.tolist() == ones
        x = full(rank + 1)
        group.reduce(x, 1, op=dist.ReduceOp.MAX).wait()
        assert rank == 0 or x.tolist() == [largest] * 2
        everyones = [torch.zeros(2) for _ in range(2)]
        group.allgather(everyones, full(rank)).wait()
        assert [each.tolist() for each in everyones] == [[0, 0], ones]
        gathered = [torch.zeros(2) for _ in range(2)] if rank == 1 else []
        group.gather(gathered, full(rank), 1).wait()
        assert [each.tolist() for each in gathered] == ([[0, 0], ones] if rank == 1 else [])
        out = torch.zeros(2)
        group.scatter(out, [full(5), full(6)] if rank == 1 else [], 1).wait()
        assert out.tolist() == [5 + rank] * 2
        group.reduce_scatter(out, [full(rank), full(rank + 1)], dist.ReduceOp.MAX).wait()
        assert out.tolist() == [1 + rank] * 2
        group.alltoall_base(out, torch.tensor([0.0, 1.0]) + 2 * rank, [], []).wait()
        assert out.tolist() == [rank, rank + 2]
        for each in (group.barrier(), group.barrier(timeout=LONG)):
            each.wait()
        (group.send([full(7)], 1, 3) if rank == 0 else group.recv([out], 0, 3)).wait()
        assert rank == 0 or out.tolist() == [7, 7]
        for wrong in (lambda: group.broadcast(out, rot=1), lambda: group.allreduce(out, 1, LONG, 2)):
            with pytest.raises(TypeError):
                wrong()

    on_ranks(fn, 2)


def late(call: Callable[[Any], Any], **options: Any) -> None:
    """Rank 1 does not come to `call(group)`, which is to wait 0.2 s."""

    def fn() -> None:
        group = dist.new_group([0, 1], **options)
        if dist.get_rank() == 0:
            with pytest.raises(pycomm.CommTimeoutError, match="waited 0.2 s .* for rank 1"):
                call(group)
        dist.barrier()  # the default group is as it was

    on_ranks(fn, 2)


SHORT = timedelta(seconds=0.2)


def test_a_short_form_has_a_timeout() -> None:
    late(lambda group: group.allreduce(full(1), timeout=SHORT).wait())


def test_a_timeout_that_is_set_later() -> None:
    def call(group: Any) -> None:
        group.set_timeout(SHORT) if IS_THE_GROUP else dist.set_timeout(SHORT, group)
        dist.all_reduce(full(1), group=group)

    late(call, timeout=LONG)


@pytest.mark.skipif(IS_THE_GROUP, reason="torch before 2.14 leaves monitored_barrier to Gloo")
def test_monitored_barrier() -> None:
    late(lambda group: dist.monitored_barrier(group, SHORT))

    def fn() -> None:
        dist.monitored_barrier()
        with pytest.raises(ValueError, match="names one late rank; pass False"):
            dist.monitored_barrier(wait_all_ranks=True)

    on_ranks(fn, 2)


def test_names_and_descriptions() -> None:
    def fn() -> None:
        groups = [dist.new_group([0, 1], group_desc="evens and odds"), dist.new_group([0, 1])]
        assert groups[0].group_desc == "evens and odds"
        assert len({group.group_name for group in (*groups, dist.group.WORLD)}) == 3
        for group in groups:
            assert dist.distributed_c10d._resolve_process_group(group.group_name) is group

    on_ranks(fn, 2)


def test_a_group_that_its_ranks_make_alone() -> None:
    """The others do not call new_group."""

    def fn() -> None:
        rank = dist.get_rank()
        if rank != 1:
            group = dist.new_group([0, 2], use_local_synchronization=True)
            x = full(rank + 1)
            dist.all_reduce(x, group=group)
            assert x.tolist() == [4, 4] and group.rank() == rank // 2
        dist.barrier()

    on_ranks(fn, 3)


@pytest.mark.parametrize("first, second", [("pycomm", "gloo"), ("gloo", "pycomm")])
def test_a_group_of_another_backend(first: str, second: str) -> None:
    def fn() -> None:
        group = dist.new_group([0, 1], backend=second)
        for each in (None, group):
            x = full(1)
            dist.all_reduce(x, group=each)
            assert x.tolist() == [2, 2]
        assert [dist.get_backend(each) for each in (None, group)] == [first, second]

    on_ranks(fn, 2, first)


BOTH = ["cpu:pycomm,cuda:gloo", "cuda:gloo,cpu:pycomm"]


@pytest.mark.skipif(IS_THE_GROUP, reason="torch before 2.14 takes one backend that is written in Python")
@pytest.mark.parametrize("config", BOTH)
def test_two_backends_in_one_device_string(config: str) -> None:
    """Gloo takes CPU tensors in place of a GPU's: whose call it is, is settled before."""

    def fn() -> None:
        for group in (dist.group.WORLD, dist.new_group([0, 1])):
            ours, theirs = (group._get_backend(torch.device(device)) for device in ("cpu", "cuda"))
            assert type(ours) is pycomm.torch.backend_class and type(theirs) is dist.ProcessGroupGloo
            for call in (group.allreduce, theirs.allreduce):
                x = full(1)
                call([x]).wait()
                assert x.tolist() == [2, 2]
            count = ours._get_sequence_number_for_group()
            dist.all_reduce(full(1), group=group)
            assert ours._get_sequence_number_for_group() == count + 1
            everyones: list[Any] = [None, None]
            dist.all_gather_object(everyones, dist.get_rank(), group=group)
            assert everyones == [0, 1]

    on_ranks(fn, 2, config)


@pytest.mark.skipif(not IS_THE_GROUP, reason="torch 2.14 and later take both")
@pytest.mark.parametrize("config", BOTH)
def test_a_second_backend_is_refused(config: str) -> None:
    """torch before 2.14 would drop it."""

    def fn() -> None:
        with pytest.raises(ValueError, match="would drop cuda:gloo beside pycomm"):
            dist.new_group([0], backend=config)

    on_ranks(fn, 1)


@pytest.mark.skipif(IS_THE_GROUP, reason="torch before 2.14 has no backend of a device here")
def test_the_backend_of_a_device() -> None:
    def fn() -> None:
        backend = dist.group.WORLD._get_backend(CPU)
        assert dist.get_backend_impl() is backend and type(backend) is pycomm.torch.backend_class
        assert (backend.name(), backend.rank(), backend.size()) == ("pycomm", dist.get_rank(), 2)
        x = full(1)
        work = backend.allreduce([x])
        assert work.wait() and work.is_completed() and x.tolist() == [2, 2]
        # Of those that are not answered, torch's own recurse.
        asked = [name for name in dir(type(backend).__bases__[-1]) if name.startswith("supports_")]
        answers = {name: getattr(backend, name) for name in asked if name != "supports_tensor_alloc"}
        assert {name for name, answer in answers.items() if answer} == {"supports_splitting"}
        assert set(answers) >= {"supports_coalescing", "supports_shrinking"}
        with pytest.raises(RuntimeError, match="cuda"):
            dist.group.WORLD._get_backend(torch.device("cuda"))

    on_ranks(fn, 2)


@pytest.mark.skipif(IS_THE_GROUP, reason="torch before 2.14 splits what has a backend for each device")
def test_split_group() -> None:
    def fn() -> None:
        rank, world = dist.get_rank(), dist.group.WORLD
        mine = [[2, 0], [1]][rank % 2]
        group = world.split_group(mine, SHORT, group_name=f"half {rank % 2}", group_desc="a half")
        assert (group.rank(), group.size()) == (mine.index(rank), len(mine))
        assert (group.group_name, group.group_desc) == (f"half {rank % 2}", "a half")
        x = full(rank)
        group.allreduce(x).wait()
        assert x.tolist() == [float(sum(mine))] * 2
        if rank == 0:  # and 1 in the half, where rank 2 is 0
            with pytest.raises(pycomm.CommTimeoutError, match="waited 0.2 s .* for rank 0"):
                group.barrier().wait()
        dist.barrier()
        with pytest.raises(ValueError, match=f"rank {rank} is in none of the groups"):
            world.split_group([(rank + 1) % 3], group_name="of another")

    on_ranks(fn, 3)


@pytest.mark.skipif(not IS_THE_GROUP, reason="torch 2.14 and later split")
def test_split_group_is_refused() -> None:
    def fn() -> None:
        with pytest.raises(RuntimeError, match="call new_group"):
            dist.group.WORLD.split_group([0])

    on_ranks(fn, 1)


def test_abort_and_a_second_init(tmp_path: Path) -> None:
    """A call that waits ends, with the word of the rank that gave up. The process goes on."""

    def fn() -> None:
        rank, store = dist.get_rank(), dist.FileStore(str(tmp_path / "store"), 2)
        if rank == 0:
            work = dist.all_reduce(full(1), async_op=True)
            with pytest.raises(pycomm.CommError, match="rank 1 .*the process group was aborted"):
                work.wait()
        _abort_process_group()
        assert not dist.is_initialized()
        dist.init_process_group("pycomm", store=store, rank=rank, world_size=2)
        x = full(1)
        dist.all_reduce(x)
        assert x.tolist() == [2, 2]

    on_ranks(fn, 2)


def test_debug_level_detail() -> None:
    """torch puts a group of its own around each backend, and compares what ranks call."""

    def fn() -> None:
        dist.set_debug_level(dist.DebugLevel.DETAIL)
        group = dist.new_group([0, 1])
        gc.collect()
        for _ in range(2):
            x = full(1)
            dist.all_reduce(x, group=group)
            assert x.tolist() == [2, 2]
        with pytest.raises(RuntimeError):
            dist.all_reduce(full(1, count=2 + dist.get_rank()), group=group)

    on_ranks(fn, 2)
