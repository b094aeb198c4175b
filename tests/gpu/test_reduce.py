"""reduce() on the GPU against all_reduce's kernel on the CPU: run_local ranks give the same tree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from arrays import DTYPES, FLOATS, same, to_gpu, values

import pycomm
import pycomm.cuda

torch = pytest.importorskip("torch")

OPS = {
    "float": ("sum", "prod", "min", "max", "avg"),
    "complex": ("sum", "prod", "avg"),
    "int": ("sum", "prod", "min", "max", "band", "bor", "bxor"),
    "bool": ("min", "max", "band", "bor", "bxor"),
}


def ops(dtype: str) -> tuple[str, ...]:
    return OPS[next(kind for kind in ("float", "complex", "bool", "int") if kind in dtype)]


def on_cpu(sources: list[np.ndarray[Any, Any]], op: str) -> np.ndarray[Any, Any]:
    """The result of a group's ranks: one_shot sums as the balanced tree over the ranks."""

    def rank(comm: Any) -> np.ndarray[Any, Any]:
        return comm.all_reduce(sources[comm.rank].copy(), op=op, algorithm="one_shot")

    return pycomm.run_local(rank, len(sources))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("any_bits", [False, True])
def test_every_op(dtype: str, any_bits: bool) -> None:
    for op in ops(dtype):
        for k in (2, 3, 5):
            sources = [values(dtype, 4099, 10 * k + j, any_bits) for j in range(k)]
            on_gpu = [to_gpu(x) for x in sources]
            out = torch.empty_like(on_gpu[0])
            pycomm.cuda.reduce(on_gpu, out, op)
            assert same(out, on_cpu(sources, op)), (op, k)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int16", "complex128"])
def test_lengths_places_and_launch_shapes(dtype: str) -> None:
    sources = [values(dtype, 4099, j) for j in range(6)]
    want = on_cpu(sources, "sum")
    size = sources[0].itemsize
    for count in (0, 1, 7, 63, 64, 65, 255, 1000, 4099):
        for misplaced in (0, size, 3 * size):
            on_gpu = [to_gpu(x[:count], misplaced if j else 0) for j, x in enumerate(sources)]
            for blocks in (0, 1, 3):
                out = torch.empty_like(on_gpu[0])
                pycomm.cuda.reduce(on_gpu, out, blocks=blocks)
                assert same(out, want[:count]), (count, misplaced, blocks)


def test_many_sources_and_destinations() -> None:
    sources = [values("bfloat16", 10_001, j) for j in range(16)]
    on_gpu = [to_gpu(x) for x in sources]
    outs = [torch.empty_like(on_gpu[0]) for _ in range(3)]
    pycomm.cuda.reduce(on_gpu, outs, "avg")
    want = on_cpu(sources, "avg")
    assert all(same(out, want) for out in outs)
    with pytest.raises(ValueError, match="129 sources"):
        pycomm.cuda.reduce(on_gpu[:1] * 129, outs[0])


def test_in_place_and_large() -> None:
    sources = [values("float32", 20_000_003, j) for j in range(2)]
    a, b = (to_gpu(x) for x in sources)
    pycomm.cuda.reduce([a, b], a)
    assert same(a, sources[0] + sources[1])


@pytest.mark.parametrize("dtype", [name for name in FLOATS if name != "float32"])
def test_partial_sums(dtype: str) -> None:
    """A float32 sum of two sources, then of that and a third, equals the tree of three."""
    sources = [values(dtype, 4099, j) for j in range(3)]
    on_gpu = [to_gpu(x) for x in sources]
    half = torch.empty(4099, dtype=torch.float32, device="cuda")
    out = torch.empty_like(on_gpu[0])
    pycomm.cuda.reduce(on_gpu[:2], half)
    pycomm.cuda.reduce([half, on_gpu[2]], out)
    assert same(out, on_cpu(sources, "sum"))


def test_a_graph_replays() -> None:
    a, b = (torch.zeros(100_001, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    pycomm.cuda.reduce([a, b], out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pycomm.cuda.reduce([a, b], out)
    for step in range(3):
        a.fill_(step)
        b.fill_(10)
        graph.replay()
        assert torch.equal(out, torch.full_like(out, step + 10))


def test_streams() -> None:
    stream = torch.cuda.Stream()
    a = torch.ones(10_000_000, device="cuda")
    out = torch.empty_like(a)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        a.fill_(2)
        pycomm.cuda.reduce([a, a], out)  # the current stream: after fill_
    stream.synchronize()
    assert torch.equal(out, torch.full_like(out, 4))
    pycomm.cuda.reduce([a, out], out, stream=stream)
    pycomm.cuda.reduce([a, out], out, stream=stream.cuda_stream)
    stream.synchronize()
    assert torch.equal(out, torch.full_like(out, 8))


def test_cupy() -> None:
    cupy = pytest.importorskip("cupy")
    a, b = cupy.arange(1001, dtype=cupy.float32), cupy.ones(1001, cupy.float32)
    out = cupy.empty_like(a)
    cupy.cuda.Device().synchronize()  # the next stream does not wait for this one
    with cupy.cuda.Stream(non_blocking=True) as stream:
        pycomm.cuda.reduce([a, b], out)
        stream.synchronize()
    assert np.array_equal(out.get(), np.arange(1001, dtype=np.float32) + 1)


def test_errors() -> None:
    a = torch.zeros(8, device="cuda")
    with pytest.raises(TypeError, match="in CPU memory"):
        pycomm.cuda.reduce([a, a.cpu()], a)
    with pytest.raises(ValueError, match="contiguous"):
        pycomm.cuda.reduce([a[::2], a[:4]], a[:4])
    with pytest.raises(ValueError, match="has 4 elements where others have 8"):
        pycomm.cuda.reduce([a, a[:4]], a)
    with pytest.raises(TypeError, match="makes no sense"):
        pycomm.cuda.reduce([a, a], a, "band")
