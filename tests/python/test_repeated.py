"""Repeated calls are known and skip checks: everything that a call depends on may have changed since."""

import ctypes
import gc
import mmap
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import pycomm
from pycomm import Communicator
from pycomm.algorithm import Builder, World

Ranks = Callable[..., list[Any]]


def again(comm: Communicator, x: npt.NDArray[Any], **keywords: Any) -> None:
    """Repeats the call, so that it is known."""
    for _ in range(3):
        comm.all_reduce(x, **keywords)


def test_results_follow_the_contents(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        n, me = comm.size, comm.rank
        x, y = np.empty(6), np.empty(6)
        all_, part, both = np.empty(6 * n), np.empty(2), np.empty(6)
        for step in range(5):
            x[:] = me + step
            assert comm.all_reduce(x) is x
            assert (x == n * step + sum(range(n))).all()
            assert comm.all_reduce(x, out=y, op="max", timeout=30, tag="max", algorithm="one_shot") is y
            assert (y == x).all()
            x[:] = me + step
            assert comm.broadcast(x, root=1) is x
            assert (x == 1 + step).all()
            x[:] = me + step
            assert comm.reduce(x, out=y) is y
            if me == 0:
                assert (y == n * step + sum(range(n))).all()
            assert comm.all_gather(x, out=all_) is all_
            assert (all_.reshape(n, 6) == np.arange(n)[:, None] + step).all()
            assert comm.gather(x, out=all_) is (all_ if me == 0 else None)
            assert comm.reduce_scatter(x, out=part) is part
            assert (part == n * step + sum(range(n))).all()
            assert comm.scatter(x if me == 0 else None, out=part) is part
            assert (part == step).all()
            assert comm.all_to_all(x, out=both) is both
            assert (both.reshape(n, 2) == np.arange(n)[:, None] + step).all()
            assert comm.barrier() is None
            if me == 0:
                assert comm.send(x, 1) is None
                assert comm.send(x, dst=2) is None
            else:
                y[:] = 9
                assert comm.recv(y, 0) is y
                assert (y == step).all()

    ranks(fn, 3)


def test_several_calls_on_one_buffer(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = np.empty(4, np.int64)
        for _ in range(3):
            for op, expected in (("sum", 3), ("max", 2), ("min", 1), ("prod", 2), ("bor", 3)):
                x[:] = comm.rank + 1
                comm.all_reduce(x, op=op)
                assert (x == expected).all(), op
            for root in (0, 1):
                x[:] = comm.rank
                comm.broadcast(x, root=root)
                assert (x == root).all()

    ranks(fn, 2)


def test_another_shape_at_the_same_address(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        base, out = np.empty(8), np.empty(8)
        for count in (8, 4, 8, 1, 4):
            base[:] = comm.rank
            comm.all_reduce(base[:count])
            assert (base[:count] == 1).all()
            assert (base[count:] == comm.rank).all()
        for x in (base[:2], base[:4].reshape(2, 2), base[:2]):
            base[:] = 1
            comm.all_reduce(x)
            assert (x == 2).all()
        x = np.ones((2, 2))
        for _ in range(3):
            comm.all_gather(x, out=out.reshape(4, 2))
        with pytest.raises(ValueError, match="shape"):  # as many elements, in other rows
            comm.all_gather(x.reshape(1, 4), out=out.reshape(4, 2))
        with pytest.raises(ValueError, match="shape"):
            comm.all_gather(x, out=out.reshape(2, 4))
        comm.all_gather(x.reshape(1, 4), out=out.reshape(2, 4))

    ranks(fn, 2)


def test_resized_and_reshaped_in_place(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        out = np.empty(8)
        x = np.full(8, 1.0)
        again(comm, x)
        x.resize(4, refcheck=False)
        x[:] = 1
        comm.all_reduce(x)
        assert (x == 2).all()
        x.resize(1 << 20, refcheck=False)
        x[:] = 1
        comm.all_reduce(x)
        assert (x == 2).all()
        x = np.ones(4)
        comm.all_gather(x, out=out)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            x.shape = (2, 2)
        with pytest.raises(ValueError, match="shape"):
            comm.all_gather(x, out=out)

    ranks(fn, 2)


def test_another_type_at_the_same_address(ranks: Ranks) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")

    def fn(comm: Communicator) -> None:
        raw = np.empty(8, np.uint8)
        types = [np.float16, ml_dtypes.bfloat16, np.int16, np.uint8, ml_dtypes.float8_e4m3fn, np.int8,
                 ml_dtypes.float8_e5m2, np.float64, np.int64, np.float32, np.complex64]  # fmt: skip
        for _ in range(3):
            for dtype in types:
                x = raw.view(dtype)
                x[:] = comm.rank + 1
                comm.all_reduce(x)
                assert (x == 3).all(), dtype
        x = raw.view(np.float32)
        again(comm, x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            x.dtype = np.int32  # type: ignore[misc]
            x[:] = 1
            comm.all_reduce(x)
            assert (x == 2).all()
            x.dtype = np.dtype(">f4")  # type: ignore[misc]
        with pytest.raises(ValueError, match="byte-swapped"):
            comm.all_reduce(x)

    ranks(fn, 2)


def test_made_read_only(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x, out = np.ones(4), np.ones(4)
        again(comm, x)
        again(comm, x, out=out)
        out.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            comm.all_reduce(x, out=out)
        out.flags.writeable = True
        x.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            comm.all_reduce(x)
        comm.all_reduce(x, out=out)

    ranks(fn, 2)


def test_strided_at_the_same_address(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = np.ones(8)
        again(comm, x[:4])
        with pytest.raises(ValueError, match="contiguous"):
            comm.all_reduce(x[::2])

    ranks(fn, 2)


def test_another_out(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        base = np.empty(12)
        x = base[:4]
        for _ in range(3):
            for out in (base[4:8], x, base[8:], base[:4]):
                base[:] = 0
                x[:] = comm.rank + 1
                assert comm.all_reduce(x, out=out) is out
                assert (out == 3).all()
            with pytest.raises(ValueError, match="overlap"):
                comm.all_reduce(x, out=base[2:6])
            with pytest.raises(TypeError, match="float32"):
                comm.all_reduce(x, out=base[4:6].view(np.float32))

    ranks(fn, 2)


def test_returns_the_object_that_was_passed(ranks: Ranks) -> None:
    class Sub(np.ndarray):  # type: ignore[type-arg]
        pass

    def fn(comm: Communicator) -> None:
        base = np.ones(4)
        for _ in range(3):
            for x in (base, base.view(Sub), base.view(), base.reshape(4)):
                assert comm.all_reduce(x) is x
                assert comm.all_reduce(np.ones(4), out=x) is x
        made = [comm.all_gather(base) for _ in range(4)]
        assert len({array.ctypes.data for array in made}) == 4

    ranks(fn, 2)


def test_keywords_are_not_taken_for_others_that_lay_there_before() -> None:
    comm = pycomm.init()
    x = np.ones(4)
    for i in range(100):
        comm.all_reduce(x, timeout=float(30 + i))  # freed at once, so the next number may have its address
        with pytest.raises(ValueError, match="timeout"):
            comm.all_reduce(x, timeout=float(-1 - i))
        comm.all_reduce(x, op="".join(("s", "um")))
        with pytest.raises(ValueError, match="operator|op"):
            comm.all_reduce(x, op="".join(("s", "am")))


def test_more_keywords_than_can_be_known(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = np.empty(4)
        values = [("".join((head, tail)), n) for head, tail, n in (("s", "um", 3), ("m", "ax", 2)) * 1000]
        for _ in range(2):
            for op, expected in values:
                x[:] = comm.rank + 1
                comm.all_reduce(x, op=op)
                assert (x == expected).all()
                x[:] = comm.rank + 1
                comm.all_reduce(x)
                assert (x == 3).all()

    ranks(fn, 2)


def test_a_premul_sum_is_read_every_time(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = np.empty(4)
        factor = pycomm.premul_sum(0.5)
        for value in (0.5, 2.0, 3.0):
            object.__setattr__(factor, "factor", value)
            for _ in range(2):
                x[:] = 1
                comm.all_reduce(x, op=factor)
                assert (x == 2 * value).all()

    ranks(fn, 2)


def test_asynchronous_and_lists_between(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = np.empty(4)
        for _ in range(3):
            x[:] = 1
            comm.all_reduce(x, async_op=False)
            assert comm.all_reduce(x, async_op=True).result() is x
            comm.all_reduce([x])
            comm.all_reduce(x)
            assert (x == 16).all()

    ranks(fn, 2)


# ---- symmetric memory: where it lies ----

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
MAP_FIXED_NOREPLACE = 0x100000
COUNT = 1 << 16


def plain_at(address: int) -> npt.NDArray[np.float32]:
    """An ordinary array at this address."""
    got = libc.mmap(
        address, 4 * COUNT, mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0,
    )  # fmt: skip
    assert got == address, "somebody else is there"
    return np.ctypeslib.as_array((ctypes.c_float * COUNT).from_address(address))


def test_what_was_symmetric_is_plain(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = comm.empty(COUNT)
        address = x.ctypes.data
        x[:] = comm.rank + 1
        again(comm, x)
        del x
        gc.collect()
        comm.barrier()
        x = plain_at(address)
        x[:] = comm.rank + 1
        comm.all_reduce(x)
        assert (x == 3).all()
        libc.munmap(address, 4 * COUNT)

    ranks(fn, 2)


def test_what_was_plain_is_symmetric(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> bool:
        address = comm.empty(COUNT).ctypes.data
        gc.collect()
        comm.barrier()
        x = plain_at(address) if comm.rank == 0 else np.empty(COUNT, np.float32)
        again(comm, x)
        del x
        if comm.rank == 0:
            libc.munmap(address, 4 * COUNT)
        comm.barrier()
        x = comm.empty(COUNT)
        x[:] = comm.rank + 1
        comm.all_reduce(x)  # rank 1 calls it symmetric, and would not agree with a plain call
        assert (x == 3).all()
        return x.ctypes.data == address

    if not ranks(fn, 2)[0]:
        pytest.skip("it lies elsewhere")


# ---- algorithms ----


def test_an_algorithm_of_the_same_name_takes_the_place() -> None:
    def right(b: Builder, world: World) -> None:
        b.combine([b.out()], [b.in_()], final=True)

    def wrong(b: Builder, world: World) -> None:
        pass

    comm = pycomm.init()
    x, out = np.ones(4), np.empty(4)
    pycomm.Algorithm("replaced", "all_reduce", right)
    again(comm, x, out=out, algorithm="replaced")
    pycomm.Algorithm("replaced", "all_reduce", wrong)
    with pytest.raises(ValueError, match="is wrong"):
        comm.all_reduce(x, out=out, algorithm="replaced")


# ---- groups that have ended ----


def test_ended_groups(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = np.ones(4)
        again(comm, x)
        comm.barrier()
        comm.close()
        with pytest.raises(pycomm.AbortedError, match="closed"):
            comm.all_reduce(x)

    ranks(fn, 2)


def test_failed_groups() -> None:
    def fn(comm: Communicator) -> None:
        x = np.ones(4)
        again(comm, x)
        with pytest.raises(pycomm.MismatchError):
            comm.all_reduce(x if comm.rank else np.ones(5))
        with pytest.raises(pycomm.AbortedError):
            comm.all_reduce(x)

    pycomm.run_local(fn, 2)


def test_threads_that_call_at_once() -> None:
    """More calls than can be known: short ones, and ones that release the interpreter's lock."""
    comm = pycomm.init()
    errors: list[BaseException] = []

    def calls(seed: int) -> None:
        try:
            buffers = [
                (np.full(count, seed + i, np.float32), np.empty(count, np.float32))
                for i, count in enumerate([3, 20_000, 17] * 60)
            ]
            for _ in range(20):
                for x, out in buffers:
                    assert comm.all_reduce(x, out=out) is out
                    assert (out == x).all()
                    out[:] = -1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=calls, args=(1000 * seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# ---- what is kept alive ----


def test_no_buffer_is_kept_alive() -> None:
    class Sub(np.ndarray):  # type: ignore[type-arg]
        pass

    comm = pycomm.init()
    x, out = np.ones(4).view(Sub), np.ones(4).view(Sub)
    before = sys.getrefcount(x), sys.getrefcount(out), sys.getrefcount(x.dtype)
    again(comm, x)
    again(comm, x, out=out)
    assert before == (sys.getrefcount(x), sys.getrefcount(out), sys.getrefcount(x.dtype))
    gone = weakref.ref(x), weakref.ref(out)
    del x, out
    assert [ref() for ref in gone] == [None, None]


def test_keywords_are_let_go_with_the_group() -> None:
    comm = pycomm.init()
    tag = "".join(("a ", "tag"))
    before = sys.getrefcount(tag)
    for size in range(1, 100):
        again(comm, np.ones(size), tag=tag)
    comm.close()
    del comm
    gc.collect()
    assert sys.getrefcount(tag) == before


def test_threads_of_a_rank_lose_no_references() -> None:
    """A known call counts references to its result under the interpreter's lock, which others also take."""

    def fn(comm: Communicator) -> None:
        # Long enough to release the lock, short enough for many calls.
        x, y = np.ones(1 << 14, np.float32), np.empty(1 << 14, np.float32)
        into = np.empty_like(x)

        def call() -> None:
            for _ in range(3000):
                comm.all_reduce(x, out=y)
                comm.send_recv(x, 0, into, 0)

        before = sys.getrefcount(y), sys.getrefcount(into)
        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (sys.getrefcount(y), sys.getrefcount(into)) == before

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        pycomm.run_local(fn, 1)
    finally:
        sys.setswitchinterval(interval)
