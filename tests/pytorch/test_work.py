"""What a program does with works and futures: calls in callbacks, and many of them."""

from typing import Any

import torch
import torch.distributed as dist
from groups import on_ranks


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
