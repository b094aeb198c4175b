"""DistributedDataParallel on pycomm, unmodified, in all its modes: the same weights as on Gloo."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import on_ranks
from torch.distributed.algorithms.ddp_comm_hooks import DDPCommHookType, register_ddp_comm_hook
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as local_sgd
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel
from training import SIZE, backward, batch, check_as_on_gloo, ddp, net, one_rank, sgd, train, weights


class Branches(torch.nn.Module):
    """Rank 0 uses one layer, rank 1 another; nobody uses the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(SIZE + 1))

    def forward(self, x: Any) -> Any:
        return self.layers[dist.get_rank()](x)


def accumulating() -> Any:
    model = ddp()
    optimizer = sgd(model)
    for step in range(4):
        with model.no_sync():
            backward(model, batch(2 * step))
        backward(model, batch(2 * step + 1))
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def uneven() -> Any:
    model = ddp()
    with Join([model]):
        train(model, steps=3 + 2 * dist.get_rank())
    return weights(model)


def uneven_over_those_that_joined() -> Any:
    """A rank without input counts as zero gradients; the ranks with input may stop with it."""
    model = ddp()
    with model.join(divide_by_initial_world_size=False):
        train(model, steps=3 + 2 * dist.get_rank())
    return weights(model)


def uneven_with_an_error() -> Any:
    model = ddp()
    stopped = pytest.raises(RuntimeError, match="exhausted (all )?inputs")
    with stopped, model.join(throw_on_early_termination=True):
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


def hook_of_torch(kind: DDPCommHookType) -> Any:
    model = ddp()
    register_ddp_comm_hook(kind, model, dist.group.WORLD)
    return train(model)


def power_sgd() -> Any:
    """The third step is the first that is compressed: it sends P and Q in calls that chain on futures.

    With one bucket: of several, callbacks would send on each rank in an order of its own.
    """
    model = DistributedDataParallel(net())
    state = PowerSGDState(dist.group.WORLD, matrix_approximation_rank=2, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook)
    return train(model)


def post_local_sgd() -> Any:
    """Gradients are averaged in two steps, and weights in every second step after these."""
    model = ddp()
    state = local_sgd.PostLocalSGDState(dist.group.WORLD, dist.group.WORLD, start_localSGD_iter=2)
    model.register_comm_hook(state, local_sgd.post_localSGD_hook)
    averager = PeriodicModelAverager(period=2, warmup_steps=2)
    optimizer = PostLocalSGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), averager)
    for step in range(7):  # the weights were averaged after the last one
        optimizer.zero_grad()
        backward(model, batch(step))
        optimizer.step()
    return weights(model)


def mixed_precision() -> Any:
    """A model in bfloat16, in part under autocast. (DDP's own `mixed_precision` refuses CPU tensors.)"""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([train(ddp()), train(ddp(net().bfloat16())).float()])


def delayed() -> Any:
    """Gradients that are averaged together, when that of the first layer is there."""
    model = net()
    late = [(name, p) for name, p in model.named_parameters() if not name.startswith("0.")]
    model = ddp(model, delay_all_reduce_named_params=late, param_to_hook_all_reduce=model[0].weight)
    return train(model)


def ignoring() -> Any:
    """Parameters that DDP leaves alone, which each rank averages by hand."""
    model = net()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["4.bias"])
    trained = ddp(model)
    optimizer = sgd(trained)
    for step in range(4):
        optimizer.zero_grad()
        backward(trained, batch(step))
        dist.all_reduce(model[4].bias.grad)
        model[4].bias.grad /= SIZE
        optimizer.step()
    return weights(trained)


def batch_norm() -> Any:
    """Buffers are broadcast before each forward pass."""
    model = torch.nn.Sequential(net()[0], torch.nn.BatchNorm1d(32), net()[4])
    trained = ddp(model)
    return torch.cat([train(trained), model[1].running_mean, model[1].running_var])


def sparse_gradients() -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(20, 6, sparse=True), torch.nn.Linear(6, 2))
    trained = ddp(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        words = batch(step).abs().mul(5).long().clamp(max=19)  # each rank's own
        trained(words).square().mean().backward()
        optimizer.step()
    return weights(model)


WAYS: dict[str, Callable[[], Any]] = {
    "plain": lambda: train(ddp()),
    "bucket views": lambda: train(ddp(gradient_as_bucket_view=True)),
    "static graph": lambda: train(ddp(static_graph=True)),
    "static graph, bucket views": lambda: train(ddp(static_graph=True, gradient_as_bucket_view=True)),
    "unused parameters": lambda: train(ddp(Branches(), find_unused_parameters=True)),
    "accumulation": accumulating,
    "join": uneven,
    "join, averages over those with input": uneven_over_those_that_joined,
    "join, with an error": uneven_with_an_error,
    "mixed precision": mixed_precision,
    "delayed": delayed,
    "ignored parameters": ignoring,
    "hook": with_a_hook,
    "hook: all_reduce": lambda: hook_of_torch(DDPCommHookType.ALLREDUCE),
    "hook: fp16": lambda: hook_of_torch(DDPCommHookType.FP16_COMPRESS),
    "hook: PowerSGD": power_sgd,
    "hook: post-local SGD": post_local_sgd,
    "batch norm": batch_norm,
    "sparse gradients": sparse_gradients,
}


@pytest.mark.parametrize("way", WAYS)
def test_trains_as_on_gloo(way: str) -> None:
    check_as_on_gloo(WAYS[way], alike=way != "batch norm")  # whose running means are each rank's own


@pytest.mark.parametrize("way", ["plain", "bucket views", "static graph", "delayed"])
def test_trains_as_one_rank_does(way: str) -> None:
    for found, expected in on_ranks(lambda: (WAYS[way](), one_rank()), SIZE):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
