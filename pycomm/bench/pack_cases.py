"""Pack and unpack of real models' tensors, compared with torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from pycomm import _native
from pycomm.bench import shapes
from pycomm.bench.kernels import Call, Case, Device
from pycomm.bench.workers.memory import Array, plain
from pycomm.bucket import Bucket

SCALE = 0.125
CASTS: tuple[str, ...] = ("float32", "bfloat16", "float16", "float8_e4m3fn")
if importlib.util.find_spec("ml_dtypes") is None:  # NumPy gets the other types from it
    CASTS = ("float32", "float16")


def cases(device: Device, workloads: Sequence[str]) -> Iterator[Case]:
    for model in workloads:
        yield from _cases_of(model)


def _cases_of(model: str) -> Iterator[Case]:
    tensors = [numbers(parameter.count, i) for i, parameter in enumerate(shapes.parameters(model))]
    outs = [plain(x.size, x.dtype, huge=True) for x in tensors]
    for dtype in CASTS:
        bucket = Bucket(tensors, dtype)
        bucket.pack()  # so that the bucket has data to unpack
        torch = TorchWays(bucket, outs) if importlib.util.find_spec("torch") else None
        elements = sum(x.size for x in tensors)
        moved = elements * (4 + _native.packable_dtype(dtype)[1])

        def case(kernel: str, run: Call, rivals: dict[str, Call], moved: int = moved) -> Case:
            return Case("pack", kernel, model, moved, run, rivals)

        places = [segment.begin for segment in bucket.segments]
        packing = _native.Packing(bucket.data, places, [x.size for x in tensors])
        pack = partial(packing.pack, tensors, stats=False)
        unpack = partial(packing.unpack, outs, stats=False)
        to, back = f"float32 to {dtype}", f"{dtype} to float32"
        yield case(f"pack {to}", pack, torch.pack() if torch else {})
        yield case(f"pack {to}, scale", partial(pack, scale=SCALE), {})
        rivals = torch.pack_scale_norm() if torch else {}
        yield case(f"pack {to}, scale, statistics", partial(bucket.pack, SCALE), rivals)
        yield case(f"unpack {back}", unpack, torch.unpack() if torch else {})
        rivals = torch.unpack_scale() if torch else {}
        yield case(f"unpack {back}, scale", partial(unpack, scale=SCALE), rivals)


def numbers(count: int, seed: int) -> Array:
    """Numbers that every type can hold, in memory as in pycomm bench."""
    x = plain(count, np.dtype(np.float32), huge=True)
    x[:] = np.random.default_rng(seed).standard_normal(count, np.float32)
    return x


class TorchWays:
    """What a bucket does, done with torch, on the same memory and one thread."""

    def __init__(self, bucket: Bucket, outs: list[Array]) -> None:
        import torch

        torch.set_num_threads(1)
        self.torch = torch
        self.tensors = [torch.from_numpy(x) for x in bucket.tensors]
        self.outs = [torch.from_numpy(x) for x in outs]
        name = _native.describe_buffer(bucket.data, "data").dtype
        self.dtype = getattr(torch, name)
        self.flat = torch.from_numpy(bucket.data.view(np.uint8)).view(self.dtype)
        self.views = [self.flat[segment.begin : segment.end] for segment in bucket.segments]
        self.tight = torch.empty(sum(x.numel() for x in self.tensors), dtype=self.dtype)  # as in torch.cat
        self.eight_bits = self.flat.element_size() == 1  # for which torch only has copies

    def pack(self) -> dict[str, Call]:
        torch = self.torch
        found: dict[str, Call] = {"_foreach_copy_": lambda: torch._foreach_copy_(self.views, self.tensors)}
        if self.dtype == torch.float32:
            found["cat"] = lambda: torch.cat(self.tensors, out=self.tight)
        else:
            found["_flatten_dense_tensors, to"] = self._flatten
            found["cat, copy_"] = lambda: self.tight.copy_(torch.cat(self.tensors))
        return found

    def pack_scale_norm(self) -> dict[str, Call]:
        torch = self.torch

        def copy_scale_norm() -> object:
            torch._foreach_copy_(self.views, self.tensors)
            self.flat.mul_(SCALE)
            return torch.linalg.vector_norm(self.flat, dtype=torch.float32)

        def copy_scale_foreach_norm() -> object:
            torch._foreach_copy_(self.views, self.tensors)
            self.flat.mul_(SCALE)
            return torch.stack(torch._foreach_norm(self.tensors)).norm() * SCALE

        def scale_copy_norm() -> object:
            scaled = torch._foreach_mul(self.tensors, SCALE)
            torch._foreach_copy_(self.views, scaled)
            return torch.stack(torch._foreach_norm(scaled)).norm()

        def flatten_scale_norm() -> object:
            flat = torch._utils._flatten_dense_tensors(self.tensors).mul_(SCALE)
            self.tight.copy_(flat)
            return flat.norm()

        found: dict[str, Call] = {
            "_foreach_mul, _foreach_copy_, _foreach_norm": scale_copy_norm,
            "_flatten_dense_tensors, mul_, copy_, norm": flatten_scale_norm,
        }
        if not self.eight_bits:
            found["_foreach_copy_, mul_, vector_norm"] = copy_scale_norm
            found["_foreach_copy_, mul_, _foreach_norm"] = copy_scale_foreach_norm
        return found

    def unpack(self) -> dict[str, Call]:
        return {"_foreach_copy_": lambda: self.torch._foreach_copy_(self.outs, self.views)}

    def unpack_scale(self) -> dict[str, Call]:
        torch = self.torch

        def copy_scale() -> object:
            torch._foreach_copy_(self.outs, self.views)
            return torch._foreach_mul_(self.outs, SCALE)

        return {"_foreach_copy_, _foreach_mul_": copy_scale}

    def _flatten(self) -> object:
        return self.torch._utils._flatten_dense_tensors(self.tensors).to(self.dtype)
