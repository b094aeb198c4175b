"""pack() and unpack() on the GPU against those of the CPU: bytes and statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from arrays import FLOATS, numpy_dtype, same, to_gpu, values

import pycomm
import pycomm.cuda

torch = pytest.importorskip("torch")


def check(
    tensors: list[np.ndarray[Any, Any]], dtype: str, scale: float, misplaced: int = 0, blocks: int = 0
) -> None:
    bucket = pycomm.Bucket(tensors, dtype)
    want = bucket.pack(scale)
    offsets = [segment.begin for segment in bucket.segments]
    on_gpu = [to_gpu(x, misplaced * x.itemsize) for x in tensors]
    into = to_gpu(np.zeros(bucket.data.size, numpy_dtype(dtype)))
    packing = pycomm.cuda.Packing(on_gpu, offsets, into)
    got = packing.pack(scale, stats=True, blocks=blocks)
    assert got is not None
    assert same(into, bucket.data)
    assert repr(got.read()) == repr(want)

    into.zero_()
    assert packing.pack(scale, blocks=blocks) is None
    assert same(into, bucket.data)

    bucket.tensors = [np.empty_like(x) for x in tensors]
    want = bucket.unpack(scale)
    got = packing.unpack(scale, stats=True, blocks=blocks)
    assert got is not None
    assert repr(got.read()) == repr(want)
    assert all(same(x, y) for x, y in zip(on_gpu, bucket.tensors, strict=True))


@pytest.mark.parametrize("tensor", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_pair_of_types(tensor: str, dtype: str) -> None:
    for scale in (1.0, 0.3):
        for any_bits in (False, True):
            tensors = [values(tensor, n, n, any_bits) for n in (4099, 0, 1, 31, 1024, 300_001)]
            for misplaced in (0, 1, 3):
                check(tensors, dtype, scale, misplaced)


def test_mixed_types_many_tensors_and_launch_shapes() -> None:
    rng = np.random.default_rng(1)
    tensors = [values(FLOATS[j % 5], int(rng.integers(0, 20_000)), j) for j in range(600)]
    for blocks in (0, 1, 7):
        check(tensors, "bfloat16", 0.5, blocks=blocks)


def test_what_lies_in_its_place() -> None:
    data = values("float32", 5000, 1)
    bucket = to_gpu(data)
    packing = pycomm.cuda.Packing([bucket[:2048], bucket[2048:5000]], [0, 2048], bucket)
    got = packing.pack(stats=True)
    assert got is not None and got.max_abs == np.abs(data).max()
    assert same(bucket, data)


def test_a_graph_replays_with_other_values() -> None:
    tensors = [torch.zeros(n, device="cuda") for n in (1000, 70_000, 3)]
    bucket = torch.zeros(80_000, dtype=torch.bfloat16, device="cuda")
    packing = pycomm.cuda.Packing(tensors, [0, 1024, 72_000], bucket)
    stats = packing.pack(0.5, stats=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packing.pack(0.5, stats=True)
    for step in range(1, 4):
        for x in tensors:
            x.fill_(step)
        graph.replay()
        assert stats is not None and stats.read().sum_squares == 71_003 * (step / 2) ** 2
        assert bucket[1500].item() == step / 2


def test_errors() -> None:
    bucket = torch.zeros(100, device="cuda")
    with pytest.raises(ValueError, match="has 60 elements at 50: the bucket has 100"):
        pycomm.cuda.Packing([bucket.clone()[:60]], [50], bucket)
    with pytest.raises(TypeError, match="8 to 32 bits"):
        pycomm.cuda.Packing([bucket.double()], [0], bucket).pack()


def test_a_bucket_of_tensors_on_the_gpu() -> None:
    arrays = [
        values("float32", n, n).reshape(shape) for n, shape in ((4099, (4099,)), (12, (3, 4)), (0, (0,)))
    ]
    tensors = [to_gpu(x.reshape(-1)).reshape(x.shape) for x in arrays]
    theirs, ours = pycomm.Bucket(arrays, "bfloat16"), pycomm.Bucket(tensors, "bfloat16")
    assert ours.data.is_cuda and ours.segments == theirs.segments
    want, got = theirs.pack(0.5), ours.pack(0.5)
    assert same(ours.data, theirs.data)
    assert (got.sum_squares, got.max_abs, got.nans, got.infs) == tuple(want) and got.norm == want.norm
    theirs.unpack(4.0)
    ours.unpack(4.0)
    assert all(same(x, y) for x, y in zip(tensors, arrays, strict=True))
    before = ours.data.clone()
    ours.tensors = ours.views
    ours.pack()
    assert torch.equal(ours.data, before)
    with pytest.raises(TypeError, match="not on a GPU"):
        pycomm.Bucket([tensors[0], arrays[0]])
