"""Models that are compressed, and what must come out of them, in float64."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch._dynamo  # which DDP and FSDP2 would otherwise import anew in every rank
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

SIZE = 2


def net() -> Any:
    torch.manual_seed(0)  # the same on all ranks
    linear, tanh = torch.nn.Linear, torch.nn.Tanh
    return torch.nn.Sequential(
        linear(12, 40), tanh(), torch.nn.LayerNorm(40), linear(40, 30), tanh(), linear(30, 7)
    )


def ddp(model: Any = None, **options: Any) -> Any:
    """Some buckets: other ones from the second step on."""
    return DistributedDataParallel(net() if model is None else model, bucket_cap_mb=0.002, **options)


def fsdp(model: Any = None, **options: Any) -> Any:
    """7 rows on two ranks: one shard is padded."""
    model = net() if model is None else model
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def batch(step: int, rank: int | None = None) -> Any:
    generator = torch.Generator().manual_seed(100 * (dist.get_rank() if rank is None else rank) + step)
    return torch.randn(8, 12, generator=generator)


def backward(model: Any, step: int, scale: float = 1.0) -> None:
    (model(batch(step)).square().mean() * scale).backward()


def gradients(model: Any) -> dict[str, Any]:
    """What the optimizer gets, whole, in float64; names as in the model that is not wrapped."""
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            found[name.removeprefix("module.")] = grad.detach().double().clone()
    return found


def true_average(step: int, ranks: Iterable[int] = range(SIZE), model: Any = None) -> dict[str, Any]:
    """In one process, in float64, at the initial weights, which these tests keep."""
    whole = (net() if model is None else model).double()
    ranks = list(ranks)
    for rank in ranks:
        (whole(batch(step, rank).double()).square().mean() / len(ranks)).backward()
    return {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}


WAYS: dict[str, Callable[..., Any]] = {"ddp": ddp, "fsdp2": fsdp}


def owed(compression: Any) -> dict[str, Any]:
    """The mean of the ranks' residuals."""
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        everyones, {n: r.numpy() for n, r in compression.state_dict()["residuals"].items()}
    )
    return {
        name: torch.from_numpy(np.mean([each[name] for each in everyones], axis=0, dtype="d"))
        for name in everyones[0]
    }


def check_nothing_is_lost(
    total: dict[str, Any], want: dict[str, Any], left: dict[str, Any], atol: float
) -> None:
    """What was applied and what is still owed is the sum of the true averages."""
    assert left
    for name, residual in left.items():
        paid = total[name].reshape(-1) + residual
        torch.testing.assert_close(paid, want[name].reshape(-1), rtol=0, atol=atol)
        assert residual.abs().max() > 5 * atol or not residual.any()  # without it the sums would differ


class Sums:
    """What the optimizer was given and what it should have been given, over steps at the same weights."""

    def __init__(
        self, model: Any, compression: Any, scale: float = 1.0, ranks: int = SIZE, rounding: float = 0.0
    ) -> None:
        """`rounding`: the relative error with which results are stored, which no residual keeps."""
        self.model, self.compression, self.scale, self.ranks = model, compression, scale, ranks
        self.rounding = rounding
        self.error: dict[str, Any] = {}
        self.got: dict[str, Any] = {}
        self.want: dict[str, Any] = {}
        if compression.error_feedback is not None:
            compression.error_feedback.scale = scale

    def step(self, step: int) -> None:
        self.model.zero_grad()
        backward(self.model, step, self.scale)
        self.add(true_average(step, range(self.ranks)))

    def add(self, want: dict[str, Any]) -> None:
        got = gradients(self.model)
        for name, exact in want.items():
            self.got[name] = self.got.get(name, 0) + got[name] / self.scale
            self.want[name] = self.want.get(name, 0) + exact
            rounded = got[name].abs() / self.scale + exact.abs()
            self.error[name] = self.error.get(name, 2e-6) + self.rounding * rounded

    def check(self) -> None:
        """What was applied and what is still owed is the sum of the true averages."""
        left = owed(self.compression)
        assert left
        for name, residual in left.items():
            off = (self.got[name].reshape(-1) + residual - self.want[name].reshape(-1)).abs()
            error = torch.as_tensor(self.error[name]).reshape(-1)
            assert (off <= error).all(), (name, float((off - error).max()))
            assert (residual.abs() > 3 * error).any(), name  # without it, the sums would differ
