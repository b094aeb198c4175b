"""Gloo through torch.distributed, on tensors that share the arrays' memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's name may have no address

import numpy as np
import torch
import torch.distributed as dist
from data import POINT_TO_POINT, WINDOW

if TYPE_CHECKING:
    from pycomm.bench.workers.data import Array, Case

OUT_OF_PLACE = {
    "reduce_scatter": "dist.reduce_scatter_tensor(out, x, op)",
    "all_gather": "dist.all_gather_into_tensor(out, x)",
    "gather": "dist.gather(x, out_parts, root)",
    "scatter": "dist.scatter(out, x_parts, root)",
    "all_to_all": "dist.all_to_all_single(out, x)",
    "barrier": "dist.barrier()",
    "send_recv": "work = dist.isend(x, right); dist.recv(out, left); work.wait()",
}
IN_PLACE = {
    "all_reduce": "dist.all_reduce(x, op)",
    "broadcast": "dist.broadcast(x, root)",
    "reduce": "dist.reduce(x, root, op)",
}
TWO_RANKS = {
    "ping_pong": ("dist.send(x, 1); dist.recv(out, 1)", "dist.recv(out, 0); dist.send(x, 0)"),
    "one_way": (
        "for work in [dist.isend(x, 1) for _ in window]: work.wait()",
        "for work in [dist.irecv(out, 0) for _ in window]: work.wait()",
    ),
    "two_way": (
        "for work in [dist.irecv(out, 1) for _ in window] + [dist.isend(x, 1) for _ in window]: work.wait()",
        "for work in [dist.irecv(out, 0) for _ in window] + [dist.isend(x, 0) for _ in window]: work.wait()",
    ),
}
OPS = {
    "sum": dist.ReduceOp.SUM,
    "prod": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "band": dist.ReduceOp.BAND,
    "bor": dist.ReduceOp.BOR,
    "bxor": dist.ReduceOp.BXOR,
}


class Engine:
    backend = "gloo"

    def __init__(self, rank: int, size: int, directory: str) -> None:
        torch.set_num_threads(1)  # each rank has one core
        meeting = f"file://{directory}/{self.backend}"
        dist.init_process_group(self.backend, meeting, rank=rank, world_size=size)
        self.rank = rank
        self.size = size
        self.version = f"{self.backend.capitalize()} of torch {torch.__version__}"

    def barrier(self) -> None:
        dist.barrier()

    def empty(self, count: int, dtype: np.dtype[Any]) -> Array:
        return _numpy(torch.empty(count * dtype.itemsize, dtype=torch.uint8), dtype)

    def in_place_part(self, case: Case) -> int:
        return self.rank

    def bind(
        self, case: Case, form: str, variant: dict[str, Any], x: Array, out: Array
    ) -> tuple[str, dict[str, Any]] | None:
        call = (IN_PLACE if form == "in_place" else OUT_OF_PLACE).get(case.collective)
        if case.collective in POINT_TO_POINT and form == "out_of_place":
            call = TWO_RANKS[case.collective][self.rank]
        if call is None:
            return None
        if case.op not in OPS:
            raise TypeError(f"Gloo has no operation {case.op}")
        source, target = tensor(x), tensor(out)
        root = self.rank == case.root
        return call, {
            "dist": dist,
            "x": source,
            "out": target,
            "x_parts": list(source.split(case.count)) if root and case.collective == "scatter" else None,
            "out_parts": list(target.split(case.count)) if root and case.collective == "gather" else None,
            "op": OPS[case.op],
            "root": case.root,
            "right": (self.rank + 1) % self.size,
            "left": (self.rank - 1) % self.size,
            "window": range(WINDOW),
        }

    def start(self, text: str) -> str:
        return f"{text[:-1]}, async_op=True)"

    def algorithm(self, case: Case, variant: dict[str, Any]) -> str:
        return ""

    def close(self) -> None:
        dist.destroy_process_group()


def _numpy(tensor: torch.Tensor, dtype: np.dtype[Any]) -> Array:
    array: Array = tensor.numpy().view(dtype)
    return array


def tensor(x: Array) -> torch.Tensor:
    """A tensor on the same memory with the same type, also for bfloat16 and float8."""
    return torch.from_numpy(x.view(np.uint8)).view(getattr(torch, x.dtype.name))
