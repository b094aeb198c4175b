"""What a program does with works and futures: calls in callbacks, and many of them."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DDP imports it: once here, not in every rank
import torch.distributed as dist
from groups import on_ranks

from pycomm.torch.work import Handle


def test_a_callback_makes_a_call_and_waits_for_it() -> None:
    """By the future, which drives nothing, on the thread that drives calls: torch's PowerSGD hook does so."""

    def fn() -> None:
        for i in range(50):
            x, y = torch.full((40_000,), 1.0), torch.full((40_000,), 10.0)

            def second(first: Any, y: Any = y) -> Any:
                third = dist.all_reduce(y, async_op=True).get_future().then(lambda f: f.value()[0] + 1)
                return first.value()[0][0] + third.wait()[0]

            work = dist.all_reduce(x, async_op=True)
            future = work.get_future().then(second)
            if i % 2:
                work.wait()  # so that this thread drives, and runs the callback
            assert future.wait().item() == 2 + 20 + 1

    on_ranks(fn, 2)


def test_a_callback_receives() -> None:
    def fn() -> Any:
        x = torch.zeros(4)
        if dist.get_rank() == 0:
            dist.all_reduce(torch.ones(40000), async_op=True).wait()
            dist.send(torch.ones(4), 1)
            dist.send(2 * torch.ones(4), 1)
            return None
        y = torch.zeros(4)

        def receive(_: Any) -> None:
            dist.recv(x, 0)
            dist.irecv(y, 0).get_future().wait()

        dist.all_reduce(torch.ones(40000), async_op=True).get_future().then(receive).wait()
        return x.tolist() + y.tolist()

    assert on_ranks(fn, 2)[1] == [1.0] * 4 + [2.0] * 4


def resident() -> float:
    """MiB of memory."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line[:5] == "VmRSS")
    return int(line.split()[1]) / 1024


def growth(act: Callable[[], None], times: int) -> float:
    """MiB, after the first tenth, which fills what is kept."""
    before = 0.0
    for i in range(times):
        act()
        if i == times // 10:
            before = resident()
    return resident() - before


def test_nothing_is_left_by_many_calls() -> None:
    """No cycles either, which would wait for the garbage collector."""

    def fn() -> float:
        x = torch.ones(1000)
        seen = []

        def call() -> None:
            work = dist.all_reduce(x, async_op=True)
            work.get_future().then(lambda future: seen.append(len(future.value())))
            work.wait()

        gc.collect()
        gc.disable()
        grown = growth(call, 10_000)
        assert seen == [1] * 10_000
        assert sum(isinstance(each, Handle) for each in gc.get_objects()) < 10  # while the last ones end
        return grown

    assert max(on_ranks(fn, 2)) < 2  # 200 bytes for each call would be more


def test_nothing_is_left_by_many_steps() -> None:
    def fn() -> float:
        layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
        model = torch.nn.parallel.DistributedDataParallel(layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        x = torch.ones(4, 8)

        def step() -> None:
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()

        gc.collect()
        gc.disable()
        grown = growth(step, 500)
        assert sum(isinstance(each, Handle) for each in gc.get_objects()) < 10
        return grown

    assert max(on_ranks(fn, 2)) < 2  # 4 KiB for each step would be more
