"""Calls in torch's profilers: the same events as on Gloo, under pycomm's name."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import on_ranks


def calls() -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    x = torch.ones(2, 3)
    outs = [torch.zeros(2, 3) for _ in range(n)]
    dist.all_reduce(x)
    dist.all_reduce(torch.complex(x, x))
    dist.all_reduce_coalesced([x, torch.ones(5)])
    dist.broadcast(x, 0)
    dist.reduce(x, 1)
    dist.all_gather(outs, x)
    dist.all_gather_into_tensor(torch.zeros(2 * n, 3), x)
    dist.gather(x, outs if rank == 0 else None)
    dist.scatter(x, outs if rank == 1 else None, src=1)
    dist.all_to_all_single(torch.zeros(n, 4), torch.ones(n, 4))
    dist.barrier()
    works = [dist.all_reduce(torch.ones(7), async_op=True), dist.broadcast(torch.ones(8), 1, async_op=True)]
    if rank == 0:
        dist.send(x, 1)
    else:
        dist.recv(x, 0)
    for work in works:
        work.wait()


def events(backend: str, profiler: Any) -> list[tuple[str, list[list[int]]]]:
    with profiler:
        calls()
    found = profiler.events() if hasattr(profiler, "events") else profiler.function_events
    prefix = f"{backend}:"
    return sorted(
        (event.name.removeprefix(prefix), event.input_shapes)
        for event in found
        if event.name.startswith(prefix)
    )


PROFILERS = {
    "autograd": lambda: torch.autograd.profiler.profile(record_shapes=True),
    "torch": lambda: torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ),
}


@pytest.mark.parametrize("name", PROFILERS)
def test_the_events_of_gloo(name: str) -> None:
    expected, found = (
        on_ranks(lambda backend=backend: events(backend, PROFILERS[name]()), 2, backend)
        for backend in ("gloo", "pycomm")
    )
    assert len(expected[0]) == 14
    assert found == expected


def test_an_event_ends_with_its_call() -> None:
    def fn() -> None:
        rank = dist.get_rank()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            with pytest.raises(ValueError, match="input_list"):
                dist.reduce_scatter(torch.zeros(1), [torch.zeros(1)])
            if rank == 0:
                work = dist.irecv(torch.zeros(1), 1)
                dist.barrier()
                work.wait()
            else:
                dist.barrier()
                dist.send(torch.zeros(1), 0)
        times = {
            event.name: event.time_range for event in profiler.events() if event.name.startswith("pycomm:")
        }
        assert set(times) == {
            "pycomm:reduce_scatter",
            "pycomm:barrier",
            "pycomm:recv" if rank == 0 else "pycomm:send",
        }
        assert times["pycomm:reduce_scatter"].end <= times["pycomm:barrier"].start
        if rank == 0:
            assert times["pycomm:recv"].start <= times["pycomm:barrier"].start
            assert times["pycomm:recv"].end >= times["pycomm:barrier"].start  # rank 1 sends after that

    on_ranks(fn, 2)
