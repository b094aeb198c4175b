"""Ranks with a process group of torch.distributed, of any backend."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from processes import Rank, outcomes_of

import pycomm.torch

# Before torch 2.14 pycomm's object is the group itself, and from then on a backend of one that is torch's.
IS_THE_GROUP = issubclass(pycomm.torch.backend_class, dist.ProcessGroup)

torch.set_num_threads(1)  # a child of fork has no other threads of torch's pool


def on_ranks(
    fn: Callable[[], Any], size: int, backend: str = "pycomm", died: tuple[int, ...] = ()
) -> list[Any]:
    """Runs `fn()` in `size` processes, within a group of `backend`; returns what each returned.

    Raises the first error, unless it is of a rank in `died`.
    """
    with tempfile.TemporaryDirectory() as folder:

        def body(rank: int) -> Any:
            # Makes the pool anew, which ends the process if two threads do so at once.
            torch.set_num_threads(1)
            store = dist.FileStore(f"{folder}/store", size)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
            result = fn()
            dist.destroy_process_group()
            return result

        ranks: list[Rank] = []
        try:
            for rank in range(size):
                ranks.append(Rank(lambda rank=rank: body(rank), ranks))
            outcomes = outcomes_of(ranks)
        finally:
            for each in ranks:
                each.kill()
                each.wait()
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, BaseException) and rank not in died:
            raise outcome
    return outcomes
