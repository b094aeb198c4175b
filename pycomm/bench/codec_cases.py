"""Encode, decode and decode-and-add of the codecs, on as many float32 elements as a model has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from pycomm import _native
from pycomm.bench import shapes
from pycomm.bench.kernels import Case, Device
from pycomm.bench.pack_cases import numbers
from pycomm.bench.workers.memory import plain
from pycomm.codecs.kinds import DEFAULTS, BlockCodec

KINDS = tuple(name for name, codec in DEFAULTS.items() if isinstance(codec, BlockCodec))


def cases(device: Device, workloads: Sequence[str]) -> Iterator[Case]:
    for model in workloads:
        x = numbers(sum(parameter.count for parameter in shapes.parameters(model)), 0)
        out, total = plain(x.size, x.dtype, huge=True), plain(x.size, x.dtype, huge=True)
        total[:] = 0
        for kind in KINDS:
            codec = _native.Codec(kind)
            wire = plain(codec.wire_bytes(x.size), np.dtype(np.uint8), huge=True)
            moved = x.nbytes + wire.nbytes
            yield Case("codec", f"{kind} encode", model, moved, partial(_native.encode, codec, x, out=wire))
            if kind != "sign":
                stochastic = _native.Codec(kind, rounding="stochastic")
                run = partial(_native.encode, stochastic, x, out=wire)
                yield Case("codec", f"{kind} encode, stochastic", model, moved, run)
            _native.encode(codec, x, out=wire)
            yield Case("codec", f"{kind} decode", model, moved, partial(_native.decode, codec, wire, out))
            run = partial(_native.decode, codec, wire, total, add=True)
            yield Case("codec", f"{kind} decode and add", model, moved + x.nbytes, run)
