"""The top 1 % of as many elements as a model has, compared with torch.topk and a sampled threshold."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from pycomm import _native
from pycomm.bench import shapes
from pycomm.bench.kernels import Call, Case, Device
from pycomm.bench.pack_cases import numbers
from pycomm.bench.workers.memory import Array, plain

SAMPLE = 0.01  # part of the elements


def cases(device: Device, workloads: Sequence[str]) -> Iterator[Case]:
    for model in workloads:
        x = numbers(sum(parameter.count for parameter in shapes.parameters(model)), 0)
        k = x.size // 100
        record = plain(16 + 8 * k, np.dtype(np.uint8), huge=True)
        run = partial(_native.topk_encode, x, k, out=record)
        yield Case("topk", "topk 1%", model, x.nbytes + record.nbytes, run, _rivals(x, k))


def _rivals(x: Array, k: int) -> dict[str, Call]:
    if not importlib.util.find_spec("torch"):
        return {}
    import torch

    torch.set_num_threads(1)
    tensor = torch.from_numpy(x)

    def topk() -> object:
        indices = torch.topk(tensor.abs(), k, sorted=False).indices
        return tensor[indices]

    def sampled() -> object:
        """Deep Gradient Compression's method: about k elements above a threshold found from a sample."""
        magnitudes = tensor.abs()
        chosen = magnitudes[torch.randint(tensor.numel(), (int(tensor.numel() * SAMPLE),))]
        threshold = torch.topk(chosen, max(1, int(k * SAMPLE)), sorted=False).values.min()
        indices = (magnitudes >= threshold).nonzero().squeeze(1)
        return tensor[indices]

    return {"torch.topk": topk, "sampled threshold": sampled}
