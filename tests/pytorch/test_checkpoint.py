"""torch.distributed.checkpoint on pycomm: what some ranks saved, another number of ranks goes on with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from groups import on_ranks
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from training import backward, ddp, net, sgd, weights

STEPS = 3  # before the checkpoint, and after it


def share(step: int) -> Any:
    """This rank's part of 12 samples: the average over all ranks does not depend on how many there are."""
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))
    return x.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else x


def go_on(model: Any, optimizer: Any, first: int) -> None:
    for step in range(first, first + STEPS):
        optimizer.zero_grad()
        backward(model, share(step))
        optimizer.step()


def sharded() -> Any:
    return fully_shard(net())


def state(model: Any, optimizer: Any) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def never_stopped() -> Any:
    model = net()
    optimizer = sgd(model)
    go_on(model, optimizer, 0)
    go_on(model, optimizer, STEPS)
    return weights(model)


def resumed(make: Callable[[], Any], folder: Path) -> Any:
    model = make()
    optimizer = sgd(model)
    saved = state(model, optimizer)
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    go_on(model, optimizer, STEPS)
    return weights(model)


@pytest.mark.parametrize("make", [ddp, sharded])
@pytest.mark.parametrize("ranks", [(2, 3), (3, 2)])
def test_another_number_of_ranks_goes_on(
    make: Callable[[], Any], ranks: tuple[int, int], tmp_path: Path
) -> None:
    def save() -> None:
        model = make()
        optimizer = sgd(model)  # with momentum, which is state
        go_on(model, optimizer, 0)
        dcp.save(state(model, optimizer), checkpoint_id=tmp_path)

    on_ranks(save, ranks[0])
    expected = never_stopped()
    for found in on_ranks(lambda: resumed(make, tmp_path), ranks[1]):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_saved_while_training_goes_on(tmp_path: Path) -> None:
    """By a thread, over a group of its own: the state is that of when it began."""

    def save() -> None:
        model = sharded()
        optimizer = sgd(model)
        group = dist.new_group()
        go_on(model, optimizer, 0)
        saving = dcp.async_save(state(model, optimizer), checkpoint_id=tmp_path, process_group=group)
        for _ in range(10):
            go_on(model, optimizer, STEPS)
        saving.result()

    on_ranks(save, 2)
    expected = never_stopped()
    for found in on_ranks(lambda: resumed(sharded, tmp_path), 3):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
