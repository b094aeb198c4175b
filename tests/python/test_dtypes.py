"""Every operator on every type, bit by bit, against NumPy.

The expectation of a deterministic call is exact: the balanced binary tree over ranks, in the type's
accumulator (float32 for the 16- and 8-bit floats), rounded once to nearest even by ml_dtypes.
"""

import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pycomm
from pycomm import Communicator, _native

Ranks = Callable[..., list[Any]]

pytestmark = pytest.mark.links
Array = np.ndarray[Any, Any]

SMALL_FLOATS = [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
FLOATS = [np.float32, np.float64, *SMALL_FLOATS]
INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]
COMPLEX = [np.complex64, np.complex128]
DTYPES = [np.dtype(t) for t in [*FLOATS, *INTEGERS, np.bool_, *COMPLEX]]
OPS = ["sum", "prod", "min", "max", "avg", "band", "bor", "bxor"]
COUNT = 4099


def test_no_type_is_left_out() -> None:
    assert {dtype.name for dtype in DTYPES} == set(_native.DTYPES)


def makes_sense(dtype: np.dtype[Any], op: str) -> bool:
    if dtype.type in FLOATS:
        return op in ("sum", "prod", "min", "max", "avg")
    if dtype.type in INTEGERS:
        return op != "avg"
    if dtype.type in COMPLEX:
        return op in ("sum", "prod", "avg")
    return op in ("min", "max", "band", "bor", "bxor")


def values(rank: int, dtype: np.dtype[Any], count: int = COUNT) -> Array:
    rng = np.random.default_rng([rank, dtype.num, count])
    if dtype.type in INTEGERS:
        return np.frombuffer(rng.bytes(count * dtype.itemsize), dtype).copy()  # sums and products wrap
    if dtype == np.bool_:
        return rng.integers(0, 2, count).astype(dtype)
    if dtype.type in COMPLEX:
        return (rng.normal(size=count) + 1j * rng.normal(size=count)).astype(dtype)
    return rng.normal(scale=4, size=count).astype(dtype)


def balanced(parts: list[Array], combine: Callable[[Array, Array], Array]) -> Array:
    """tree(0, k) = tree(0, p) op tree(p, k), with p the largest power of two below k."""
    if len(parts) == 1:
        return parts[0]
    p = 1 << (len(parts) - 1).bit_length() - 1
    return combine(balanced(parts[:p], combine), balanced(parts[p:], combine))


def multiply(a: Array, b: Array) -> Array:
    if not np.iscomplexobj(a):
        return a * b
    product = np.empty_like(a)  # explicit: NumPy's own may fuse multiply and add
    product.real = a.real * b.real - a.imag * b.imag
    product.imag = a.real * b.imag + a.imag * b.real
    return product


# Types whose accumulator may overflow in a sum.
AVERAGES_SCALED = (np.float32, np.float64, ml_dtypes.bfloat16, np.complex64, np.complex128)

COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "sum": np.add,
    "avg": np.add,
    "prod": multiply,
    "min": np.minimum,
    "max": np.maximum,
    "band": np.bitwise_and,
    "bor": np.bitwise_or,
    "bxor": np.bitwise_xor,
}


def expectation(parts: list[Array], op: str, factor: float = 1) -> Array:
    dtype = parts[0].dtype
    accumulator = np.dtype(np.float32) if dtype.type in SMALL_FLOATS else dtype
    with np.errstate(all="ignore"):
        wide = [part.astype(accumulator) for part in parts]
        if op == "avg" and dtype.type in AVERAGES_SCALED:
            factor = 0.5 ** (len(parts) - 1).bit_length()
        if factor != 1:
            wide = [part * accumulator.type(factor) for part in wide]
        result = balanced(wide, COMBINE[op])
        if op == "avg":
            divisor = result.real.dtype.type(len(parts) * factor)
            if np.iscomplexobj(result):
                result = result.copy()
                result.real /= divisor
                result.imag /= divisor
            else:
                result = result / divisor
        return result.astype(dtype)


def bits(x: Array) -> Array:
    return np.ascontiguousarray(x).view(np.uint8).reshape(*x.shape, -1)


def same_bits(got: Array, expected: Array, *context: object) -> None:
    assert got.dtype == expected.dtype, context
    differ = (bits(got) != bits(expected)).any(axis=-1)  # all NaNs count as equal here
    wrong = np.flatnonzero(differ & ~(np.isnan(got) & np.isnan(expected)))
    assert wrong.size == 0, (*context, wrong[:5], got[wrong[:5]], expected[wrong[:5]])


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_operator_on_every_type(ranks: Ranks, size: int) -> None:
    def fn(comm: Communicator) -> None:
        for dtype in DTYPES:
            parts = [values(rank, dtype) for rank in range(size)]
            for op in OPS:
                if not makes_sense(dtype, op):
                    continue
                expected = expectation(parts, op)
                got = comm.all_reduce(parts[comm.rank].copy(), op=op, deterministic=True)
                same_bits(got, expected, dtype, op, "all_reduce")
                got = comm.reduce(parts[comm.rank].copy(), op=op, deterministic=True, root=size - 1)
                if comm.rank == size - 1:
                    same_bits(got, expected, dtype, op, "reduce")
                rows = COUNT // size
                part = slice(comm.rank * rows, (comm.rank + 1) * rows)
                x = parts[comm.rank][: rows * size].copy()
                got = comm.reduce_scatter(x, op=op, deterministic=True)
                same_bits(got, expected[part], dtype, op, "reduce_scatter")

    ranks(fn, size)


def test_every_algorithm_on_every_type(ranks: Ranks) -> None:
    """Every order of summation is within rounding of the float64 sum, and all ranks have the same bits."""

    def fn(comm: Communicator) -> None:
        for dtype in DTYPES:
            if not makes_sense(dtype, "sum"):
                continue
            parts = [values(rank, dtype) for rank in range(comm.size)]
            exact_type = np.complex128 if dtype.type in COMPLEX else np.float64
            exact = sum(part.astype(exact_type) for part in parts)
            for algorithm in _native.algorithms("all_reduce"):
                got = comm.all_reduce(parts[comm.rank].copy(), algorithm=algorithm)
                context = dtype, algorithm
                if dtype.type in INTEGERS:
                    same_bits(got, expectation(parts, "sum"), *context)
                else:
                    info = ml_dtypes.finfo(dtype)
                    # One rounding of the result, and those of partial sums, which have at least float32
                    # precision.
                    slack = sum(abs(part.astype(exact_type)) for part in parts) * 2.0**-21
                    if dtype.itemsize >= 8 and dtype.type is not np.complex64:
                        slack = slack * 2.0**-29
                    bound = np.abs(exact) * float(info.eps) / 2 + slack + float(info.smallest_subnormal)
                    assert (np.abs(got.astype(exact_type) - exact) <= bound).all(), context
                everyones = comm.all_gather(bits(got).ravel(), out=None).reshape(comm.size, -1)
                assert (everyones == everyones[0]).all(), context

    ranks(fn, 4)


def test_the_bits_do_not_depend_on_algorithm_size_or_place(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        for dtype in [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]:
            parts = [values(rank, dtype, 300_000) for rank in range(comm.size)]
            expected = expectation(parts, "sum")
            x = parts[comm.rank]
            for algorithm in ["one_shot", "two_shot", "recursive_doubling", "halving_doubling", None]:
                for part in [slice(0, 1), slice(3, 600), slice(1000, 9001), slice(0, 300_000)]:
                    got = comm.all_reduce(x[part].copy(), algorithm=algorithm, deterministic=True)
                    same_bits(got, expected[part], algorithm, part)
            pieces = comm.all_reduce([x[:7].copy(), x[7:2000].copy()], deterministic=True)
            same_bits(np.concatenate(pieces), expected[:2000], "coalesced")
            for algorithm in ["ring", "tree"]:
                with pytest.raises(ValueError, match=rf'"{algorithm}".*balanced'):
                    comm.all_reduce(x.copy(), algorithm=algorithm, deterministic=True)
            with pytest.raises(ValueError, match='"ring"'):
                comm.reduce_scatter(
                    x, counts=[300_000, *[0] * (comm.size - 1)], algorithm="ring", deterministic=True
                )
            got = comm.all_reduce(x.copy(), algorithm="ring")
            again = comm.all_reduce(x.copy(), algorithm="ring")
            same_bits(got, again, "a call repeated")

    for size in [2, 3, 4, 5]:
        ranks(fn, size)


def test_pairs_that_make_no_sense_move_nothing(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        for dtype in DTYPES:
            x = np.zeros(4, dtype)
            for op in OPS:
                if makes_sense(dtype, op):
                    continue
                for call in (comm.all_reduce, comm.reduce, comm.reduce_scatter, comm.all_reduce_init):
                    with pytest.raises(TypeError, match=f"'{op}' makes no sense on {dtype.name}"):
                        call(x, op=op)
                with pytest.raises(TypeError, match=op):
                    comm.all_reduce(x, op=op, async_op=True)
                first = np.ones(1, np.float32)
                with pytest.raises(TypeError, match=op):
                    comm.all_reduce([first, x], op=op)
                assert first == [1]
            if dtype.type in INTEGERS:
                with pytest.raises(TypeError, match="premul_sum"):
                    comm.all_reduce(x, op=pycomm.premul_sum(0.5))
        assert comm.all_reduce(np.ones(1))[0] == comm.size

    ranks(fn, 2)


@pytest.mark.parametrize("size", [2, 3])
def test_premul_sum(ranks: Ranks, size: int) -> None:
    def fn(comm: Communicator) -> None:
        for dtype in DTYPES:
            if dtype.type not in FLOATS + COMPLEX:
                continue
            parts = [values(rank, dtype) for rank in range(size)]
            op = pycomm.premul_sum(0.3)
            got = comm.all_reduce(parts[comm.rank].copy(), op=op, deterministic=True)
            if dtype.type in COMPLEX:
                scaled = [part.copy() for part in parts]
                for part in scaled:
                    part.real *= part.real.dtype.type(0.3)
                    part.imag *= part.imag.dtype.type(0.3)
                same_bits(got, expectation(scaled, "sum"), dtype)
            else:
                same_bits(got, expectation(parts, "sum", 0.3), dtype)
            for algorithm in _native.algorithms("all_reduce"):
                ones = comm.all_reduce(np.ones(999, dtype), op=pycomm.premul_sum(0.5), algorithm=algorithm)
                assert (ones == np.asarray(size / 2).astype(dtype)).all(), (dtype, algorithm)

    ranks(fn, size)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_an_average_does_not_overflow_on_the_way(ranks: Ranks, size: int) -> None:
    """And if the sum does not overflow, the average equals the sum divided by the ranks, to the last bit."""

    def fn(comm: Communicator) -> None:
        for dtype in AVERAGES_SCALED:
            largest = np.array(ml_dtypes.finfo(dtype).max).astype(dtype)
            for count in (2, 1000, 100_000):
                x = np.full(count, largest)
                x[::2] *= np.array(-1, dtype) if comm.rank == 0 else np.array(1, dtype)
                for algorithm in _native.algorithms("all_reduce"):
                    mean = comm.all_reduce(x.copy(), op="avg", algorithm=algorithm)
                    expected = np.array([size - 2, size]) / size
                    relative = mean.astype(np.complex128) / np.float64(largest.real)
                    assert np.allclose(relative.reshape(-1, 2), expected, rtol=2**-7), (dtype, algorithm)
                    small = np.full(count, comm.rank + 1, dtype)
                    total = comm.all_reduce(small.copy(), algorithm=algorithm)
                    mean = comm.all_reduce(small, op="avg", algorithm=algorithm)
                    same_bits(mean, total / np.array(size, dtype), dtype, algorithm)

    ranks(fn, size)


def test_one_rank_scales_and_averages(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        x = values(0, np.dtype(np.float32))
        same_bits(comm.all_reduce(x.copy(), op="avg"), x)
        same_bits(comm.all_reduce(x.copy(), op=pycomm.premul_sum(0.5)), x * np.float32(0.5))
        out = np.empty_like(x)
        same_bits(comm.all_reduce(x, op=pycomm.premul_sum(3), out=out), x * np.float32(3))

    ranks(fn, 1)


def test_nan_and_signed_zero(ranks: Ranks) -> None:
    nan, inf = np.nan, np.inf
    at = [  # the values of three ranks, minimum, maximum
        ([1, nan, -1], nan, nan),
        ([nan, 1, 2], nan, nan),
        ([1, 2, nan], nan, nan),
        ([-inf, inf, nan], nan, nan),
        ([-inf, inf, 0], -inf, inf),
        ([0.0, -0.0, 0.0], -0.0, 0.0),
        ([-0.0, 0.0, -0.0], -0.0, 0.0),
        ([-0.0, -0.0, -0.0], -0.0, -0.0),
    ]

    def fn(comm: Communicator) -> None:
        for dtype in map(np.dtype, FLOATS):
            with np.errstate(all="ignore"):
                column = np.array([values[comm.rank] for values, _, _ in at]).astype(dtype)
            if dtype == ml_dtypes.float8_e4m3fn:  # has no infinity
                column = np.where(np.arange(len(at)) == 4, dtype.type(1), column).astype(dtype)
            for algorithm in _native.algorithms("all_reduce"):
                for op, index in (("min", 1), ("max", 2)):
                    got = comm.all_reduce(np.tile(column, 70), op=op, algorithm=algorithm).astype(np.float64)
                    want = np.tile(np.array([row[index] for row in at], np.float64), 70)
                    if dtype == ml_dtypes.float8_e4m3fn:
                        want[4::8] = got[4::8]
                    assert np.array_equal(got, want, equal_nan=True), (dtype, op, algorithm)
                    numbers = ~np.isnan(want)
                    assert (np.signbit(got) == np.signbit(want))[numbers].all(), (dtype, op, algorithm)
                canonical = comm.all_reduce(np.tile(column, 70), algorithm=algorithm)
                everyones = comm.all_gather(bits(canonical).ravel()).reshape(comm.size, -1)
                assert (everyones == everyones[0]).all(), (dtype, algorithm)

    ranks(fn, 3)


def test_overflow_follows_the_format(ranks: Ranks) -> None:
    expected = {
        np.float16: np.inf,
        ml_dtypes.bfloat16: np.inf,
        ml_dtypes.float8_e5m2: np.inf,
        ml_dtypes.float8_e4m3fn: np.nan,
        np.float32: np.inf,
        np.float64: np.inf,
    }

    def fn(comm: Communicator) -> None:
        for kind, want in expected.items():
            most = ml_dtypes.finfo(kind).max
            x = np.full(33, most, kind)
            got = comm.all_reduce(x).astype(np.float64)
            assert np.array_equal(got, np.full(33, want), equal_nan=True), kind
            # A value that does not overflow in the accumulator is exact up to one rounding.
            x = np.full(33, most if comm.rank < 1 else -most if comm.rank < 2 else 1, kind)
            if kind in SMALL_FLOATS[:1] + SMALL_FLOATS[2:]:
                assert (comm.all_reduce(x, deterministic=True) == np.asarray(1).astype(kind)).all(), kind

    ranks(fn, 3)


def test_sums_round_once(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        for kind in SMALL_FLOATS:
            eps = float(ml_dtypes.finfo(kind).eps)
            # 1 + eps/4 four times: rounded at every hop it would stay 1.
            x = np.full(257, 1 if comm.rank == 0 else eps / 4).astype(kind)
            for algorithm in _native.algorithms("all_reduce"):
                got = comm.all_reduce(x.copy(), algorithm=algorithm).astype(np.float64)
                assert (got == 1 + eps).all(), (kind, algorithm, got[0])

    ranks(fn, 5)


def test_small_stacks(ranks: Ranks) -> None:
    """Reductions with a scale, many sources or a codec run in threads with stacks of 128 KiB (as in musl)."""

    def fn(comm: Communicator) -> None:
        x, y = np.full(3000, 2.0, np.float32), np.full(3000, 2.0, np.float32)

        def reduce() -> None:
            comm.all_reduce(x, op=pycomm.premul_sum(0.5))
            comm.all_reduce(y, codec="fp16")

        thread = threading.Thread(target=reduce)
        thread.start()
        thread.join()
        assert (x == comm.size).all() and (y == 2 * comm.size).all()

    before = threading.stack_size(128 << 10)  # of threads created from now on
    try:
        ranks(fn, 3)
    finally:
        threading.stack_size(before)


def test_the_bits_do_not_depend_on_the_factor_before() -> None:
    def run(comm: pycomm.Communicator) -> list[bytes]:
        factors = (0.0, -0.0) if comm.size == 2 else (-0.0, 0.0)
        return [comm.all_reduce(np.ones(4, np.float32), op=pycomm.premul_sum(f)).tobytes() for f in factors]

    assert len({bits for size in (2, 3) for each in pycomm.run_local(run, size) for bits in each}) == 1
