"""Encode and decode of codec lossless, on as many bfloat16 elements as a model's largest tensor has, compared
with zlib."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from pycomm import _native
from pycomm.bench import shapes
from pycomm.bench.kernels import Case, Device
from pycomm.bench.pack_cases import numbers
from pycomm.bench.workers.memory import Array, plain

MOST = 4 << 20  # elements: zlib takes long


def cases(device: Device, workloads: Sequence[str]) -> Iterator[Case]:
    if importlib.util.find_spec("ml_dtypes") is None:  # NumPy gets bfloat16 from it
        return
    bfloat16 = _native.numpy_dtype("bfloat16")
    for model in workloads:
        count = min(MOST, max(parameter.count for parameter in shapes.parameters(model)))
        x, out = (plain(count, bfloat16, huge=True) for _ in range(2))
        x[:] = numbers(count, 0)
        room = plain(_native.lossless_bound(count), np.dtype(np.uint8), huge=True)
        wire = room[: _native.lossless_encode(x, room)]
        moved, ratio = x.nbytes + wire.nbytes, wire.nbytes / x.nbytes
        exponents, rest = (zlib.compress(plane, 1) for plane in _planes(x))
        rival = f"zlib of exponents and rest ({(len(exponents) + len(rest)) / x.nbytes:.3f} of the bytes)"

        def compress(x: Array = x) -> object:
            return [zlib.compress(plane, 1) for plane in _planes(x)]

        def decompress(exponents: bytes = exponents, rest: bytes = rest) -> object:
            return _joined(zlib.decompress(exponents), zlib.decompress(rest))

        run = partial(_native.lossless_encode, x, room)
        yield Case("lossless", "lossless encode", model, moved, run, {rival: compress}, ratio)
        run = partial(_native.lossless_decode, wire, out)
        yield Case("lossless", "lossless decode", model, moved, run, {rival: decompress}, ratio)


def _planes(x: Array) -> tuple[bytes, bytes]:
    """The exponents, and the signs with the mantissas."""
    words = x.view(np.uint16)
    exponents, rest = (words >> 7).astype(np.uint8), (words >> 8 & 0x80 | words & 0x7F).astype(np.uint8)
    return exponents.tobytes(), rest.tobytes()


def _joined(exponents: bytes, rest: bytes) -> Array:
    high, low = (np.frombuffer(plane, np.uint8).astype(np.uint16) for plane in (exponents, rest))
    return (low & 0x80) << 8 | high << 7 | low & 0x7F
