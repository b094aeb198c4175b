"""Every collective, with every algorithm, for 1 to 5 ranks and counts of every kind, against NumPy.

Values are small integers, so that sums are exact in any order.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

import pycomm
from pycomm import Communicator, _native

SIZES = [1, 2, 3, 4, 5]
# Fewer rows than ranks, counts that do not divide, several trips of a window, several windows.
COUNTS = [0, 1, 2, 3, 7, 64, 1003, 70_001, 300_007]
UNEVEN = [[3, 0, 5, 1, 2], [0, 0, 1, 0, 0], [1000, 1, 999, 0, 77], [0] * 5]

Ranks = Callable[..., list[Any]]

pytestmark = pytest.mark.links
Array = np.ndarray[Any, Any]


def values(rank: int, *shape: int, dtype: Any = np.float32) -> Array:
    return integers(rank, shape).astype(dtype)


@lru_cache(256)
def integers(rank: int, shape: tuple[int, ...]) -> Array:
    return np.random.default_rng([rank, *shape]).integers(-8, 9, shape, np.int8)


@lru_cache(64)
def total(size: int, *shape: int) -> Array:
    return np.sum([integers(rank, shape) for rank in range(size)], axis=0, dtype=np.float32)


def algorithms(collective: str) -> list[str | None]:
    return [None, *_native.algorithms(collective)]


def same(got: Array, expected: Array, *context: object) -> None:
    assert got.shape == expected.shape, context
    assert np.array_equal(got, expected), context


def cases(collective: str, counts: list[int] = COUNTS) -> Iterator[tuple[int, str | None]]:
    for algorithm in algorithms(collective):
        for count in counts:
            yield count, algorithm


@pytest.mark.parametrize("size", SIZES)
def test_all_reduce(ranks: Ranks, size: int) -> None:
    def fn(comm: Communicator) -> None:
        for count, algorithm in cases("all_reduce"):
            x, expected = values(comm.rank, count), total(size, count)
            out = np.full_like(x, np.nan)
            assert comm.all_reduce(x, out=out, algorithm=algorithm) is out
            same(out, expected, algorithm, count)
            same(x, values(comm.rank, count), algorithm, count)
            assert comm.all_reduce(x, algorithm=algorithm) is x
            same(x, expected, algorithm, count)

    ranks(fn, size)


@pytest.mark.parametrize("size", SIZES)
def test_reduce_and_broadcast(ranks: Ranks, size: int) -> None:
    def fn(comm: Communicator) -> None:
        for root in range(size):
            for count, algorithm in cases("reduce", COUNTS if root == size - 1 else [3, 1003]):
                context = root, algorithm, count
                x, mine = values(comm.rank, count), values(comm.rank, count)
                out = np.full_like(x, -99)
                assert comm.reduce(x, root=root, out=out, algorithm=algorithm) is out
                same(out, total(size, count) if comm.rank == root else np.full_like(x, -99), *context)
                same(x, mine, *context)
                assert comm.reduce(x, root=root, algorithm=algorithm) is x
                same(x, total(size, count) if comm.rank == root else mine, *context)
            for count, algorithm in cases("broadcast", COUNTS if root == size - 1 else [3, 1003]):
                context = root, algorithm, count
                x = values(comm.rank, count)
                out = np.full_like(x, -99)
                assert comm.broadcast(x, root=root, out=out, algorithm=algorithm) is out
                same(out, values(root, count), *context)
                same(x, values(comm.rank, count), *context)
                assert comm.broadcast(x, root=root, algorithm=algorithm) is x
                same(x, values(root, count), *context)

    ranks(fn, size)


@pytest.mark.parametrize("size", SIZES)
def test_all_gather_and_gather(ranks: Ranks, size: int) -> None:
    def fn(comm: Communicator) -> None:
        me = comm.rank
        for rows, algorithm in cases("all_gather"):
            x = values(me, rows, 3)
            expected = np.concatenate([values(r, rows, 3) for r in range(size)])
            same(comm.all_gather(x, algorithm=algorithm), expected, algorithm, rows)
            out = np.full_like(expected, -99)
            assert comm.all_gather(x, out=out, algorithm=algorithm) is out
            same(out, expected, algorithm, rows)
            stacked = np.full((size, rows, 3), -99, np.float32)
            same(
                comm.all_gather(x, out=stacked, algorithm=algorithm),
                expected.reshape(size, rows, 3),
                algorithm,
                rows,
            )
            # In place: x is its own slot of out.
            out = np.full_like(expected, -99)
            slot = out[me * rows : (me + 1) * rows]
            slot[:] = x
            comm.all_gather(slot, out=out, algorithm=algorithm)
            same(out, expected, algorithm, rows)
        for uneven in UNEVEN:
            counts = uneven[:size]
            x = values(me, counts[me], 2)
            expected = np.concatenate([values(r, counts[r], 2) for r in range(size)])
            for algorithm in algorithms("all_gather"):
                same(comm.all_gather(x, counts=counts, algorithm=algorithm), expected, algorithm, counts)
                out = np.full_like(expected, -99)
                start = sum(counts[:me])
                out[start : start + counts[me]] = x
                slot = out[start : start + counts[me]]
                comm.all_gather(slot, out=out, counts=counts, algorithm=algorithm)
                same(out, expected, algorithm, counts)
            for root in range(size):
                got = comm.gather(x, root=root, counts=counts)
                assert (got is None) == (me != root)
                if got is not None:
                    same(got, expected, root, counts)
        for rows in COUNTS:
            for root in {0, size - 1}:
                x = values(me, rows)
                out = np.full(size * rows, -99, np.float32) if me == root else None
                got = comm.gather(x, root=root, out=out)
                assert got is out
                if out is not None:
                    same(out, np.concatenate([values(r, rows) for r in range(size)]), root, rows)

    ranks(fn, size)


@pytest.mark.parametrize("size", SIZES)
def test_reduce_scatter_and_scatter(ranks: Ranks, size: int) -> None:
    def fn(comm: Communicator) -> None:
        me = comm.rank
        for rows, algorithm in cases("reduce_scatter", [0, 1, 2, 7, 1003, 150_001]):
            x = values(me, size * rows, 2)
            expected = total(size, size * rows, 2)[me * rows : (me + 1) * rows]
            same(comm.reduce_scatter(x, algorithm=algorithm), expected, algorithm, rows)
            out = np.full_like(expected, -99)
            assert comm.reduce_scatter(x, out=out, algorithm=algorithm) is out
            same(out, expected, algorithm, rows)
            same(x, values(me, size * rows, 2), algorithm, rows)
            slot = x[me * rows : (me + 1) * rows]  # in place: out is its own part of x
            comm.reduce_scatter(x, out=slot, algorithm=algorithm)
            same(slot, expected, algorithm, rows)
        for uneven in UNEVEN:
            counts = uneven[:size]
            start, stop = sum(counts[:me]), sum(counts[: me + 1])
            x = values(me, sum(counts), 2)
            expected = total(size, sum(counts), 2)[start:stop]
            for algorithm in algorithms("reduce_scatter"):
                got = comm.reduce_scatter(x, counts=counts, algorithm=algorithm)
                same(got, expected, algorithm, counts)
            for root in range(size):
                whole = values(root, sum(counts), 2)
                out = np.full((counts[me], 2), -99, np.float32)
                comm.scatter(whole if me == root else None, root=root, out=out, counts=counts)
                same(out, whole[start:stop], root, counts)
        for rows in COUNTS:
            for root in {0, size - 1}:
                whole = values(root, size * rows)
                out = np.full(rows, -99, np.float32)
                assert comm.scatter(whole if me == root else None, root=root, out=out) is out
                same(out, whole[me * rows : (me + 1) * rows], root, rows)

    ranks(fn, size)


@pytest.mark.parametrize("size", SIZES)
def test_all_to_all(ranks: Ranks, size: int) -> None:
    def parts(source: int, counts: list[int]) -> list[Array]:
        x = values(source, sum(counts), 2)
        return np.split(x, np.cumsum(counts)[:-1])

    def fn(comm: Communicator) -> None:
        me = comm.rank
        for rows, algorithm in cases("all_to_all", [0, 1, 3, 1003, 100_003]):
            x = values(me, size * rows, 2)
            expected = np.concatenate([parts(r, [rows] * size)[me] for r in range(size)])
            same(comm.all_to_all(x, algorithm=algorithm), expected, algorithm, rows)
            out = np.full_like(x, -99)
            assert comm.all_to_all(x, out=out, algorithm=algorithm) is out
            same(out, expected, algorithm, rows)
            assert comm.all_to_all(x, out=x, algorithm=algorithm) is x
            same(x, expected, algorithm, rows)
        rng = np.random.default_rng(size)
        for most in (1, 4, 3000):
            table = rng.integers(0, most + 1, (size, size)).tolist()
            send, recv = table[me], [row[me] for row in table]
            expected = np.concatenate([parts(r, table[r])[me] for r in range(size)])
            x = np.concatenate(parts(me, send))
            with pytest.raises(ValueError, match="blocks of one length.*direct, pairwise"):
                comm.all_to_all(x, send_counts=send, recv_counts=recv, algorithm="hierarchical")
            for algorithm in set(algorithms("all_to_all")) - {"hierarchical"}:
                x = np.concatenate(parts(me, send))
                got = comm.all_to_all(x, send_counts=send, recv_counts=recv, algorithm=algorithm)
                same(got, expected, algorithm, table)

    ranks(fn, size)


@pytest.mark.parametrize("size", SIZES)
def test_sequences_of_different_calls_reuse_windows(ranks: Ranks, size: int) -> None:
    def fn(comm: Communicator) -> None:
        order = np.random.default_rng(size)  # the same on every rank
        for _ in range(400):
            kind, count, root = order.integers(5), int(order.integers(1, 3000)), int(order.integers(size))
            x = values(comm.rank, count)
            if kind == 0:
                same(comm.all_reduce(x), total(size, count))
            elif kind == 1:
                same(comm.broadcast(x, root=root), values(root, count))
            elif kind == 2:
                comm.reduce(x, root=root)
                if comm.rank == root:
                    same(x, total(size, count))
            elif kind == 3:
                comm.barrier()
            else:
                same(comm.all_gather(x), np.concatenate([values(r, count) for r in range(size)]))

    ranks(fn, size)


def test_a_list_is_one_call_for_each_type(ranks: Ranks) -> None:
    dtypes = [np.float32, np.int64, np.float32, np.float64, np.int64]
    shapes = [(3,), (2, 5), (), (0, 4), (1001,)]

    def fn(comm: Communicator) -> None:
        xs = [
            np.array(values(comm.rank, *shape, dtype=dtype))
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        expected = [
            np.sum([values(r, *shape, dtype=dtype) for r in range(comm.size)], axis=0).astype(dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        outs = [np.empty_like(x) for x in xs]
        assert comm.all_reduce(xs, out=outs) is outs
        for out, x, want, shape in zip(outs, xs, expected, shapes, strict=True):
            same(out, want)
            assert np.array_equal(x, values(comm.rank, *shape, dtype=x.dtype))
        for x, want in zip(comm.all_reduce(xs, async_op=True).wait(), expected, strict=True):
            same(x, want)
        assert comm.all_reduce([]) == []
        with pytest.raises(ValueError, match="1 buffers for 5"):
            comm.all_reduce(xs, out=[outs[0]])
        with pytest.raises(TypeError, match="one buffer"):
            comm.all_reduce_init(xs)
        comm.barrier()

    ranks(fn, 3)


@pytest.mark.parametrize("async_op", [False, True])
def test_large_items_of_a_list_lie_where_they_are(ranks: Ranks, async_op: bool) -> None:
    """They are separate calls, but if items share memory the result is that of one call."""

    def fn(comm: Communicator) -> None:
        def reduced(xs: list[np.ndarray], **more: Any) -> None:
            work = comm.all_reduce(xs, async_op=async_op, **more)
            if async_op:
                work.wait()

        total = comm.size * (comm.size + 1) // 2
        large = [np.full(100_000 + i, comm.rank + 1.0) for i in range(3)]
        small = [np.full(7, comm.rank + 1.0), np.full(50_000, comm.rank + 1, np.int64)]
        reduced([large[0], small[0], large[1], small[1], large[2]])
        assert all((x == total).all() for x in large + small)

        x = np.full(200_000, comm.rank + 1.0)
        outs = [np.zeros_like(x), np.zeros(100_000)]
        reduced([x, x[100_000:]], out=outs)
        assert all((out == total).all() for out in outs) and (x == comm.rank + 1).all()
        # The same memory twice, on only one rank: both results use the values from before the call.
        y = x.copy() if comm.rank else x
        reduced([x, y])
        assert (x == total).all() and (y == total).all()
        shared = np.full(300_000, comm.rank + 1.0)
        reduced([shared[:200_000], shared[100_000:].copy()], out=[shared[100_000:], np.empty(200_000)])
        assert (shared[100_000:] == total).all() and (shared[:100_000] == comm.rank + 1).all()

    ranks(fn, 3)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ([(6,), (2, 3)], [(2, 3), (6,)]),
        ([(6,), (2,)], [(8,)]),
        ([(2, 3)], [(3, 2)]),
        ([(1, n + 1) for n in range(60)], [(1, n + 1) for n in range(58)] + [(1, 60), (1, 59)]),
    ],
)
def test_lists_that_are_cut_differently(ranks: Ranks, mine: list[Any], theirs: list[Any]) -> None:
    """The totals are equal, so elements would be added across parameters."""

    def fn(comm: Communicator) -> str:
        shapes = mine if comm.rank == 0 else theirs
        with pytest.raises(pycomm.MismatchError) as caught:
            comm.all_reduce([np.ones(shape) for shape in shapes])
        return str(caught.value)

    for text in ranks(fn, 2):
        for shapes in (mine, theirs):
            assert f'"list of {len(shapes)}: ' + " ".join(map(str, shapes))[:150] in text


def test_lists_whose_types_are_in_another_order(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> str:
        dtypes = [np.float32, np.float64, np.float32] if comm.rank else [np.float32, np.float32, np.float64]
        with pytest.raises(pycomm.MismatchError) as caught:
            comm.all_reduce([np.ones(1, dtype) for dtype in dtypes])
        return str(caught.value)

    for text in ranks(fn, 2):
        assert "(1,) float64(1,) (1,)" in text and "(1,) (1,) float64(1,)" in text


def test_a_list_is_read_when_the_calls_before_it_are_over(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        for count in (3, 100_000):
            for last in (False, True):
                x = np.ones(count)
                first = comm.all_reduce(x, async_op=True)
                second = comm.all_reduce([x, np.ones(5, np.int32)], async_op=last)
                first.wait()
                if last:
                    second.wait()
                assert (x == comm.size**2).all()

    ranks(fn, 3)


def test_objects_that_were_not_made(ranks: Ranks) -> None:
    class Early(Communicator):
        def __init__(self, other: Communicator, use: Callable[[Any], Any]) -> None:
            use(self)
            super().__init__(other)

    def fn(comm: Communicator) -> None:
        uses: list[Callable[[Any], Any]] = [
            lambda c: c.rank,
            lambda c: c.barrier(),
            lambda c: c.all_reduce(np.ones(3)),
            lambda c: c.explain("all_reduce", 4),
        ]
        for use in uses:
            with pytest.raises(TypeError, match=r"__init__\(\) has not been called"):
                Early(comm, use)
        with pytest.raises(TypeError, match="has not been called"):
            pycomm.Work.__new__(pycomm.Work).wait()
        for word in ("one_shot\0", "\ud800"):
            with pytest.raises(ValueError, match="UTF-8"):
                comm.all_reduce(np.ones(3), algorithm=word)
        assert comm.all_reduce(np.ones(1))[0] == comm.size

    ranks(fn, 2)


def test_wrong_arguments_move_nothing(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = np.zeros(8, np.float32)
        wrong = [
            (TypeError, "needs `x`", lambda: comm.all_reduce()),
            (TypeError, "positional", lambda: comm.all_reduce(x, "sum")),
            (TypeError, "unexpected keyword argument 'root'", lambda: comm.all_reduce(x, root=0)),
            (TypeError, "unexpected keyword argument 'peer'", lambda: comm.send(x, peer=1 - comm.rank)),
            (TypeError, "unexpected keyword argument ''", lambda: comm.send(x, **{"": 1 - comm.rank})),
            (TypeError, "multiple values", lambda: comm.all_reduce(x, x=x)),
            (TypeError, "async_op", lambda: comm.all_reduce_init(x, async_op=True)),
            (ValueError, "'xor' is unknown.*bxor", lambda: comm.all_reduce(x, op="xor")),
            (TypeError, "premul_sum", lambda: comm.all_reduce(x, op=3)),
            (ValueError, '"rings".*ring', lambda: comm.all_reduce(x, algorithm="rings")),
            (TypeError, "pass a string", lambda: comm.all_reduce(x, algorithm=1)),
            (ValueError, "timeout", lambda: comm.all_reduce(x, timeout=0)),
            (ValueError, "timeout", lambda: comm.all_reduce(x, timeout=float("nan"))),
            (TypeError, "`timeout` is '1'", lambda: comm.all_reduce(x, timeout="1")),
            (ValueError, "stream", lambda: comm.all_reduce(x, stream=1)),
            (ValueError, "`root` is 3.*0 to 2", lambda: comm.broadcast(x, root=3)),
            (ValueError, "`root` is -1", lambda: comm.reduce(x, root=-1)),
            (TypeError, "pass an integer", lambda: comm.reduce(x, root=0.0)),
            (ValueError, r"\(8,\).*counts=", lambda: comm.reduce_scatter(x)),
            (ValueError, "counts=", lambda: comm.all_to_all(x)),
            (TypeError, "together", lambda: comm.all_to_all(x, send_counts=[1, 2, 5])),
            (ValueError, "2 entries for 3", lambda: comm.all_gather(x, counts=[8, 8])),
            (ValueError, "-1", lambda: comm.all_gather(x, counts=[8, 8, -1])),
            (ValueError, "gives 7", lambda: comm.all_gather(x, counts=[7, 7, 7])),
            (ValueError, "add up to 7", lambda: comm.reduce_scatter(x, counts=[1, 1, 5])),
            (ValueError, r"`out` has shape \(23,\)", lambda: comm.all_gather(x, out=np.zeros(23, "f"))),
            (ValueError, r"\(9,\)", lambda: comm.all_reduce(x, out=np.zeros(9, "f"))),
            (TypeError, "float64.*float32", lambda: comm.all_reduce(x, out=np.zeros(8))),
            (TypeError, "'dst'|`dst`", lambda: comm.send(x)),
            (ValueError, "itself", lambda: comm.send(x, comm.rank)),
            (ValueError, "`src` is 9", lambda: comm.recv(x, 9)),
        ]
        for kind, match, call in wrong:
            with pytest.raises(kind, match=match):
                call()
        x[:] = 1
        assert comm.all_reduce(x)[0] == 3

    ranks(fn, 3)


def test_explain_names_what_runs(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        text = comm.explain("all_reduce", 1000, "float32")
        assert "1000" in text and "float32" in text and "on 2 ranks" in text
        assert "ring" in comm.explain("all_reduce", 1000, algorithm="ring")
        blocks = comm.explain("all_to_all", 1000)  # the count of a block, as it was asked
        assert "all_to_all(count=1000," in blocks and "`in` of 2000 elements, `out` of 2000" in blocks
        tail = comm.explain("all_gather", 1_000_000).split("\n  trip")
        assert len(tail) == 3 and tail[1].startswith("s 0 to ")  # whole trips, then the last one
        with pytest.raises(ValueError, match="all_reduces"):
            comm.explain("all_reduces", 10)
        with pytest.raises(TypeError, match="bxor"):
            comm.explain("all_reduce", 10, op="bxor")

    ranks(fn, 2)


def test_help_shows_signatures() -> None:
    import inspect

    signature = inspect.signature(Communicator.all_reduce)
    assert list(signature.parameters)[:4] == ["self", "x", "op", "out"]
    assert signature.parameters["op"].default == "sum"
    assert "every rank gets the result" in (Communicator.all_reduce.__doc__ or "")


def test_an_algorithm_in_python(ranks: Ranks) -> None:
    def everything_at_zero(builder: Any, world: Any) -> None:
        """Wrong on purpose: only rank 0 gets the sum."""
        if builder.rank == 0:
            builder.combine([builder.out()], [builder.in_()], final=True)

    wrong = _native.verify("mine", "all_reduce", 2, 10, write=everything_at_zero)
    assert wrong and "rank" in wrong

    def fn(comm: Communicator) -> None:
        with pytest.raises(ValueError, match="taken"):
            _native.add_algorithm(comm, "all_reduce", "ring", everything_at_zero)
        _native.add_algorithm(comm, "all_reduce", "mine", everything_at_zero)
        x = np.ones(5, np.float32)
        with pytest.raises(ValueError, match="wrong"):
            comm.all_reduce(x, algorithm="mine")
        assert comm.all_reduce(x)[0] == 2

    ranks(fn, 2)
