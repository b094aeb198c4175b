"""FSDP2 (`fully_shard`) and HSDP on pycomm, unmodified, in all modes: the same weights as on Gloo."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from groups import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from training import SIZE, backward, batch, check_as_on_gloo, net, one_rank, sgd, train, weights


def sharded(model: Any = None, **options: Any) -> Any:
    """Every layer by itself, and what is left."""
    model = net() if model is None else model
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def uneven_shards() -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Linear(7, 3))
    return train(fully_shard(model))


def by_columns() -> Any:
    """Weights of 32 x 32, sharded along their second dimension."""
    shard = torch.distributed.tensor.Shard
    return train(
        sharded(shard_placement_fn=lambda p: shard(1) if p.shape[-1] == 32 and p.dim() == 2 else None)
    )


def accumulating() -> Any:
    """Gradients stay unsharded until the last pass of a step."""
    model = sharded()
    optimizer = sgd(model)
    for step in range(4):
        for part in range(3):
            model.set_requires_gradient_sync(part == 2)
            model.set_is_last_backward(part == 2)
            backward(model, batch(3 * step + part))
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def clipped() -> Any:
    """By the norm of all shards, which is a DTensor."""
    model = sharded()
    optimizer = sgd(model)
    norms = []
    for step in range(5):
        optimizer.zero_grad()
        backward(model, batch(step))
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05).full_tensor())
        optimizer.step()
    assert min(norms) > 0.05  # it clipped
    return torch.cat([weights(model), torch.stack(norms)])


def prefetching() -> Any:
    """Several all_gathers are under way."""
    model = sharded()
    layers = [layer for layer in model if list(layer.parameters())]
    for layer, ahead in pairwise(layers):
        layer.set_modules_to_forward_prefetch([ahead])
        ahead.set_modules_to_backward_prefetch([layer])
    model._set_unshard_async_op(True)
    return train(model)


def hooked() -> Any:
    """FSDP's own group shards on one rank alone; the hook averages over another group."""
    mesh = init_device_mesh("cpu", (SIZE, 1), mesh_dim_names=("replicas", "shards"))
    group = mesh["replicas"].get_group()
    model = sharded(mesh=mesh["shards"])
    seen = []

    def average(shard: Any) -> None:
        dist.all_reduce(shard, dist.ReduceOp.SUM, group=group)
        shard /= SIZE
        seen.append(shard.numel())

    for module in model.modules():
        if hasattr(module, "set_all_reduce_hook"):
            module.set_all_reduce_hook(average)
    trained = train(model)
    assert sum(seen) == 5 * trained.numel()  # each gradient in each step
    return trained


def hsdp(shape: tuple[int, int]) -> Any:
    """Gradients are averaged over the mesh's first dimension, and sharded over the second."""
    return train(sharded(mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))))


def saved_in_full() -> Any:
    model = sharded()
    train(model)
    return torch.cat([value.full_tensor().reshape(-1) for value in model.state_dict().values()])


def with_sums() -> Any:
    model = sharded()
    for module in model.modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)
    return train(model)


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

WAYS: dict[str, Callable[[], Any]] = {
    "plain": lambda: train(sharded()),
    "uneven shards": uneven_shards,
    "by columns": by_columns,
    "stays unsharded after forward": lambda: train(sharded(reshard_after_forward=False)),
    "mixed precision": lambda: train(sharded(mp_policy=BF16)),
    "mixed precision, reduced in bfloat16": lambda: train(
        sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    ),
    "offloaded": lambda: train(sharded(offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "accumulation": accumulating,
    "clipped": clipped,
    "prefetching": prefetching,
    "sums alone": with_sums,
    "hook": hooked,
    "hsdp, replicas": lambda: hsdp((SIZE, 1)),
    "hsdp, shards": lambda: hsdp((1, SIZE)),
    "state_dict": saved_in_full,
}


@pytest.mark.parametrize("way", WAYS)
def test_trains_as_on_gloo(way: str) -> None:
    check_as_on_gloo(WAYS[way])


@pytest.mark.parametrize("way", ["plain", "hook", "hsdp, replicas", "hsdp, shards"])
def test_trains_as_one_rank_does(way: str) -> None:
    for found, expected in on_ranks(lambda: (WAYS[way](), one_rank()), SIZE):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_two_replicas_of_two_shards() -> None:
    """Four ranks, of which pairs have the same data: the weights are those of two ranks."""

    def fn() -> Any:
        rank = dist.get_rank()
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        model = sharded(mesh=mesh)
        optimizer = sgd(model)
        for step in range(5):
            optimizer.zero_grad()
            backward(model, batch(step, rank // 2))
            optimizer.step()
        return weights(model), one_rank()

    for found, expected in on_ranks(fn, 4):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
