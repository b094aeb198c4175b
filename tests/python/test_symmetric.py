"""Symmetric memory: comm.empty, its views, its end, and calls that mix it with plain buffers."""

import gc
import os
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import processes
import pytest

import pycomm
from pycomm import Communicator, _native

Ranks = Callable[..., list[Any]]


def test_shapes_and_types(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        for shape, expected in (
            (5, (5,)),
            ((2, 3), (2, 3)),
            ([4], (4,)),
            ((), ()),
            ((0, 7), (0, 7)),
            (np.int64(3), (3,)),
        ):
            for dtype in (
                "float32",
                np.int8,
                np.dtype("complex128"),
                ml_dtypes.bfloat16,
                "float8_e5m2",
                bool,
            ):
                x = comm.empty(shape, dtype)
                assert x.shape == expected and x.dtype == np.dtype(dtype)
                assert x.flags.c_contiguous and x.flags.writeable
                assert not x.view(np.uint8 if x.ndim else x.dtype).any()
        assert comm.empty(3).dtype == np.float32
        for kind, match, call in (
            (ValueError, "negative", lambda: comm.empty(-1)),
            (ValueError, "too large", lambda: comm.empty((1 << 40, 1 << 40))),
            (TypeError, "`shape` is '3'", lambda: comm.empty("3")),
            (TypeError, "`shape` is 1.5", lambda: comm.empty(1.5)),
            (TypeError, "float31", lambda: comm.empty(3, "float31")),
            (TypeError, "M8", lambda: comm.empty(3, "M8[s]")),
            (ValueError, '"cuda"', lambda: comm.empty(3, device="cuda")),
        ):  # fmt: skip
            with pytest.raises(kind, match=match):
                call()
        assert comm.all_reduce(np.ones(1)) == [2]

    ranks(fn, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_algorithm(ranks: Ranks, size: int) -> None:
    """Symmetric in and out, symmetric in with plain out, and the reverse; at an offset; in place."""

    def fn(comm: Communicator) -> None:
        me, n = comm.rank, comm.size
        pool = comm.empty(2 * n * 70_001 + 80_064)
        for algorithm in [None, *_native.algorithms("all_reduce")]:
            for count in (1, 1003, 70_001):
                start = 16 + count % 7
                a, b = pool[start : start + count], pool[80_000 : 80_000 + count]
                want = np.arange(count) % 5 * n + n * (n - 1) / 2
                for x, out in ((a, b), (a, np.empty(count, "f")), (np.empty(count, "f"), b), (a, a)):
                    x[:] = np.arange(count) % 5 + me
                    assert comm.all_reduce(x, out=out, algorithm=algorithm) is out
                    assert np.array_equal(out, want), (algorithm, count)
        for collective in ("all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce"):
            for algorithm in _native.algorithms(collective):
                for rows in (1, 501, 30_001):
                    whole, part = pool[: n * rows], pool[n * rows : (n + 1) * rows]
                    numbers = np.arange(n * rows, dtype=np.float32) % 11
                    context = collective, algorithm, rows
                    if collective == "all_gather":
                        part[:] = numbers[me * rows : (me + 1) * rows]
                        assert np.array_equal(
                            comm.all_gather(part, out=whole, algorithm=algorithm), numbers
                        ), context
                        got = comm.all_gather(part, algorithm=algorithm)
                        assert np.array_equal(got, numbers), context
                        whole[:] = -1
                        slot = whole[me * rows : (me + 1) * rows]
                        slot[:] = part
                        assert np.array_equal(
                            comm.all_gather(slot, out=whole, algorithm=algorithm), numbers
                        ), context
                    elif collective == "reduce_scatter":
                        want = n * numbers[me * rows : (me + 1) * rows]
                        for out in (part, np.empty(rows, np.float32), whole[me * rows : (me + 1) * rows]):
                            whole[:] = numbers
                            comm.reduce_scatter(whole, out=out, algorithm=algorithm)
                            assert np.array_equal(out, want), context
                    elif collective == "all_to_all":
                        whole[:] = np.repeat(np.arange(n) * 10 + me, rows)
                        got = comm.all_to_all(whole, algorithm=algorithm)
                        assert np.array_equal(got, np.repeat(np.arange(n) + 10 * me, rows)), context
                        assert np.array_equal(comm.all_to_all(whole, out=whole, algorithm=algorithm), got), (
                            context
                        )
                    else:
                        for root in (0, n - 1):
                            part[:] = me + 1
                            getattr(comm, collective)(part, root=root, algorithm=algorithm)
                            want = root + 1 if collective == "broadcast" else n * (n + 1) / 2
                            if collective == "broadcast" or me == root:
                                assert (part == want).all(), context
                            else:
                                assert (part == me + 1).all(), context

    ranks(fn, size)


def test_different_places_are_a_mismatch(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = comm.empty(1000)
        start = 128 * comm.rank
        with pytest.raises(pycomm.MismatchError, match="rank .*rank ") as caught:
            comm.all_reduce(x[start : start + 10])
        text = str(caught.value)
        assert "offset" in text and "symmetric" in text, text

    ranks(fn, 2)


def test_symmetric_on_one_rank_only_is_a_mismatch(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = comm.empty(1000)
        with pytest.raises(pycomm.MismatchError, match="symmetric"):
            comm.all_reduce(x if comm.rank == 0 else np.zeros(1000, np.float32))

    ranks(fn, 2)


def test_different_sizes_leave_the_group_usable(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        with pytest.raises(ValueError, match="rank . asked for .0 bytes, rank . for .0"):
            comm.empty(10 * (1 + comm.rank))
        assert comm.all_reduce(np.ones(1)) == [2]

    ranks(fn, 2)


def test_memory_that_is_not_there(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        for _ in range(2):
            with pytest.raises(MemoryError) as caught:
                comm.empty(1 << 50, np.uint8)
            assert "bytes" in str(caught.value)
        x = comm.empty(100)
        x[:] = 1
        assert (comm.all_reduce(x) == 3).all()

    ranks(fn, 3)


def test_freed_memory_is_given_back(ranks: Ranks) -> None:
    """The last rank to release it gives it back, without a call of the others."""

    def fn(comm: Communicator) -> None:
        comm.barrier()
        before, size = processes.shared_bytes(), 32 << 20
        comm.barrier()
        for _ in range(3):
            x = comm.empty(size, np.uint8)
            assert x[0] == 0 and x[-1] == 0
            x[:] = 1
            comm.barrier()
            assert processes.shared_bytes() >= before + 2 * size
            comm.barrier()
            if comm.rank == 0:
                del x
            comm.barrier()
            assert processes.shared_bytes() >= before + 2 * size
            comm.barrier()
            if comm.rank == 1:
                del x
            comm.barrier()
            assert processes.shared_bytes() < before + size
            comm.barrier()

    ranks(fn, 2)


def test_memory_lives_as_long_as_its_last_view(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = comm.empty((8, 100))
        x[:] = comm.rank + 1
        row = x[3, 10:20]
        del x
        gc.collect()
        others = [comm.empty((8, 100)) for _ in range(4)]
        for other in others:
            other[:] = 99
        assert (row == comm.rank + 1).all()
        assert (comm.all_reduce(row) == 3).all()
        comm.close()
        row[:] = 5  # after the group's end as well
        assert (row == 5).all()

    ranks(fn, 2)


def test_reshaped_views_are_symmetric_too(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = comm.empty((6, 4), np.float32)
        for view in (x, x.reshape(24), x[2:4], x.view(np.int32), x.ravel()[5:9], x[1:, :].reshape(-1)):
            view[...] = comm.rank + 1
            assert (comm.all_reduce(view) == 3).all()
        with pytest.raises(ValueError, match="contiguous"):
            comm.all_reduce(x[:, 1])

    ranks(fn, 2)


def test_nothing_is_left_in_dev_shm(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> list[str]:
        x = comm.empty(1 << 20)
        comm.all_reduce(x)
        return sorted(os.listdir("/dev/shm"))

    before = sorted(os.listdir("/dev/shm"))
    for listing in ranks(fn, 2):
        assert not [name for name in listing if "pycomm" in name]
    assert not [name for name in os.listdir("/dev/shm") if "pycomm" in name and name not in before]


def test_empty_blocks_may_lie_anywhere(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        me, n = comm.rank, comm.size
        for counts in ([0, 5, 3], [4, 0, 0], [0, 0, 0]):
            counts, offset = counts[:n], sum(counts[:me])
            mine = slice(offset, offset + counts[me])
            out = comm.empty(sum(counts), "float32")
            want = np.concatenate([np.full(c, r + 1, np.float32) for r, c in enumerate(counts)])
            out[mine] = me + 1
            comm.all_gather(out[mine], out=out, counts=counts)
            assert np.array_equal(out, want)
            for own in (np.empty(counts[me], np.float32), comm.empty(8)[: counts[me]]):
                own[:] = me + 1
                out[:] = 0
                comm.barrier()
                comm.all_gather(own, out=out, counts=counts)
                assert np.array_equal(out, want)
            comm.barrier()
            out[:] = 1
            comm.reduce_scatter(out, out=out[mine], counts=counts)
            assert (out[mine] == n).all()

    ranks(fn, 3)


def test_an_output_that_only_the_root_has(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = comm.empty(1000)
        for count in (3, 1000):
            for y in (np.empty(count, "f"), comm.empty(1000)[:count], None):
                x[:count] = comm.rank + 1
                comm.barrier()
                got = (
                    comm.reduce(x[:count], root=1, out=y)
                    if comm.rank == 1
                    else comm.reduce(x[:count], root=1)
                )
                if comm.rank == 1:
                    assert (got == 6).all()
                comm.barrier()

    ranks(fn, 3)
