"""Codecs, shared integers and top-k on the GPU against the CPU's: the same bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from arrays import same, to_gpu, values

import pycomm.cuda
from pycomm import _native

torch = pytest.importorskip("torch")

CODECS = [
    _native.Codec(kind, rounding=rounding, seed=12345, **options)
    for kind, options in (
        ("fp16", {}),
        ("bf16", {}),
        ("fp8_e4m3", {}),
        ("fp8_e5m2", {}),
        ("mxfp8", {}),
        ("mxfp8", {"ceil_scale": True}),
        ("int8", {}),
        ("int4", {}),
        ("int4", {"hadamard": True}),
        ("sign", {}),
    )
    for rounding in ("nearest", "stochastic")
    if not (kind == "sign" and rounding == "stochastic")
]
ALL = pytest.mark.parametrize(
    "codec", CODECS, ids=lambda c: f"{c.kind}-{c.rounding}{'-option' * (c.ceil_scale or c.hadamard)}"
)


def gradients(dtype: str, count: int, seed: int) -> np.ndarray[Any, Any]:
    """Values whose magnitudes differ from block to block, with zeros, and a NaN and an Inf in two blocks."""
    x = values(dtype, count, seed).astype(np.float32)
    rng = np.random.default_rng(seed)
    x *= np.repeat(np.exp2(rng.integers(-60, 30, -(-count // 64))), 64)[:count].astype(np.float32)
    x[rng.random(count) < 0.05] = 0
    x[count // 2 : count // 2 + 1] = np.nan
    x[count // 3 : count // 3 + 1] = -np.inf
    return x.astype(values(dtype, 1, 0).dtype)


@ALL
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_encode_and_decode(codec: Any, dtype: str) -> None:
    for count in (0, 1, 17, 1023, 1024, 4099, 300_001):
        for misplaced in (0, 1):
            x = gradients(dtype, count, count + 1)
            on_gpu = to_gpu(x, misplaced * x.itemsize)
            want = _native.encode(codec, x, step=9, turn=2, rank=1)
            wire = pycomm.cuda.encode(codec, on_gpu, step=9, turn=2, rank=1)
            assert same(wire, want), (count, misplaced)
            out, back = np.empty_like(x), to_gpu(np.zeros_like(x), misplaced * x.itemsize)
            _native.decode(codec, want, out)
            pycomm.cuda.decode(codec, wire, back)
            assert same(back, out), (count, misplaced)


@ALL
def test_residuals_segments_and_launch_shapes(codec: Any) -> None:
    segments = [(0, 1500, 4), (1536, 1537, 9), (1792, 40_000, 12), (40_192, 100_000, 77)]
    x = values("float32", 100_003, 1)
    e = values("float32", 100_003, 2) * np.float32(1e-3)
    next_want = np.zeros_like(e)
    want = _native.encode(
        codec, x, step=3, segments=segments, residual=e, next_residual=next_want, residual_scale=0.5
    )
    for blocks in (0, 1, 5):
        e_gpu, next_got = to_gpu(e), to_gpu(np.zeros_like(e))
        wire = pycomm.cuda.encode(
            codec,
            to_gpu(x),
            step=3,
            segments=segments,
            residual=e_gpu,
            next_residual=next_got,
            residual_scale=0.5,
            blocks=blocks,
        )
        assert same(wire, want)
        assert same(next_got, next_want)


@ALL
def test_decode_add_and_the_fused_hop(codec: Any) -> None:
    x, y = values("float32", 5003, 1), values("float32", 5003, 2)
    wire = _native.encode(codec, x)
    total = y.copy()
    _native.decode(codec, wire, total, add=True)
    on_gpu = to_gpu(y)
    pycomm.cuda.decode(codec, to_gpu(wire), on_gpu, add=True)
    assert same(on_gpu, total)
    hop = pycomm.cuda.transcode(codec, [to_gpu(y), to_gpu(wire)], to_gpu(np.zeros_like(wire)), step=4, turn=3)
    assert same(hop, _native.encode(codec, total, step=4, turn=3))


def test_a_graph_replays() -> None:
    x = torch.randn(100_000, device="cuda")
    wire = pycomm.cuda.encode("int8", x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pycomm.cuda.encode("int8", x, wire)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert same(wire, _native.encode(_native.Codec("int8"), x.cpu().numpy()))


@pytest.mark.parametrize("width", [8, 16, 32])
def test_shared_integers(width: int) -> None:
    """Two ranks' integers add up to the float sum, within a step of each block's scale."""
    xs = [values("float32", 50_001, j) for j in range(2)]
    on_gpu = [to_gpu(x) for x in xs]
    amax = [torch.empty(-(-50_001 // 128), device="cuda") for _ in xs]
    for x, a in zip(on_gpu, amax, strict=True):
        pycomm.cuda.shared_amax(x, a)
    blocks = np.pad(xs[0], (0, -xs[0].size % 128)).reshape(-1, 128)
    assert same(amax[0], np.abs(blocks).max(1))
    both = torch.maximum(*amax)
    kind = {8: torch.int8, 16: torch.int16, 32: torch.int32}[width]
    q = [
        pycomm.cuda.shared_encode(x, both, torch.empty(x.numel(), dtype=kind, device="cuda"), world=2, rank=j)
        for j, x in enumerate(on_gpu)
    ]
    out = torch.empty_like(on_gpu[0])
    pycomm.cuda.shared_decode(q[0] + q[1], both, out, world=2)
    step = both.cpu().numpy().repeat(128)[: xs[0].size] / ((2 ** (width - 1) - 1) // 2)
    error = np.abs(out.cpu().numpy().astype(np.float64) - (xs[0].astype(np.float64) + xs[1]))
    assert np.all(error <= 2 * step + 1e-6 * np.abs(both.cpu().numpy().max()))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_topk(dtype: str) -> None:
    for count in (1, 4097, 1_000_003):
        for k in {1, count // 100 + 1, count}:
            for x in (gradients(dtype, count, k), values("int8", count, k).astype(values(dtype, 1, 0).dtype)):
                e, e_gpu = values("float32", count, 3), to_gpu(values("float32", count, 3))
                next_want, next_got = np.zeros_like(e), to_gpu(np.zeros_like(e))
                want = _native.topk_encode(x, k, residual=e, next_residual=next_want)
                got = pycomm.cuda.topk_encode(to_gpu(x), k, residual=e_gpu, next_residual=next_got)
                assert same(got, want), (count, k)
                assert same(next_got, next_want, nan_is_nan=True)
                total, total_gpu = e.copy(), to_gpu(e)
                _native.topk_decode_add(want, k, total)
                pycomm.cuda.topk_decode_add(got, k, total_gpu)
                assert same(total_gpu, total)


def test_topk_in_a_graph() -> None:
    x = torch.randn(500_000, device="cuda")
    record = pycomm.cuda.topk_encode(x, 5000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pycomm.cuda.topk_encode(x, 5000, record)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert same(record, _native.topk_encode(x.cpu().numpy(), 5000))
