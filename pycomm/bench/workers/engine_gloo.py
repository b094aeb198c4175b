"""Gloo through torch.distributed, on tensors over the same arrays."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's name may have no address

import torch
import torch.distributed as dist

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
    def __init__(self, rank: int, size: int, directory: str) -> None:
        torch.set_num_threads(1)  # there is one core for each rank
        dist.init_process_group("gloo", f"file://{directory}/gloo", rank=rank, world_size=size)
        self.rank = rank
        self.size = size
        self.version = f"Gloo of torch {torch.__version__}"

    def barrier(self) -> None:
        dist.barrier()

    def bind(
        self, case: Case, form: str, variant: dict[str, Any], x: Array, out: Array
    ) -> tuple[str, dict[str, Any]] | None:
        call = (IN_PLACE if form == "in_place" else OUT_OF_PLACE).get(case.collective)
        if call is None:
            return None
        if case.op not in OPS:
            raise TypeError(f"Gloo has no operation {case.op}")
        source, target = torch.from_numpy(x), torch.from_numpy(out)
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
        }

    def algorithm(self, case: Case, variant: dict[str, Any]) -> str:
        return ""

    def close(self) -> None:
        dist.destroy_process_group()
