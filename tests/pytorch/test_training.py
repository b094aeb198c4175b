"""What else torch builds on a process group, unmodified: the same on pycomm as on Gloo."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.nn.functional
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from training import SIZE, backward, batch, check_as_on_gloo, ddp, net, sgd, train, weights


def zero() -> Any:
    model = ddp()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, batch(step))
        optimizer.step()
    return weights(model)


def zero_with_uneven_inputs() -> Any:
    model = ddp()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.1)
    with Join([model, optimizer]):
        for step in range(3 + 2 * dist.get_rank()):
            optimizer.zero_grad()
            backward(model, batch(step))
            optimizer.step()
    return weights(model)


def fsdp1() -> Any:
    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    optimizer = sgd(model)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, batch(step))
        optimizer.step()
    with FullyShardedDataParallel.summon_full_params(model):
        return weights(model).clone()


def pipeline() -> Any:
    """Two stages, which send activations forward and gradients back."""
    rank = dist.get_rank()
    halves = net()[:3], net()[3:]
    stage = PipelineStage(halves[rank], rank, SIZE, torch.device("cpu"))
    optimizer = sgd(halves[rank])
    for kind in (ScheduleGPipe, Schedule1F1B):
        schedule = kind(stage, n_microbatches=4, loss_fn=torch.nn.functional.mse_loss)
        for step in range(3):
            optimizer.zero_grad()
            if rank == 0:
                schedule.step(batch(step, rank=0))
            else:
                schedule.step(target=torch.zeros(8, 2))
            optimizer.step()
    trained = [weights(half) for half in halves]
    for source, of_half in enumerate(trained):
        dist.broadcast(of_half, source)
    return torch.cat(trained)


def tensor_parallel() -> Any:
    model = net()
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (SIZE,)), plan)
    optimizer = sgd(model)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, batch(step, rank=0))
        optimizer.step()
    return weights(model)


def sequence_parallel() -> Any:
    """Activations are sharded between the layers that are parallel."""
    torch.manual_seed(0)
    linear, norm = torch.nn.Linear, torch.nn.LayerNorm
    model = torch.nn.Sequential(norm(6), linear(6, 32), torch.nn.Tanh(), linear(32, 6), norm(6))
    norms = SequenceParallel(sequence_dim=0, use_local_output=True)
    first, last = ColwiseParallel(input_layouts=Shard(0)), RowwiseParallel(output_layouts=Shard(0))
    parallelize_module(
        model, init_device_mesh("cpu", (SIZE,)), {"0": norms, "1": first, "3": last, "4": norms}
    )
    optimizer = sgd(model)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, batch(step, rank=0).chunk(SIZE)[dist.get_rank()])
        optimizer.step()
    return weights(model)


def dtensors() -> Any:
    """Redistributed, multiplied and reduced."""
    mesh = init_device_mesh("cpu", (SIZE,))
    torch.manual_seed(0)
    rows = distribute_tensor(torch.randn(7, 5), mesh, [Shard(0)])
    columns = rows.redistribute(mesh, [Shard(1)])
    own = torch.full((4, 4), float(dist.get_rank()))
    found = [
        columns.full_tensor(),
        columns.redistribute(mesh, [Replicate()]).to_local(),
        DTensor.from_local(own, mesh, [Partial()]).redistribute(mesh, [Shard(0)]).full_tensor(),
        DTensor.from_local(own, mesh, [Partial("max")]).full_tensor(),
        (rows @ rows.t()).full_tensor(),
        rows.sum().full_tensor(),
        rows.max().full_tensor(),
    ]
    return torch.cat([x.reshape(-1) for x in found])


def differentiable() -> Any:
    """Collectives that autograd records."""
    x = batch(0).requires_grad_()
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # it has no successor yet
        y = torch.distributed.nn.functional.all_reduce(2 * x).square().sum()
        y = y + torch.distributed.nn.functional.all_gather(x)[0].sum()
        part = torch.distributed.nn.functional.reduce_scatter(torch.empty(4, 6), list(x.chunk(SIZE)))
    swapped = funcol.all_to_all_single_autograd(x, [4, 4], [4, 4], dist.group.WORLD)
    y = y + part.square().sum() + (swapped.square() * dist.get_rank()).sum()
    y.backward()
    return torch.cat([y.detach().reshape(1), x.grad.reshape(-1)])


def functional_in_a_graph() -> Any:
    @torch.compile(backend="eager", fullgraph=True)
    def step(x: Any) -> Any:
        total = funcol.all_reduce(x, "sum", dist.group.WORLD)
        parts = funcol.reduce_scatter_tensor(total.reshape(-1), "avg", 0, dist.group.WORLD)
        return funcol.all_gather_tensor(parts * 2, 0, dist.group.WORLD)

    return step(batch(0))


WAYS: dict[str, Callable[[], Any]] = {
    "zero": zero,
    "zero, join": zero_with_uneven_inputs,
    "fsdp1": fsdp1,
    "replicate": lambda: train(replicate(net())),
    "pipeline": pipeline,
    "tensor parallel": tensor_parallel,
    "sequence parallel": sequence_parallel,
    "dtensors": dtensors,
    "differentiable": differentiable,
    "functional collectives, compiled": functional_in_a_graph,
    "ddp, compiled": lambda: train(torch.compile(DistributedDataParallel(net()), backend="eager")),
}


@pytest.mark.parametrize("way", WAYS)
def test_trains_as_on_gloo(way: str) -> None:
    check_as_on_gloo(WAYS[way], alike=way != "differentiable")  # whose gradients are each rank's own
