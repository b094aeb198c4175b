"""A caller's code to check the stubs: `mypy --strict` passes it (test_types.py), nothing runs it."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_type

import pycomm

Floats = npt.NDArray[np.float32]


def blocking(comm: pycomm.Communicator, x: Floats, out: npt.NDArray[np.float64]) -> None:
    assert_type(comm.all_reduce(x, op="avg"), Floats)
    assert_type(comm.all_reduce(x, op=pycomm.premul_sum(0.5), async_op=False), Floats)
    assert_type(comm.all_reduce([x, x]), list[Floats])
    assert_type(comm.all_reduce(x, out=out), npt.NDArray[np.float64])
    assert_type(comm.reduce_scatter(x, counts=[1, 2]), Floats)
    assert_type(comm.broadcast([x], root=1), list[Floats])
    assert_type(comm.gather(x), Floats | None)
    assert_type(comm.scatter(out=x), Floats)
    assert_type(comm.recv(x, 1), Floats)
    assert_type(comm.send_recv(x, 1, out, 0), npt.NDArray[np.float64])
    comm.send(x, 1)
    comm.barrier()


def asynchronous(comm: pycomm.Communicator, x: Floats, later: bool) -> None:
    assert_type(comm.all_reduce(x, async_op=True), pycomm.Work)
    assert_type(comm.all_gather(x, out=x, async_op=True), pycomm.Work)
    assert_type(comm.barrier(async_op=True), pycomm.Work)
    assert_type(comm.all_reduce(x, async_op=later), Any)
    persistent: pycomm.PersistentOp = comm.all_reduce_init(x, op="max")
    persistent()


if TYPE_CHECKING:

    def wrong(comm: pycomm.Communicator, x: Floats) -> None:
        comm.all_reduce(x, op="mean")  # type: ignore[call-overload]
        comm.all_reduce(x, "sum")  # type: ignore[call-overload]
        comm.all_reduce_init(x, op="add")  # type: ignore[arg-type]
        comm.barrier(x)  # type: ignore[call-overload]
        pycomm.innit()  # type: ignore[attr-defined]
