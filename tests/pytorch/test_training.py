"""torch's own data parallelism on pycomm, unmodified: the same weights as on Gloo, to float rounding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from groups import on_ranks
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

SIZE = 2


def net() -> Any:
    torch.manual_seed(0)  # the same on all ranks
    linear, tanh = torch.nn.Linear, torch.nn.Tanh
    return torch.nn.Sequential(linear(6, 32), tanh(), linear(32, 32), tanh(), linear(32, 2))


class Branches(torch.nn.Module):
    """Rank 0 uses one layer, rank 1 another; nobody uses the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(SIZE + 1))

    def forward(self, x: Any) -> Any:
        return self.layers[dist.get_rank()](x)


def batch(step: int, rank: int | None = None) -> Any:
    generator = torch.Generator().manual_seed(100 * (dist.get_rank() if rank is None else rank) + step)
    return torch.randn(8, 6, generator=generator)


def train(model: Any, steps: int = 5) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
    return weights(model)


def weights(model: Any) -> Any:
    with torch.no_grad():
        full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in full])


def ddp(model: Any = None, **options: Any) -> Any:
    return DistributedDataParallel(net() if model is None else model, bucket_cap_mb=0.002, **options)


def accumulating() -> Any:
    model = ddp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        with model.no_sync():
            model(batch(2 * step)).square().mean().backward()
        model(batch(2 * step + 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def uneven() -> Any:
    model = ddp()
    with Join([model]):
        train(model, steps=3 + 2 * dist.get_rank())
    return weights(model)


def with_a_hook() -> Any:
    """A hook in Python that chains on the work's future."""

    def average(state, bucket):  # without types: DDP would want its own
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda f: f.value()[0] / SIZE)

    model = ddp()
    model.register_comm_hook(None, average)
    return train(model)


def batch_norm() -> Any:
    """Buffers are broadcast before each forward pass."""
    model = torch.nn.Sequential(net()[0], torch.nn.BatchNorm1d(32), net()[4])
    trained = ddp(model)
    return torch.cat([train(trained), model[1].running_mean, model[1].running_var])


def fsdp() -> Any:
    model = net()
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer)
    fully_shard(model)
    return train(model)


def fsdp_of_uneven_shards() -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Linear(7, 3))
    fully_shard(model)
    return train(model)


def hsdp() -> Any:
    """Two replicas, each of one shard: gradients are averaged over the mesh's other dimension."""
    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (SIZE, 1), mesh_dim_names=("replicas", "shards")))
    return train(model)


def zero() -> Any:
    model = ddp()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
    return weights(model)


def tensor_parallel() -> Any:
    model = net()
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (SIZE,)), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        model(batch(step, rank=0)).square().mean().backward()
        optimizer.step()
    return weights(model)


def compiled() -> Any:
    """Functional collectives in a graph."""

    @torch.compile(backend="eager", fullgraph=True)
    def step(x: Any) -> Any:
        total = funcol.all_reduce(x, "sum", dist.group.WORLD)
        parts = funcol.reduce_scatter_tensor(total.reshape(-1), "avg", 0, dist.group.WORLD)
        return funcol.all_gather_tensor(parts * 2, 0, dist.group.WORLD)

    return step(batch(0))


WAYS: dict[str, Callable[[], Any]] = {
    "ddp": lambda: train(ddp()),
    "bucket views": lambda: train(ddp(gradient_as_bucket_view=True)),
    "static graph": lambda: train(ddp(static_graph=True)),
    "unused parameters": lambda: train(ddp(Branches(), find_unused_parameters=True)),
    "accumulation": accumulating,
    "join": uneven,
    "hook": with_a_hook,
    "batch norm": batch_norm,
    "fsdp2": fsdp,
    "fsdp2, uneven shards": fsdp_of_uneven_shards,
    "hsdp": hsdp,
    "zero": zero,
    "tensor parallel": tensor_parallel,
    "compiled": compiled,
}


@pytest.mark.parametrize("way", WAYS)
def test_trains_as_on_gloo(way: str) -> None:
    expected = on_ranks(WAYS[way], SIZE, "gloo")
    found = on_ranks(WAYS[way], SIZE, "pycomm")
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    if way != "batch norm":  # whose running means are each rank's own
        assert torch.equal(found[0], found[1])


def one_rank() -> Any:
    """With the data of all, and no communication."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(5):
        optimizer.zero_grad()
        x = torch.cat([batch(step, rank) for rank in range(SIZE)])
        model(x).square().mean().backward()
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_trains_as_one_rank_does(way: str) -> None:
    for found, expected in on_ranks(lambda: (WAYS[way](), one_rank()), SIZE):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
