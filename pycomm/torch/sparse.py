"""The sum of sparse tensors: each rank gathers the elements of all ranks, and adds those at equal indices."""

from __future__ import annotations

from typing import Any

import torch

from pycomm import Communicator


def all_reduce(comm: Communicator, x: Any, op: Any, timeout: float | None) -> None:
    """Puts the sum over all ranks into `x`, coalesced, and returns when it is there.

    `x` has the layout torch.sparse_coo. All ranks pass one shape, dtype and number of sparse dimensions, and
    as many elements as each has. Elements at equal indices are added in the order of ranks, those of 16 bits
    in float32. Raises ValueError for another op than "sum" before anything has moved, and on all ranks where
    their shapes differ; MismatchError where the number of dimensions does.
    """
    if op != "sum":
        raise ValueError(f"{op!r} of sparse tensors is not there: pass ReduceOp.SUM, or x.to_dense()")
    with torch.no_grad():
        mine = x.coalesce()
        shape = torch.tensor([mine.sparse_dim(), *mine.shape])
        shapes = _gather(comm, shape[None], [1] * comm.size, timeout)
        if (shapes != shape).any():
            shown = ", ".join(f"{tuple(row[1:])} with {row[0]} sparse" for row in shapes.tolist())
            raise ValueError(f"sparse tensors have other shapes on other ranks: {shown}; pass one shape")
        counts = _gather(comm, torch.tensor([mine._nnz()]), [1] * comm.size, timeout).tolist()
        indices = _gather(comm, mine.indices().t(), counts, timeout).t()
        values = _gather(comm, mine.values(), counts, timeout)
        wide = torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else values.dtype
        total = torch.sparse_coo_tensor(indices, values.to(wide), x.shape, check_invariants=False)
        x.copy_(total.coalesce().to(values.dtype))


def _gather(comm: Communicator, mine: Any, counts: list[int], timeout: float | None) -> Any:
    """The rows of all ranks, of which rank i has `counts[i]`."""
    padded = mine.new_zeros(max(counts), *mine.shape[1:])
    padded[: len(mine)] = mine
    everyones = mine.new_empty(comm.size, *padded.shape)
    comm.all_gather(padded.view(-1), out=everyones.view(-1), timeout=timeout)
    return torch.cat([rows[:count] for rows, count in zip(everyones, counts, strict=True)])
