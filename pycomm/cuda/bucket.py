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

    on_gpu = True

    def __init__(self, like: Any) -> None:
        self._like = like

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

    def packing(self, data: Any, offsets: list[int], counts: list[int]) -> GpuPacking:
        return GpuPacking(data, offsets, counts)


class GpuPacking:
    """Tensors' places in a bucket on a GPU. A list of them is made for tensors as long as they stay."""

    def __init__(self, data: Any, offsets: list[int], counts: list[int]) -> None:
        self._data, self._offsets, self._counts = data, offsets, counts
        self._key: Any = None
        self._list: Packing | None = None

    def pack(self, tensors: list[Any], scale: float) -> Stats:
        stats = self._list_of(tensors).pack(scale, stats=True)
        return cast(Stats, stats)  # it has all that those have

    def unpack(self, tensors: list[Any], scale: float) -> Stats:
        stats = self._list_of(tensors).unpack(scale, stats=True)
        return cast(Stats, stats)

    def check_unpack(self, tensors: list[Any]) -> None:
        self._list_of(tensors).call.writes("tensors")

    def _list_of(self, tensors: list[Any]) -> Packing:
        """The tensors as they are now: made anew when one of them has moved."""
        found = [arrays.describe(x, f"tensors[{i}]") for i, x in enumerate(tensors)]
        key = [(x.address, x.dtype, x.count, x.writable) for x in found]
        if self._list is not None and key == self._key:
            return self._list
        whole = arrays.describe(self._data)
        item = _native.packable_dtype(whole.dtype)[1]
        for i, (x, offset, count) in enumerate(zip(found, self._offsets, self._counts, strict=True)):
            if x.count != count:
                raise ValueError(f"`tensors[{i}]` has {x.count} elements where the bucket has {count}")
            size = x.count * _native.packable_dtype(x.dtype)[1]
            inside = x.address < whole.address + whole.count * item and whole.address < x.address + size
            if inside and count > 0 and x.address != whole.address + offset * item:
                raise ValueError(
                    f"`tensors[{i}]` lies in the bucket's memory, but not in its place: pass views[{i}]"
                )
        self._list, self._key = Packing(tensors, self._offsets, self._data), key
        return self._list
