"""ZeRO, tensor parallel and functional collectives on pycomm, unmodified: the same as on Gloo."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from training import SIZE, backward, batch, check_as_on_gloo, ddp, net, weights


def zero() -> Any:
    model = ddp()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, batch(step))
        optimizer.step()
    return weights(model)


def tensor_parallel() -> Any:
    model = net()
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (SIZE,)), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, batch(step, rank=0))
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


WAYS: dict[str, Callable[[], Any]] = {"zero": zero, "tensor parallel": tensor_parallel, "compiled": compiled}


@pytest.mark.parametrize("way", WAYS)
def test_trains_as_on_gloo(way: str) -> None:
    check_as_on_gloo(WAYS[way])
