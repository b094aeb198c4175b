"""MPI through mpi4py: its methods for buffers, on preallocated arrays with explicit MPI types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from data import POINT_TO_POINT, REDUCING, WINDOW
from mpi4py import MPI

if TYPE_CHECKING:
    from pycomm.bench.workers.data import Array, Case

OUT_OF_PLACE = {
    "all_reduce": "comm.Allreduce(x, out, op)",
    "reduce_scatter": "comm.Reduce_scatter_block(x, out, op)",
    "all_gather": "comm.Allgather(x, out)",
    "reduce": "comm.Reduce(x, out_at_root, op, root)",
    "gather": "comm.Gather(x, out_at_root, root)",
    "scatter": "comm.Scatter(x_at_root, out, root)",
    "all_to_all": "comm.Alltoall(x, out)",
    "barrier": "comm.Barrier()",
    "send_recv": "comm.Sendrecv(x, right, 0, out, left, 0)",
}
IN_PLACE = {
    "all_reduce": "comm.Allreduce(IN_PLACE, x, op)",
    "reduce_scatter": "comm.Reduce_scatter_block(IN_PLACE, x, op)",
    "all_gather": "comm.Allgather(IN_PLACE, out)",
    "broadcast": "comm.Bcast(x, root)",
    "all_to_all": "comm.Alltoall(IN_PLACE, x)",
}
IN_PLACE_AT_ROOT = {
    "reduce": ("comm.Reduce(IN_PLACE, x, op, root)", "comm.Reduce(x, None, op, root)"),
    "gather": ("comm.Gather(IN_PLACE, out, root)", "comm.Gather(x, None, root)"),
    "scatter": ("comm.Scatter(x, IN_PLACE, root)", "comm.Scatter(None, out, root)"),
}
TWO_RANKS = {
    "ping_pong": ("comm.Send(x, 1); comm.Recv(out, 1)", "comm.Recv(out, 0); comm.Send(x, 0)"),
    "one_way": (
        "wait_all([comm.Isend(x, 1) for _ in window])",
        "wait_all([comm.Irecv(out, 0) for _ in window])",
    ),
    "two_way": (
        "wait_all([comm.Irecv(out, 1) for _ in window] + [comm.Isend(x, 1) for _ in window])",
        "wait_all([comm.Irecv(out, 0) for _ in window] + [comm.Isend(x, 0) for _ in window])",
    ),
}
OPS = {
    "sum": MPI.SUM,
    "prod": MPI.PROD,
    "min": MPI.MIN,
    "max": MPI.MAX,
    "band": MPI.BAND,
    "bor": MPI.BOR,
    "bxor": MPI.BXOR,
}
TYPES = {
    "float32": MPI.FLOAT,
    "float64": MPI.DOUBLE,
    "complex64": MPI.C_FLOAT_COMPLEX,
    "complex128": MPI.C_DOUBLE_COMPLEX,
    "bool": MPI.C_BOOL,
    **{
        f"{sign}int{bits}": getattr(MPI, f"{sign.upper()}INT{bits}_T")
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


class Engine:
    def __init__(self, rank: int, size: int, directory: str) -> None:
        self.comm = MPI.COMM_WORLD
        if self.comm.size != size:
            raise RuntimeError(f"{self.comm.size} ranks instead of {size}: is mpiexec that of this mpi4py?")
        self.rank: int = self.comm.rank
        first = MPI.Get_library_version().partition(",")[0].partition("\n")[0].strip("\0 ")
        self.version = " ".join(first.replace("Version:", "").removesuffix("for Linux* OS").split())

    def barrier(self) -> None:
        self.comm.Barrier()

    def empty(self, count: int, dtype: np.dtype[Any]) -> Array:
        return np.empty(count, dtype)

    def in_place_part(self, case: Case) -> int:
        return 0 if case.collective == "reduce_scatter" else self.rank  # MPI leaves the result at the front

    def bind(
        self, case: Case, form: str, variant: dict[str, Any], x: Array, out: Array
    ) -> tuple[str, dict[str, Any]] | None:
        root = self.rank == case.root
        calls = {**IN_PLACE, **{name: pair[not root] for name, pair in IN_PLACE_AT_ROOT.items()}}
        call = (calls if form == "in_place" else OUT_OF_PLACE).get(case.collective)
        if case.collective in POINT_TO_POINT and form == "out_of_place":
            call = TWO_RANKS[case.collective][self.rank]
        if call is None:
            return None
        if case.op not in OPS:
            raise TypeError(f"MPI has no operation {case.op}")
        if case.collective in REDUCING and x.dtype.name not in TYPES:
            raise TypeError(f"MPI has no type {x.dtype.name}, and cannot reduce types that it does not know")
        source, target, size = _typed(x), _typed(out), self.comm.size
        return call, {
            "comm": self.comm,
            "x": source,
            "out": target,
            "x_at_root": source if root else None,
            "out_at_root": target if root else None,
            "op": OPS[case.op],
            "root": case.root,
            "right": (self.rank + 1) % size,
            "left": (self.rank - 1) % size,
            "IN_PLACE": MPI.IN_PLACE,
            "wait_all": MPI.Request.Waitall,
            "window": range(WINDOW),
        }

    def start(self, text: str) -> str:
        first = len("comm.")
        return f"{text[:first]}I{text[first].lower()}{text[first + 1 :]}"  # comm.Ibcast(...)

    def algorithm(self, case: Case, variant: dict[str, Any]) -> str:
        return ""

    def close(self) -> None:
        MPI.Finalize()


def _typed(x: Array) -> list[Any]:
    """x with its MPI type. Elements without an MPI type are moved as bytes."""
    kind = TYPES.get(x.dtype.name)
    return [x.view(np.uint8), MPI.BYTE] if kind is None else [x, kind]
