"""The GPU's kernels at sizes beyond its cache and on real models' tensors, compared with torch.

Bytes are those read plus those written. A large array exceeds the cache by itself; lists of tensors rotate
among enough copies to exceed it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pycomm.cuda
from pycomm import _native
from pycomm.bench import shapes
from pycomm.bench.codec_cases import KINDS
from pycomm.bench.kernels import CACHE_BYTES, Call, Case, Device

SIZE = 256 << 20  # bytes of the arrays
SCALE = 0.125
TOPK_ELEMENTS, TOPK_SHARE = 25_000_000, 100


def cases(device: Device, workloads: Sequence[str]) -> Iterator[Case]:
    yield from _reduce()
    for model in workloads:
        yield from _pack(model)
    yield from _codecs()
    yield from _topk()


def _in_turn(calls: Sequence[Call]) -> Call:
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def _randn(count: int, dtype: str = "float32") -> Any:
    import torch

    return torch.randn(count, device="cuda").to(getattr(torch, dtype))


def _reduce() -> Iterator[Case]:
    import torch

    for dtype, item in (("float32", 4), ("bfloat16", 2)):
        for k in (2, 4, 8):
            count = SIZE // item
            sources = [_randn(count, dtype) for _ in range(k)]
            out = torch.empty_like(sources[0])

            def run(sources: list[Any] = sources, out: Any = out) -> object:
                return pycomm.cuda.reduce(sources, out)

            def add(sources: list[Any] = sources, out: Any = out) -> object:
                return torch.add(sources[0], sources[1], out=out)

            yield Case(
                "reduce",
                f"sum of {k}, {dtype}",
                "256 MiB",
                (k + 1) * SIZE,
                run,
                {"add": add} if k == 2 else {},
            )


def _pack(model: str) -> Iterator[Case]:
    import torch

    counts = [parameter.count for parameter in shapes.parameters(model)]
    align = 256
    places = [0, *itertools.accumulate(-(-n // align) * align for n in counts)]
    sets = max(1, -(-CACHE_BYTES // (4 * sum(counts))))
    tensors = [[_randn(n) for n in counts] for _ in range(sets)]
    for dtype in ("float32", "bfloat16", "float8_e4m3fn"):
        kind = getattr(torch, dtype)
        buckets = [torch.zeros(places[-1], device="cuda").to(kind) for _ in range(sets)]
        views = [[bucket[at : at + n] for at, n in zip(places, counts, strict=False)] for bucket in buckets]
        packings = [
            pycomm.cuda.Packing(each, places[:-1], bucket)
            for each, bucket in zip(tensors, buckets, strict=True)
        ]
        moved = sum(counts) * (4 + buckets[0].element_size())

        def each(call: Callable[[int], object]) -> Call:
            return _in_turn([lambda i=i: call(i) for i in range(sets)])  # type: ignore[misc]

        def copy(i: int, views: list[Any] = views) -> object:
            return torch._foreach_copy_(views[i], tensors[i])

        def copy_back(i: int, views: list[Any] = views) -> object:
            return torch._foreach_copy_(tensors[i], views[i])

        def pack(i: int, packings: list[Any] = packings) -> object:
            return packings[i].pack()

        def pack_with_stats(i: int, packings: list[Any] = packings) -> object:
            return packings[i].pack(SCALE, stats=True)

        def unpack(i: int, packings: list[Any] = packings) -> object:
            return packings[i].unpack()

        rival = {"_foreach_copy_": each(copy)}
        yield Case("pack", f"pack float32 to {dtype}", model, moved, each(pack), rival)
        yield Case("pack", f"pack float32 to {dtype}, scale, statistics", model, moved, each(pack_with_stats))
        back = {"_foreach_copy_": each(copy_back)}
        yield Case("pack", f"unpack {dtype} to float32", model, moved, each(unpack), back)


def _codecs() -> Iterator[Case]:
    import torch

    count = SIZE // 4
    x, out = _randn(count), torch.zeros(count, device="cuda")
    for kind in KINDS:
        for rounding in ("nearest", "stochastic")[: 1 if kind == "sign" else 2]:
            codec = _native.Codec(kind, rounding=rounding, seed=1)
            wire = pycomm.cuda.encode(codec, x)
            moved = 4 * count + wire.numel()

            def encode(codec: Any = codec, wire: Any = wire) -> object:
                return pycomm.cuda.encode(codec, x, wire)

            yield Case("codec", f"{kind} encode, {rounding}", "256 MiB", moved, encode)
            if rounding == "stochastic":
                continue

            def decode(codec: Any = codec, wire: Any = wire) -> object:
                return pycomm.cuda.decode(codec, wire, out)

            def decode_add(codec: Any = codec, wire: Any = wire) -> object:
                return pycomm.cuda.decode(codec, wire, out, add=True)

            hop_out = torch.empty_like(wire)

            def hop(codec: Any = codec, wire: Any = wire, hop_out: Any = hop_out) -> object:
                return pycomm.cuda.transcode(codec, [x, wire], hop_out)

            yield Case("codec", f"{kind} decode", "256 MiB", moved, decode)
            yield Case("codec", f"{kind} decode and add", "256 MiB", moved + 4 * count, decode_add)
            yield Case("codec", f"{kind} decode, add, encode", "256 MiB", moved + wire.numel(), hop)


def _topk() -> Iterator[Case]:
    import torch

    count, k = TOPK_ELEMENTS, TOPK_ELEMENTS // TOPK_SHARE
    x = _randn(count)
    record = pycomm.cuda.topk_encode(x, k)
    total = torch.zeros(count, device="cuda")
    yield Case(
        "topk",
        "1% of 25 M",
        "float32",
        4 * count + record.numel(),
        lambda: pycomm.cuda.topk_encode(x, k, record),
        {"topk": lambda: torch.topk(x.abs(), k, sorted=False)},
    )
    yield Case(
        "topk",
        "decode and add",
        "float32",
        2 * record.numel(),
        lambda: pycomm.cuda.topk_decode_add(record, k, total),
    )
