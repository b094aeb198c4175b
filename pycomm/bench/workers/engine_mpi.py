"""MPI through mpi4py: the methods for buffers, on preallocated arrays with their MPI type named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    "all_gather": "comm.Allgather(IN_PLACE, out)",
    "broadcast": "comm.Bcast(x, root)",
    "all_to_all": "comm.Alltoall(IN_PLACE, x)",
}
IN_PLACE_AT_ROOT = {
    "reduce": ("comm.Reduce(IN_PLACE, x, op, root)", "comm.Reduce(x, None, op, root)"),
    "gather": ("comm.Gather(IN_PLACE, out, root)", "comm.Gather(x, None, root)"),
    "scatter": ("comm.Scatter(x, IN_PLACE, root)", "comm.Scatter(None, out, root)"),
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
        self.version = MPI.Get_library_version().partition(",")[0].partition("\n")[0].strip("\0 ")

    def barrier(self) -> None:
        self.comm.Barrier()

    def bind(
        self, case: Case, form: str, variant: dict[str, Any], x: Array, out: Array
    ) -> tuple[str, dict[str, Any]] | None:
        root = self.rank == case.root
        calls = {**IN_PLACE, **{name: pair[not root] for name, pair in IN_PLACE_AT_ROOT.items()}}
        call = (calls if form == "in_place" else OUT_OF_PLACE).get(case.collective)
        if call is None:
            return None
        if case.op not in OPS:
            raise TypeError(f"MPI has no operation {case.op}")
        kind = TYPES.get(x.dtype.name)
        if kind is None:
            raise TypeError(f"MPI has no type {x.dtype.name}")
        source, target, size = [x, kind], [out, kind], self.comm.size
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
        }

    def algorithm(self, case: Case, variant: dict[str, Any]) -> str:
        return ""

    def close(self) -> None:
        MPI.Finalize()
