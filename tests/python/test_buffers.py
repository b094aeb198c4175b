"""Which buffers are accepted, and which are refused, with a remedy, before anything moves."""

import array
import ctypes
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pycomm
from pycomm import Communicator, _native

Ranks = Callable[..., list[Any]]


class OnlyDLPack:
    """An array of some other framework that offers only DLPack."""

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
    """Writes rows of a matrix, at odd addresses, and nothing else."""

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
        buffers[1].extend(b"more")  # nobody exports its buffer any more

    ranks(fn, 2)


def test_formats_of_the_buffer_protocol() -> None:
    """The sizes are those of the format: native or, with = and <, standard."""
    known = {
        "b": "int8", "B": "uint8", "c": "uint8", "h": "int16", "H": "uint16", "i": "int32", "I": "uint32",
        "l": "int64", "L": "uint64", "q": "int64", "Q": "uint64", "n": "int64", "N": "uint64", "?": "bool",
        "e": "float16", "f": "float32", "d": "float64",
    }  # fmt: skip
    for code in "bBchHiIlLqQnNfd?":
        for prefix in ("", "@"):
            view = memoryview(bytearray(16)).cast(prefix + code)
            found = _native.describe_buffer(view, "x")
            assert (found.dtype, found.shape) == (known[code], (16 // view.itemsize,))
    for letters, name in (
        ("<f4", "float32"),
        ("<c8", "complex64"),
        ("<c16", "complex128"),
        ("<f2", "float16"),
    ):
        view = memoryview(np.zeros(3, letters))
        found = _native.describe_buffer(view, "x")
        assert (found.dtype, found.shape) == (name, (3,))
    odd = np.zeros(17, np.uint8)[1:]
    for name in ("int64", "uint16", "float64", "complex128", "longlong"):
        view = memoryview(odd.view(name))
        assert _native.describe_buffer(view, "x").dtype == np.dtype(name).name, view.format
    for kind in (
        ctypes.c_long,
        ctypes.c_short,
        ctypes.c_ubyte,
        ctypes.c_bool,
        ctypes.c_char,
        ctypes.c_size_t,
    ):
        size = ctypes.sizeof(kind)
        found = _native.describe_buffer((kind * 3)(), "x")
        assert found.shape == (3,) and np.dtype(found.dtype).itemsize == size

    class Pair(ctypes.Structure):
        _fields_ = [("a", ctypes.c_int32), ("b", ctypes.c_float)]

    for bad in (
        (ctypes.c_longdouble * 2)(),
        (ctypes.c_wchar * 2)(),
        (ctypes.c_void_p * 2)(),
        (ctypes.POINTER(ctypes.c_int) * 2)(),
        (Pair * 2)(),
        memoryview(np.zeros(2, np.longdouble)),
        memoryview(np.zeros(2, "S4")),
        memoryview(np.zeros(2, "S0")),
        memoryview(np.zeros(2, "V8")),
        memoryview(np.zeros(2, "U1")),
        memoryview(np.zeros(2, object)),
        memoryview(np.zeros(2, "i4,f4")),
        memoryview(bytearray(8)).cast("P"),
    ):
        with pytest.raises(
            TypeError, match="`x` has the buffer format .* bytes, which cannot be communicated"
        ):
            _native.describe_buffer(bad, "x")
    for letters in (">i4", ">f8", ">c8", ">u2"):
        with pytest.raises(ValueError, match="byte-swapped"):
            _native.describe_buffer(memoryview(np.zeros(2, letters)), "x")
    assert _native.describe_buffer((ctypes.c_int32 * 2)(), "x").dtype == "int32"
    with pytest.raises(ValueError, match="byte-swapped"):
        _native.describe_buffer((ctypes.c_int32.__ctype_be__ * 2)(), "x")
    with pytest.raises(TypeError, match="byte-swapped: pass"):
        _native.packable_dtype(np.dtype(">f4"))


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_masks_are_not_ignored(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        plain = np.ma.masked_array(np.full(3, comm.rank + 1.0))
        for _ in range(2):
            assert comm.all_reduce(plain).mask is np.ma.nomask
        masked = np.ma.masked_array(np.ones(3), [True, False, False])
        calls: list[Callable[[], Any]] = [
            lambda: comm.all_reduce(masked),
            lambda: comm.all_reduce(np.ones(3), out=masked),
            lambda: comm.all_reduce([masked]),
            lambda: comm.all_reduce_init(masked),
            lambda: comm.all_reduce(masked.astype(np.float32), codec="int8"),
            lambda: comm.send(masked, 1 - comm.rank),
            lambda: pycomm.Bucket([masked.astype(np.float32)]),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=r"has a mask, which would be ignored: pass x.filled\(0\)"):
                call()
        plain[1] = np.ma.masked  # the same array, which the call site knows
        with pytest.raises(ValueError, match="has a mask"):
            comm.all_reduce(plain)
        assert comm.all_reduce(masked.data).tolist() == [2, 2, 2]
        assert comm.all_reduce(np.asmatrix(np.ones((2, 2)))).tolist() == [[2, 2], [2, 2]]

    ranks(fn, 2)


def test_an_array_becomes_read_only(ranks: Ranks, tmp_path: Path) -> None:
    def fn(comm: Communicator) -> None:
        x, y = np.ones(4), np.ones(4)
        for _ in range(3):
            comm.all_reduce(x)
            comm.all_reduce(y, out=x)
        op = comm.all_reduce_init(x)
        x.flags.writeable = False
        for call in (lambda: comm.all_reduce(x), lambda: comm.all_reduce(y, out=x), op):
            with pytest.raises(ValueError, match="read-only"):
                call()
        path = tmp_path / str(comm.rank)
        np.ones(4).tofile(path)
        with pytest.raises(ValueError, match="read-only"):
            comm.all_reduce(np.memmap(path, mode="r"))
        x.flags.writeable = True
        op()

    ranks(fn, 2)


def test_memory_stays_while_a_call_is_under_way(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        gate = comm.split(0, comm.rank)
        count = 1 << 14
        x, y, listed = np.ones(count), np.ones(count), np.ones(count)
        data, numbers = bytearray([1]) * count, array.array("d", [1.0]) * count
        mapped = mmap.mmap(-1, count)
        gradient = np.ones(count, np.float32)
        if comm.rank == 1:
            gate.barrier()
        works = [
            comm.all_reduce(x, async_op=True),
            comm.all_reduce(x, out=y, async_op=True),
            comm.all_reduce([listed], async_op=True),
            comm.all_reduce(data, async_op=True),
            comm.all_reduce([numbers], async_op=True),
            comm.all_reduce(mapped, async_op=True),
            comm.all_reduce(gradient, codec="int8", async_op=True),
        ]
        if comm.rank == 0:
            assert not any(work.is_completed() for work in works)
            for a in (x, y, listed, gradient):
                with pytest.raises(ValueError, match="cannot resize"):
                    a.resize(1 << 20, refcheck=False)
            for held in (data, numbers):
                with pytest.raises(BufferError):
                    held.extend(held)
            with pytest.raises(BufferError):
                mapped.close()
            gate.barrier()
        for work in works:
            work.wait()
        assert (y == 4).all() and (listed == 2).all() and data == bytearray([2]) * count
        del works, work
        x.resize(8, refcheck=False)
        data.extend(b"more")
        mapped.close()

    ranks(fn, 2)


def test_a_bound_call_whose_array_has_changed(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x, data = np.ones(4), bytearray(8)
        op, of_bytes = comm.all_reduce_init(x), comm.all_reduce_init(data)
        with pytest.raises(ValueError, match="cannot resize"):
            x.resize(1 << 16, refcheck=False)
        with pytest.raises(BufferError):
            data.extend(b"more")
        assert op() is x and of_bytes() is data
        x.dtype = np.int64
        with pytest.raises(
            ValueError, match=r"`x` had 4 elements of float64 .* 4 elements of int64 now: bind"
        ):
            op()
        moved = OnlyDLPack(np.ones(4))
        op = comm.all_reduce_init(moved)
        assert op() is moved and moved.x[0] == 2
        moved.x = np.ones(4)
        with pytest.raises(ValueError, match="in other memory now"):
            op()

    ranks(fn, 2)
