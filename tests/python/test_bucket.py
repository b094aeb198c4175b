"""Buckets against NumPy in float64, and the arguments that they refuse."""

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pycomm
from pycomm import Bucket, Communicator, _native
from pycomm.bench import shapes
from pycomm.bucket import segment_ids

Ranks = Callable[..., list[Any]]
Array = np.ndarray[Any, Any]

DTYPES = [
    np.dtype(t)
    for t in (
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
    )
]
NAN = {
    "float32": 0x7FC00000,
    "float16": 0x7E00,
    "bfloat16": 0x7FC0,
    "float8_e4m3fn": 0x7F,
    "float8_e5m2": 0x7E,
}
ISAS = _native.available_isas()


def codes(x: Array) -> Array:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def any_bits(dtype: np.dtype[Any], count: int, seed: int) -> Array:
    return np.frombuffer(np.random.default_rng(seed).bytes(count * dtype.itemsize), dtype).copy()


def ordinary(dtype: np.dtype[Any], count: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(count) * 2.0 ** rng.integers(-6, 4, count)).astype(dtype)


def scaled(x: Array, scale: float) -> Array:
    """The float32 values before rounding to the bucket's type; their products are exact in float64."""
    with np.errstate(all="ignore"):
        return (x.astype(np.float64) * np.float64(np.float32(scale))).astype(np.float32)


def cast(x: Array, dtype: np.dtype[Any], scale: float) -> Array:
    if x.dtype == dtype and scale == 1:
        return x
    with np.errstate(all="ignore"):
        result = scaled(x, scale).astype(dtype)
    bits = codes(result)
    bits[np.isnan(result.astype(np.float32))] = NAN[dtype.name]
    return bits.view(dtype)


def same_bits(got: Array, want: Array) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    wrong = np.flatnonzero(codes(got).ravel() != codes(want).ravel())
    assert wrong.size == 0, (wrong[:5], got.ravel()[wrong[:5]], want.ravel()[wrong[:5]])


def check_stats(stats: pycomm.Stats, inputs: list[Array], outputs: list[Array], scale: float) -> None:
    values = np.concatenate([scaled(x, scale).ravel() for x in inputs]).astype(np.float64)
    values = np.abs(values[~np.isnan(values)])
    written = np.concatenate([y.astype(np.float32).ravel() for y in outputs])
    assert stats.nans == np.isnan(written).sum()
    assert stats.infs == np.isinf(written).sum()
    assert stats.max_abs == values.max(initial=0)
    assert stats.finite == bool(np.isfinite(written).all())
    want = math.fsum(values * values) if np.isfinite(values).all() else math.inf
    assert stats.sum_squares == pytest.approx(want, rel=1e-13)
    assert stats.norm == pytest.approx(math.sqrt(want), rel=1e-13)


@pytest.mark.parametrize(("source", "target"), [*itertools.product(DTYPES, DTYPES)], ids=str)
def test_every_pair_of_types(source: np.dtype[Any], target: np.dtype[Any]) -> None:
    inputs = [any_bits(source, 4099, 1), np.zeros((0, 3), source), ordinary(source, 1000, 2).reshape(10, 100)]
    for scale in (1.0, 0.37, -300.0):
        tensors = [x.copy() for x in inputs]
        bucket = Bucket(tensors, target)
        stats = bucket.pack(scale)
        want = [cast(x, target, scale) for x in inputs]
        for view, expected in zip(bucket.views, want, strict=True):
            same_bits(view, expected)
        check_stats(stats, inputs, want, scale)
        back = bucket.unpack(1 / scale)
        returned = [cast(x, source, 1 / scale) for x in want]
        for x, expected in zip(tensors, returned, strict=True):
            same_bits(x, expected)
        check_stats(back, want, returned, 1 / scale)


@settings(max_examples=60)
@given(data=st.data())
def test_any_list_of_tensors(data: st.DataObject) -> None:
    """Random lengths, alignments, types, scales and instruction sets."""
    count = st.integers(0, 4099) | st.sampled_from([0, 1, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 2048])
    lengths = data.draw(st.lists(count, min_size=1, max_size=9))
    target = data.draw(st.sampled_from(DTYPES))
    scale = data.draw(
        st.sampled_from([1.0, 0.5, 1e-3, -0.0]) | st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
    inputs, tensors = [], []
    for i, length in enumerate(lengths):
        dtype = data.draw(st.sampled_from(DTYPES))
        make = data.draw(st.sampled_from([any_bits, ordinary]))
        misplaced = data.draw(st.integers(0, 63))
        memory = np.zeros(length * dtype.itemsize + misplaced, np.uint8)
        tensor = memory[misplaced:].view(dtype)
        tensor[:] = make(dtype, length, i)
        tensors.append(tensor)
        inputs.append(tensor.copy())
    bucket = Bucket(tensors, target)
    packing = _native.Packing(bucket.data, [segment.begin for segment in bucket.segments], lengths)
    want = [cast(x, target, scale) for x in inputs]
    found = set()
    for isa in ISAS:
        codes(bucket.data)[:] = 0
        found.add(packing.pack(tensors, scale, isa=isa))
        for view, expected in zip(bucket.views, want, strict=True):
            same_bits(view, expected)
        rest = codes(bucket.data).copy()
        for segment in bucket.segments:
            rest[segment.begin : segment.end] = 0
        assert not rest.any()  # the gaps stay zero
    assert len({repr(stats) for stats in found}) == 1
    check_stats(bucket.pack(scale), inputs, want, scale)
    returned = [cast(y, x.dtype, scale) for x, y in zip(inputs, want, strict=True)]
    found = set()
    for isa in ISAS:
        found.add(repr(packing.unpack(tensors, scale, isa=isa)))
        for x, expected in zip(tensors, returned, strict=True):
            same_bits(x, expected)
    assert len(found) == 1


def test_special_values() -> None:
    special = np.array(
        [
            0.0,
            -0.0,
            np.inf,
            -np.inf,
            np.nan,
            1e-45,
            -1e-40,
            65504,
            65520,
            3.4e38,
            448,
            464,
            465,
            2**-24,
            2**-25,
        ],
        np.float32,
    )
    payload = np.array([0x7FC00001, 0xFFC12345, 0x7F800001], np.uint32).view(np.float32)
    x = np.concatenate([special, payload])
    for dtype in DTYPES:
        bucket = Bucket([x], dtype)
        stats = bucket.pack()
        same_bits(bucket.views[0], cast(x, dtype, 1))
        check_stats(stats, [x], [bucket.views[0]], 1)
    assert codes(Bucket([x]).data).size == 256


@pytest.mark.parametrize("model", shapes.MODELS)
def test_the_workloads_are_the_models(model: str) -> None:
    """Counts their parameters independently, from the papers."""
    found = shapes.parameters(model)
    if model == "resnet50":
        total, tensors, width = 64 * 3 * 49 + 2 * 64, 3, 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            inner = 64 << stage
            outer = 4 * inner
            for block in range(blocks):
                total += inner * width + 9 * inner * inner + outer * inner + 2 * (inner + inner + outer)
                tensors += 9
                if block == 0:
                    total += outer * width + 2 * outer
                    tensors += 3
                width = outer
        total += 1000 * 2048 + 1000
        tensors += 2
        assert (tensors, round(total / 1e6, 1)) == (161, 25.6)
    else:
        d, layers = 768, 12
        total = (50257 + 1024) * d + layers * (12 * d * d + 13 * d) + 2 * d
        tensors = 2 + 12 * layers + 2
        assert (tensors, round(total / 1e6)) == (148, 124)
    assert len(found) == tensors
    assert sum(parameter.count for parameter in found) == total
    assert len({parameter.name for parameter in found}) == tensors


def test_a_model_goes_through() -> None:
    parameters = shapes.parameters("resnet50")
    rng = np.random.default_rng(0)
    tensors = [rng.standard_normal(p.shape, np.float32) for p in parameters]
    bucket = Bucket(tensors, "bfloat16", names=[p.name for p in parameters])
    stats = bucket.pack(0.125)
    copies = [x.copy() for x in tensors]
    for x, view in zip(tensors, bucket.views, strict=True):
        same_bits(view, cast(x, view.dtype, 0.125))
    check_stats(stats, tensors, list(bucket.views), 0.125)
    bucket.unpack(8)
    for x, before in zip(tensors, copies, strict=True):
        assert np.allclose(x, before, rtol=2**-8, atol=0)


def test_layout() -> None:
    bucket = Bucket([np.ones(256, "f"), np.ones(257, "f"), np.ones(0, "f"), np.ones((), "f")])
    assert [(s.begin, s.end) for s in bucket.segments] == [(0, 256), (256, 513), (768, 768), (768, 769)]
    assert bucket.data.shape == (1024,) and bucket.data.ctypes.data % 64 == 0
    assert bucket.names == ("0", "1", "2", "3")
    assert [view.shape for view in bucket.views] == [(256,), (257,), (0,), ()]
    assert all(np.shares_memory(view, bucket.data) for view in bucket.views if view.size)
    assert len(bucket) == 4
    assert not bucket.data.any()
    bucket.pack()
    assert bucket.data.sum() == 256 + 257 + 1


def test_ids_depend_on_names_alone() -> None:
    names = [p.name for p in shapes.parameters("gpt2_small")]
    ids = segment_ids(names)
    assert len(set(ids)) == len(ids) and all(0 <= i < 1 << 24 for i in ids)
    alone = [segment_ids([name])[0] for name in names]
    assert alone == ids  # none of these collide
    assert segment_ids(names[::-1]) == ids[::-1]
    assert segment_ids(["wte.weight"]) == [int.from_bytes(_blake(b"wte.weight"), "big") >> 40]


def _blake(name: bytes) -> bytes:
    import hashlib

    return hashlib.blake2b(name, digest_size=8).digest()


def test_ids_that_collide_are_told_apart() -> None:
    seen: dict[int, str] = {}
    for i in itertools.count():  # a colliding pair is found after some thousands
        first = seen.setdefault(segment_ids([str(i)])[0], str(i))
        if first != str(i):
            break
    one, other = segment_ids([first, str(i)])
    assert other == (one + 1) % (1 << 24)
    assert segment_ids([str(i), first]) == [one, other]


def test_tensors_that_are_their_views() -> None:
    inputs = [ordinary(np.dtype(np.float32), n, n) for n in (700, 3)]
    bucket = Bucket(inputs)
    first = bucket.pack()
    bucket.tensors = bucket.views
    assert bucket.pack() == first == bucket.unpack()
    for x, view in zip(inputs, bucket.views, strict=True):
        same_bits(view, x)
    bucket.pack(2)
    for x, view in zip(inputs, bucket.views, strict=True):
        same_bits(view, 2 * x)
    with pytest.raises(ValueError, match=r"tensors\[1\].*not where its view is"):
        _native.Packing(bucket.data, [0, 768], [700, 3]).pack([inputs[0], bucket.data[:3]])
    with pytest.raises(ValueError, match=r"tensors\[0\].*shape \(3,\)"):
        bucket.tensors = bucket.views[::-1]
    with pytest.raises(ValueError, match="1 tensors where the bucket has 2"):
        bucket.tensors = bucket.views[:1]


def test_what_is_refused() -> None:
    f, h = np.ones(3, "f"), np.ones(3, np.float16)
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (TypeError, "float32, float16: .* dtype=", lambda: Bucket([f, h])),
        (ValueError, "empty: .* dtype=", lambda: Bucket([])),
        (TypeError, r"`tensors\[1\]` is int32: buckets hold float32", lambda: Bucket([f, np.ones(3, "i4")])),
        (TypeError, r"`tensors\[0\]` is float64", lambda: Bucket([np.ones(3)])),
        (TypeError, "`dtype` is int8", lambda: Bucket([f], "int8")),
        (TypeError, "float31", lambda: Bucket([f], "float31")),
        (ValueError, r"`tensors\[0\]` is not contiguous", lambda: Bucket([np.ones((4, 4), "f").T])),
        (TypeError, r"`tensors\[0\]` is a str", lambda: Bucket(["x"])),
        (TypeError, "pass a list", lambda: Bucket(f)),
        (ValueError, "2 names for 1", lambda: Bucket([f], names=["a", "b"])),
        (ValueError, "'a' twice", lambda: Bucket([f, f], names=["a", "a"])),
        (TypeError, "names are strings", lambda: Bucket([f], names=[1])),  # type: ignore[list-item]
        (TypeError, "pass a list of strings", lambda: Bucket([f], names="a")),
        (ValueError, "`scale` is inf", lambda: Bucket([f]).pack(math.inf)),
        (ValueError, "`scale` is 1e\\+39", lambda: Bucket([f]).unpack(1e39)),
        (TypeError, "`scale` is '2': pass a number", lambda: Bucket([f]).pack("2")),  # type: ignore[arg-type]
        (TypeError, "`scale` is None", lambda: Bucket([f]).unpack(None)),  # type: ignore[arg-type]
        (TypeError, r"`scale` is an array of shape \(3,\)", lambda: Bucket([f]).pack(f)),  # type: ignore[arg-type]
        (TypeError, "`tensors` is a int: pass a list", lambda: Bucket(3)),  # type: ignore[arg-type]
        (TypeError, "`names` is a int: pass a list", lambda: Bucket([f], names=5)),  # type: ignore[arg-type]
        (ValueError, "surrogate", lambda: Bucket([f], names=["\ud800"])),
        (TypeError, "cannot be copied", lambda: copy.deepcopy(Bucket([f]))),
        (TypeError, "`comm` is a int", lambda: Bucket([f], comm=3)),  # type: ignore[arg-type]
        (ValueError, "overlap", lambda: Bucket([f, f[1:]]).unpack()),
    ]
    for kind, match, call in cases:
        with pytest.raises(kind, match=match):
            call()
    frozen = f.copy()
    frozen.flags.writeable = False
    bucket = Bucket([f, frozen])
    bucket.pack()
    f[:] = 7
    with pytest.raises(ValueError, match=r"`tensors\[1\]` is read-only"):
        bucket.unpack()
    assert (f == 7).all()  # nothing has moved
    bucket = Bucket([f])
    f.resize(5, refcheck=False)
    with pytest.raises(ValueError, match="5 elements where the bucket has 3"):
        bucket.pack()
    assert Bucket([], "float16").pack() == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="avx3"):
        _native.Packing(bucket.data, [], []).pack([], isa="avx3")
    with pytest.raises(ValueError, match=r"tensors\[1\]` does not fit a bucket of 256 elements at 255"):
        _native.Packing(bucket.data, [0, 255], [2, 2])
    with pytest.raises(ValueError, match="1 tensors for 0 places"):
        _native.Packing(bucket.data, [], []).pack([f])


@pytest.mark.parametrize("symmetric", [False, True])
def test_collectives_take_buckets(ranks: Ranks, symmetric: bool) -> None:
    def fn(comm: Communicator) -> None:
        tensors = [np.full(1000, comm.rank + 1, "f"), np.full((3, 5), 2 * comm.rank, "f"), np.zeros(0, "f")]
        bucket = Bucket(tensors, "bfloat16", comm if symmetric else None)
        stats = bucket.pack(0.5)
        assert stats.max_abs == max(comm.rank, (comm.rank + 1) / 2)
        assert comm.all_reduce(bucket) is bucket
        bucket.unpack(2)
        n = comm.size
        assert (tensors[0] == n * (n + 1) / 2).all() and (tensors[1] == n * (n - 1)).all()
        work = comm.all_reduce(bucket, op="avg", async_op=True)
        assert work.result() is bucket
        assert comm.broadcast(bucket, root=1) is bucket
        part = comm.reduce_scatter(bucket.data[: 256 * n])
        assert part.size == 256
        if symmetric and comm.num_nodes == 1:  # the group recognises it by that
            with pytest.raises(pycomm.MismatchError, match="symmetric"):
                comm.all_reduce(bucket if comm.rank == 0 else np.zeros_like(bucket.data))

    ranks(fn, 2)


@pytest.mark.parametrize("codec", [None, "int8", "topk"])
def test_ranks_with_other_names_or_shapes_do_not_reduce(codec: str | None) -> None:
    def fn(comm: Communicator, what: str) -> None:
        names = ["a", "b"] if what == "names" and comm.rank else ["b", "a"]
        shapes = [(2, 6), (4, 3)] if what == "shapes" and comm.rank else [(4, 3), (2, 6)]
        bucket = Bucket([np.ones(shape, "f") for shape in shapes], names=names)
        comm.all_reduce(bucket, codec=codec, tag="step 3")
        comm.barrier()

    pycomm.run_local(partial(fn, what="nothing"), 2)
    for what in ("names", "shapes"):
        with pytest.raises(pycomm.MismatchError, match="step 3, bucket of 2"):
            pycomm.run_local(partial(fn, what=what), 2)


@pytest.mark.parametrize("codec", [None, "int8"])
def test_a_mismatch_names_the_first_tensor_that_differs(codec: str | None) -> None:
    def fn(comm: Communicator, shapes: list[tuple[int, ...]], at: int, other: tuple[int, ...]) -> str:
        shapes = [*shapes[:at], other, *shapes[at + 1 :]] if comm.rank else shapes
        bucket = Bucket(
            [np.ones(shape, "f") for shape in shapes], names=[f"w{i}" for i in range(len(shapes))]
        )
        with pytest.raises(pycomm.MismatchError) as caught:
            comm.all_reduce(bucket, codec=codec)
        return str(caught.value).partition("The first tensor that differs is ")[2]

    for text in pycomm.run_local(partial(fn, shapes=[(2, 6), (4, 3)], at=1, other=(3, 4)), 2):
        assert text.startswith("`tensors[1]`: 'w1' (") and "'w1' (4, 3) on rank 0" in text
        assert "'w1' (3, 4) on rank 1" in text
    texts = pycomm.run_local(partial(fn, shapes=[(4, 3)] * 100, at=57, other=(3, 4)), 2)
    for text, shape in zip(texts, ("(4, 3)", "(3, 4)"), strict=True):
        assert text == f"`tensors[57]`: 'w57' {shape} on this rank."
    texts = pycomm.run_local(partial(fn, shapes=[(4, 3)] * 300, at=299, other=(3, 4)), 2)
    for text, shape in zip(texts, ("(4, 3)", "(3, 4)"), strict=True):
        assert text.startswith("in `tensors[297:300]`: ") and text.endswith(f"'w299' {shape} on this rank.")


def test_symmetric_buckets_of_different_sizes(ranks: Ranks) -> None:
    def fn(comm: Communicator) -> None:
        with pytest.raises(
            ValueError, match=r"tensors\[0\]` is '0' of shape \(300,\) on rank 0 and '0' of.*600"
        ):
            Bucket([np.zeros(300 * (comm.rank + 1), "f")], comm=comm)
        assert comm.all_reduce(np.ones(1)) == [2]

    ranks(fn, 2)


def test_symmetric_buckets_that_differ_name_the_first_tensor_that_does(ranks: Ranks) -> None:
    """All ranks raise the same error, and the group stays usable."""

    def fn(comm: Communicator) -> list[str]:
        a, b = np.zeros((4, 3), "f"), np.zeros((2, 6), "f")
        odd = comm.rank == 2
        messages = []
        for names, tensors, dtype in (
            (["a", "b", "c"] if odd else ["a", "c", "b"], [a, a, a], None),
            (["a", "b"], [a, b if odd else a], None),
            (["a"] if odd else ["a", "b"], [a] if odd else [a, b], None),
            (["a"], [a], "float16" if odd else "bfloat16"),
        ):
            with pytest.raises(ValueError) as error:
                Bucket(tensors, dtype, comm, names)
            messages.append(str(error.value).partition(":")[0])
        assert comm.all_reduce(np.ones(1)) == [comm.size]
        return messages

    assert ranks(fn, 3) == 3 * [
        [
            "`tensors[1]` is 'c' of shape (4, 3) on rank 0 and 'b' of shape (4, 3) on rank 2",
            "`tensors[1]` is 'b' of shape (4, 3) on rank 0 and 'b' of shape (2, 6) on rank 2",
            "`tensors[1]` is 'b' of shape (2, 6) on rank 0 and no tensor on rank 2",
            "the bucket is a buffer of bfloat16 on rank 0 and a buffer of float16 on rank 2",
        ]
    ]


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (None, r"is None: no gradient\? Leave out"),
        (0.25, r"is 0.25, a number: .*all_reduce\(np.array\(\[loss\]\), op=\"avg\"\)"),
        (np.float32(3), ".*3.*, a number"),
        (ml_dtypes.bfloat16(3), ".*3, a number"),
        (True, "is True, a number"),
    ],
)
def test_what_is_no_buffer(x: Any, words: str) -> None:
    def fn(comm: Communicator) -> None:
        array = np.ones(3, "f")
        bucket = Bucket([array, array.copy()])
        with pytest.raises(TypeError, match=r"`tensors\[1\]` " + words):
            Bucket([array, x])
        with pytest.raises(TypeError, match=r"`tensors\[1\]` " + words):
            bucket.tensors = [array, x]
        with pytest.raises(TypeError, match=r"`x\[1\]` " + words):
            comm.all_reduce([array, x], codec="bf16")
        with pytest.raises(TypeError, match=r"`out\[1\]` " + words):
            comm.all_reduce([array, array], out=[array.copy(), x], codec="bf16")
        with pytest.raises(TypeError, match="needs `x`" if x is None else "`x` " + words):
            comm.all_reduce(x, codec="bf16")

    pycomm.run_local(fn, 1)


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    for name in ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        dtype = getattr(torch, name)
        tensors = [torch.randn(300).to(dtype), torch.ones(4, 7).to(dtype)]
        kept = [x.clone() for x in tensors]
        bucket = Bucket(tensors)
        bucket.pack()
        assert isinstance(bucket.data, torch.Tensor) and bucket.data.dtype == dtype
        for x, view in zip(tensors, bucket.views, strict=True):
            assert view.shape == x.shape and torch.equal(view.float(), x.float())
            x.zero_()
        bucket.unpack()
        assert all(torch.equal(x.float(), y.float()) for x, y in zip(tensors, kept, strict=True))
    bucket = Bucket([torch.ones(5), np.ones(3, "f")], "bfloat16")
    bucket.pack(3)
    assert isinstance(bucket.data, np.ndarray)
    assert isinstance(bucket.views[0], torch.Tensor) and bucket.views[0].tolist() == [3] * 5
    assert isinstance(bucket.views[1], np.ndarray) and bucket.views[1].tolist() == [3] * 3
    assert Bucket([torch.ones(3)], torch.float16).data.dtype == torch.float16
