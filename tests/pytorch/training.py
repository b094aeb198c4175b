"""A small model, its data, and what its training on a process group ends with."""

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # DDP and optimizers import it: once here, not in every rank
import torch.distributed as dist
from groups import on_ranks
from torch.nn.parallel import DistributedDataParallel

SIZE = 2


def net() -> Any:
    torch.manual_seed(0)  # the same on all ranks
    linear, tanh = torch.nn.Linear, torch.nn.Tanh
    return torch.nn.Sequential(linear(6, 32), tanh(), linear(32, 32), tanh(), linear(32, 2))


def ddp(model: Any = None, **options: Any) -> Any:
    """With several buckets."""
    return DistributedDataParallel(net() if model is None else model, bucket_cap_mb=0.002, **options)


def batch(step: int, rank: int | None = None) -> Any:
    generator = torch.Generator().manual_seed(100 * (dist.get_rank() if rank is None else rank) + step)
    return torch.randn(8, 6, generator=generator)


def backward(model: Any, x: Any) -> None:
    model(x).float().square().mean().backward()


def sgd(model: Any) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model: Any, steps: int = 5) -> Any:
    optimizer = sgd(model)
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, batch(step))
        optimizer.step()
    return weights(model)


def weights(model: Any) -> Any:
    with torch.no_grad():
        full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in full])


def one_rank() -> Any:
    """Weights of `net()` after `train()` with the data of all ranks, and no communication."""
    model = net()
    optimizer = sgd(model)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, torch.cat([batch(step, rank) for rank in range(SIZE)]))
        optimizer.step()
    return weights(model)


def check_as_on_gloo(way: Callable[[], Any], alike: bool = True) -> None:
    """`way()` returns the same on both, to float rounding; the same bits on all ranks, if `alike`."""
    expected = on_ranks(way, SIZE, "gloo")
    found = on_ranks(way, SIZE, "pycomm")
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    if alike:
        assert torch.equal(found[0], found[1])
