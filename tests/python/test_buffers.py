"""What may be communicated, and what is refused with a remedy before anything moves."""

import array
import ctypes
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pycomm import Communicator

Ranks = Callable[..., list[Any]]


class OnlyDLPack:
    """An array of some other framework, which offers nothing but DLPack."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.x.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()


def test_everything_that_holds_numbers(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        me = comm.rank
        holders: list[Any] = [
            np.full((2, 3), me + 1.0),
            bytearray([me + 1] * 5),
            memoryview(bytearray([me + 1] * 5)),
            memoryview(np.full((2, 2), me + 1, np.int16)),
            array.array("d", [me + 1] * 4),
            array.array("l", [me + 1] * 4),
            (ctypes.c_float * 3)(*[me + 1] * 3),
            OnlyDLPack(np.full(7, me + 1, np.int32)),
            np.full(9, me + 1).view(np.ndarray),
            np.ma.masked_array(np.full(3, me + 1.0)),
            np.full(3, me + 1, ml_dtypes.bfloat16),
            np.full(3, me + 1, ml_dtypes.float8_e4m3fn),
            np.array(me + 1.0),
            np.full((1, 1, 1), me + 1, np.complex64),
            np.full((4, 1), me + 1.0)[:, :1],
            np.full(4, me + 1, "<f4"),
            np.full(4, me + 1, np.longlong),
            np.full(4, me + 1, np.ulonglong),
        ]
        for x in holders:
            assert comm.all_reduce(x) is x
            got = np.asarray(x.x if isinstance(x, OnlyDLPack) else x)
            assert (got == 3).all(), type(x)
        assert comm.all_gather(bytearray(b"ab")).tolist() == list(b"abab")
        assert comm.all_gather(np.full(2, me, ml_dtypes.bfloat16)).dtype == ml_dtypes.bfloat16
        scalar = np.array(me + 1, np.float32)
        assert comm.all_gather(scalar).tolist() == [1, 2]
        assert comm.all_reduce(scalar).shape == ()
        empty = np.empty((0, 5))
        assert comm.all_reduce(empty) is empty
        assert comm.all_gather(empty).shape == (0, 5)

    ranks(fn, 2)


def test_a_part_of_an_array(ranks: Ranks) -> None:
    """Rows of a matrix, at odd addresses, and nothing beside them."""

    def fn(comm: Communicator) -> None:
        whole = np.full((7, 13), comm.rank + 1, np.float64)
        comm.all_reduce(whole[2:5])
        assert (whole[2:5] == 3).all()
        assert (whole[:2] == comm.rank + 1).all() and (whole[5:] == comm.rank + 1).all()
        odd = np.zeros(8 * 101 + 1, np.uint8)[1:].view(np.float64)  # not aligned
        odd[:] = comm.rank + 1
        out = np.zeros(8 * 101 + 3, np.uint8)[3:].view(np.float64)
        assert (comm.all_reduce(odd, out=out) == 3).all()
        assert (comm.all_reduce(odd) == 3).all()

    ranks(fn, 2)


def test_buffers_that_are_refused(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = np.ones((4, 6), np.float32)
        read_only = np.ones(4)
        read_only.flags.writeable = False
        out = np.zeros((4, 6), np.float32)
        strided = [x[:, ::2], x.T, x[::-1], np.asfortranarray(x), memoryview(x)[::2], OnlyDLPack(x[:, :3])]
        for bad in strided:
            with pytest.raises(ValueError, match="not contiguous.*pass .* and copy the result back"):
                comm.all_reduce(bad)
        with pytest.raises(ValueError, match="`out` is not contiguous"):
            comm.all_reduce(x, out=np.zeros((4, 12), np.float32)[:, ::2])
        for swapped in (np.ones(4, ">f4"), np.ones(4, ">i8"), memoryview(np.ones(4, ">i4"))):
            with pytest.raises((ValueError, TypeError), match="byte-swapped|format"):
                comm.all_reduce(swapped)
        for bad in (read_only, b"bytes", memoryview(b"bytes")):
            with pytest.raises(ValueError, match="read-only.*pass out="):
                comm.all_reduce(bad)
        with pytest.raises(ValueError, match="`out` is read-only"):
            comm.all_reduce(np.ones(4), out=read_only)
        with pytest.raises(ValueError, match="read-only"):
            comm.recv(read_only, 1 - comm.rank)
        for bad, word in (
            (np.array(["a"]), "dtype <U1"),
            (np.array([object()]), "object"),
            (np.ones(2, "f4,i4"), "dtype"),
            (np.ones(2, "M8[s]"), "datetime"),
            (np.ones(2, np.longdouble), "longdouble|float128"),
            (np.ones(2, ml_dtypes.int4), "int4"),
            (array.array("u", "ab"), "format"),
        ):
            with pytest.raises(TypeError, match=word):
                comm.all_reduce(bad)
        for bad in (3, 2.5, "text", {1: 2}, object()):
            with pytest.raises(TypeError, match=f"`x` is (a {type(bad).__name__}|{bad}, a number): pass"):
                comm.all_reduce(bad)
        flat = np.ones(10, np.float32)
        for a, b in ((flat[:6], flat[2:8]), (flat[1:], flat[:9]), (flat[:4], flat[3:7])):
            with pytest.raises(ValueError, match="overlap in part"):
                comm.all_reduce(a, out=b)
        with pytest.raises(ValueError, match="overlap in part"):
            comm.all_gather(flat[(1 - comm.rank) * 3 :][:3], out=flat[:6])  # another rank's slot
        with pytest.raises(ValueError, match="overlap in part"):
            comm.reduce_scatter(flat[:6], out=flat[2:5])
        with pytest.raises(ValueError, match=r"\(6, 4\)|\(23,\)|shape"):
            comm.all_reduce(x, out=np.zeros(23, np.float32))
        for wrong in (np.zeros((8, 5), np.float32), np.zeros(48, np.float32), np.zeros((2, 24), np.float32)):
            with pytest.raises(ValueError, match="where .* is needed"):
                comm.all_gather(x, out=wrong)
        with pytest.raises(TypeError, match="`out` is int32 where `x` is float32"):
            comm.all_reduce(x, out=out.view(np.int32))
        assert (comm.all_reduce(x, out=out) == 2).all()
        assert (x == 1).all()

    ranks(fn, 2)


def test_read_only_may_be_read(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = np.frombuffer(bytes([1, 2, 3]), np.uint8)
        assert comm.all_reduce(x, out=np.zeros(3, np.uint8)).tolist() == [2, 4, 6]
        assert comm.all_reduce(b"\1\2", out=bytearray(2)) == b"\2\4"
        assert comm.all_gather(x).tolist() == [1, 2, 3] * 2
        assert comm.broadcast(b"root" if comm.rank == 0 else bytearray(4)) == b"root"
        received = bytearray(4)
        if comm.rank == 0:
            comm.send(b"data", 1)
        else:
            assert comm.recv(received, 0) == b"data"
        total = comm.reduce(x, out=np.zeros(3, np.uint8)) if comm.rank == 0 else comm.reduce(x)
        assert total.tolist() == ([2, 4, 6] if comm.rank == 0 else [1, 2, 3])

    ranks(fn, 2)


def test_stacked_shapes(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = np.full((2, 3), comm.rank)
        stacked = comm.all_gather(x, out=np.zeros((2, 2, 3), x.dtype))
        assert (stacked[0] == 0).all() and (stacked[1] == 1).all()
        whole = np.stack([np.zeros(5), np.ones(5)])
        got = comm.reduce_scatter(whole, out=np.full(5, -1.0))
        assert (got == 2 * comm.rank).all()
        assert comm.reduce_scatter(whole).shape == (1, 5)

    ranks(fn, 2)


def test_references_are_returned(ranks: Ranks) -> None:
    import sys

    def fn(comm: Communicator) -> None:
        buffers = [np.ones(9), bytearray(8), OnlyDLPack(np.ones(9))]
        for x in buffers:
            before = sys.getrefcount(x), sys.getrefcount(getattr(x, "x", x))
            for _ in range(50):
                comm.all_reduce(x)
                comm.all_reduce(x, out=x, async_op=True).wait()
                comm.all_reduce_init(x)()
                with pytest.raises(TypeError):
                    comm.all_reduce(x, op=1)
            assert (sys.getrefcount(x), sys.getrefcount(getattr(x, "x", x))) == before, type(x)
        buffers[1].extend(b"more")  # nobody holds its buffer any more

    ranks(fn, 2)
