"""pycomm.torch.compress beside what must come out, in float64: on DistributedDataParallel and fully_shard."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from groups import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import pycomm
import pycomm.torch
from pycomm.codecs import ErrorFeedback, Int8, PowerSGD

SIZE = 2
INT8_STEP = 1 / 254  # of a block's largest magnitude: half a unit, at most, for each encode


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


def true_average(step: int, model: Any = None, size: int = SIZE) -> dict[str, Any]:
    """In one process, in float64, at the initial weights, which these tests keep."""
    whole = (net() if model is None else model).double()
    for rank in range(size):
        (whole(batch(step, rank).double()).square().mean() / size).backward()
    return {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}


WAYS: dict[str, Callable[..., Any]] = {"ddp": ddp, "fsdp2": fsdp}


@pytest.mark.parametrize("way", WAYS)
def test_within_the_bound_and_the_same_on_all_ranks(way: str) -> None:
    """int8 rounds each element by at most half a unit: once for each rank that encodes, and the average once."""

    def fn() -> Any:
        model = WAYS[way]()
        compression = pycomm.torch.compress(model, "int8")
        assert compression.error_feedback is None
        found = []
        for step in range(3):
            model.zero_grad()
            backward(model, step)
            want, got = true_average(step), gradients(model)
            assert got.keys() == want.keys()
            for name, exact in want.items():
                error = (got[name] - exact).abs().max().item()
                if exact.dim() < 2:
                    assert error <= 1e-6, name  # exempt by default
                else:
                    # Stochastic: a whole unit, of the largest element of a rank's gradient, which is below twice
                    # the sum of both; and as much for the average.
                    largest = max(
                        float(p.grad.abs().max())
                        for rank in range(SIZE)
                        for n, p in one_rank(step, rank).named_parameters()
                        if n == name
                    )
                    assert 0 < error <= 2 * 2 * INT8_STEP * largest * 1.01, name
            found.append(got)
        traffic = compression.traffic
        assert 0.2 * traffic.uncompressed < traffic.sent < 0.5 * traffic.uncompressed
        return found

    first, second = on_ranks(fn, SIZE)
    for mine, other in zip(first, second, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def one_rank(step: int, rank: int) -> Any:
    model = net().double()
    model(batch(step, rank).double()).square().mean().backward()
    return model


@pytest.mark.parametrize("way", WAYS)
def test_exempt_parameters_are_exact(way: str) -> None:
    def fn() -> None:
        for exempt in (["3.*", "0.weight", "*.bias"], lambda name, shape: name != "5.weight"):
            model = WAYS[way]()
            pycomm.torch.compress(model, "int4", exempt=exempt)
            backward(model, 0)
            got, want = gradients(model), true_average(0)
            exact = {name for name in want if torch.allclose(got[name], want[name], rtol=1e-5, atol=1e-7)}
            compressed = {"5.weight"} if callable(exempt) else {"5.weight", "2.weight"}
            assert exact == want.keys() - compressed

    on_ranks(fn, SIZE)


FED: list[tuple[str, Any]] = [
    ("ddp", "int8"),
    ("ddp", "fp8_e4m3"),
    ("ddp", "sign"),
    ("ddp", "topk"),
    ("ddp", "powersgd"),
    ("fsdp2", "int8"),
    ("fsdp2", "int4"),
    ("fsdp2", "sign"),
]


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


@pytest.mark.parametrize(("way", "codec"), FED)
def test_what_was_not_sent_is_sent_later(way: str, codec: str) -> None:
    """Over DDP's rebuilding of buckets as well, and with a loss scale."""

    def fn() -> None:
        for scale in (1.0, 512.0):
            model = WAYS[way]()
            compression = pycomm.torch.compress(model, codec, error_feedback=True)
            assert compression.error_feedback is not None
            compression.error_feedback.scale = scale
            total: dict[str, Any] = {}
            want: dict[str, Any] = {}
            for step in range(5):
                model.zero_grad()
                backward(model, step, scale)
                got = gradients(model)
                for name, exact in true_average(step).items():
                    total[name] = total.get(name, 0) + got[name] / scale
                    want[name] = want.get(name, 0) + exact
            check_nothing_is_lost(total, want, owed(compression), 2e-6)

    on_ranks(fn, SIZE)
