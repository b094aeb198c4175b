"""A bucket of tensors on a GPU: pycomm.Bucket's memory there."""

from __future__ import annotations

import sys
from typing import Any, cast

from pycomm import _native
from pycomm.cuda import arrays
from pycomm.cuda.kernels import Packing
from pycomm.group import Communicator
from pycomm.stats import Stats


class Gpu:
    """Memory of the library that `like` is of, on its device.

    Statistics lie on the device until they are asked for: pack and unpack do not wait.
    """

    def __init__(self, like: Any) -> None:
        self._like = like
        self._key: Any = None
        self._packing: Packing | None = None

    def describe(self, x: Any, name: str) -> tuple[str, tuple[int, ...]]:
        dtype = arrays.describe(x, name).dtype
        _native.packable_dtype(dtype, name)
        return dtype, tuple(x.shape)

    def allocate(self, size: int, comm: Communicator | None) -> Any:
        device = arrays.describe(self._like).device
        stream = arrays.stream_handle(None, self._like, device)
        memory = arrays.new_bytes(max(size, 1), self._like, device, stream)
        memory[:] = 0
        return memory[:size]

    def typed(self, raw: Any, dtype: str, as_tensor: bool) -> Any:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(raw, torch.Tensor):
            return raw.view(getattr(torch, dtype))
        return raw.view(_native.numpy_dtype(dtype))

    def pack(
        self, data: Any, tensors: list[Any], offsets: list[int], counts: list[int], scale: float
    ) -> Stats:
        stats = self._list(data, tensors, offsets, counts).pack(scale, stats=True)
        return cast(Stats, stats)  # it has all that those have

    def unpack(
        self, data: Any, tensors: list[Any], offsets: list[int], counts: list[int], scale: float
    ) -> Stats:
        stats = self._list(data, tensors, offsets, counts).unpack(scale, stats=True)
        return cast(Stats, stats)

    def check_unpack(self, data: Any, tensors: list[Any], offsets: list[int], counts: list[int]) -> None:
        self._list(data, tensors, offsets, counts).call.writes("tensors")

    def _list(self, data: Any, tensors: list[Any], offsets: list[int], counts: list[int]) -> Packing:
        """The tensors as they are now: made anew when one of them has moved."""
        found = [arrays.describe(x, f"tensors[{i}]") for i, x in enumerate(tensors)]
        if self._packing is not None and found == self._key:
            return self._packing
        whole = arrays.describe(data)
        item = _native.packable_dtype(whole.dtype)[1]
        for i, (x, offset, count) in enumerate(zip(found, offsets, counts, strict=True)):
            if x.count != count:
                raise ValueError(f"`tensors[{i}]` has {x.count} elements where the bucket has {count}")
            size = x.count * _native.packable_dtype(x.dtype)[1]
            inside = x.address < whole.address + whole.count * item and whole.address < x.address + size
            if inside and count > 0 and x.address != whole.address + offset * item:
                raise ValueError(
                    f"`tensors[{i}]` lies in the bucket's memory, but not in its place: pass views[{i}]"
                )
        self._packing, self._key = Packing(tensors, offsets, data), found
        return self._packing
