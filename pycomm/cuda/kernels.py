"""Reduce, pack and unpack on GPU buffers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pycomm.cuda.arrays import Call, describe, native, new_bytes, require, stream_handle
from pycomm.stats import Stats

# Elements whose accumulator has no room for any sum of theirs.
_SUMS_OVERFLOW = ("float32", "float64", "bfloat16", "complex64", "complex128")


def reduce(
    srcs: Sequence[Any],
    out: Any,
    op: str = "sum",
    *,
    prescale: float = 1.0,
    divisor: float | None = None,
    stream: Any = None,
    blocks: int = 0,
) -> Any:
    """`out` = the sources, combined element by element; `out` may be one of them, or a list of several
    results.

    Sources of a 16- or 8-bit float may be partial sums in float32 instead, and so may the results. `divisor`:
    for op="avg", by default the number of sources.
    """
    outs = list(out) if isinstance(out, (list, tuple)) else [out]
    require(len(srcs) > 0, "`srcs` is empty: pass one array or more")
    call = Call(stream, blocks, srcs=list(srcs), out=outs)
    call.writes("out")
    dtype = _element_type([a.dtype for a in call.found["srcs"] + call.found["out"]])
    count = call.found["srcs"][0].count
    for name, found in call.found.items():
        for array in found:
            require(array.count == count, f"`{name}` has {array.count} elements where others have {count}")
    held = {a.dtype for a in call.found["out"]}
    require(len(held) == 1, f"`out` holds {', '.join(sorted(held))}: results are of one type")
    whole = all(a.dtype == dtype for a in call.found["srcs"])
    final = held == {dtype}
    if divisor is None:
        divisor = len(call.found["srcs"]) if op == "avg" else 1
        if op == "avg" and whole and final and dtype in _SUMS_OVERFLOW:
            scale = 0.5 ** (len(srcs) - 1).bit_length()  # as collectives do: see the average of combine.h
            prescale, divisor = prescale * scale, divisor * scale
    call.module.combine(
        call.where,
        dtype,
        op,
        [a.address for a in call.found["srcs"]],
        ["raw" if a.dtype == dtype else "partial" for a in call.found["srcs"]],
        [a.address for a in call.found["out"]],
        "raw"
        if whole and final and len(srcs) == 1 and prescale == divisor == 1
        else "final"
        if final
        else "partial",
        count,
        prescale,
        divisor,
    )
    return out


def _element_type(names: Iterable[str]) -> str:
    """That of the elements: where there are two, one is what the other's partial sums are held in."""
    found = sorted(set(names))
    narrow = [name for name in found if name != "float32"]
    if len(found) == 1:
        return found[0]
    if len(found) == 2 and len(narrow) == 1 and ("float16" in narrow[0] or "float8" in narrow[0]):
        return narrow[0]
    raise TypeError(
        f"the arrays are {', '.join(found)}: pass arrays of one type, or its partial sums in float32"
    )


class DeviceStats:
    """Statistics that lie on the device. The first question waits for the stream; so does read()."""

    def __init__(self, where: Any, workspace: Any, address: int) -> None:
        self._where, self._workspace, self._address = where, workspace, address
        self._read: Stats | None = None

    def read(self) -> Stats:
        """Those of the last pack or unpack that has run, a graph's replay as well."""
        return Stats(*native().read_stats(self._where, self._address))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._read is None:
            self._read = self.read()
        return getattr(self._read, name)


class Packing:
    """Tensors and the places that they have in a bucket; offsets in its elements.

    pack() copies the tensors to the bucket in one launch, each value times `scale`, cast to its type;
    unpack() copies back. With `stats=True` they return statistics of what was written. What belongs to the
    statistics lies in memory that is made here, so that calls allocate nothing: those with statistics follow
    each other on one stream.
    """

    def __init__(self, tensors: Sequence[Any], offsets: Sequence[int], bucket: Any) -> None:
        call = Call(None, 0, bucket=bucket, tensors=list(tensors))
        require(len(tensors) == len(offsets), f"{len(offsets)} offsets for {len(tensors)} tensors")
        whole = call.one("bucket")
        for i, (x, offset) in enumerate(zip(call.found["tensors"], offsets, strict=True)):
            require(
                offset >= 0 and offset + x.count <= whole.count,
                f"`tensors[{i}]` has {x.count} elements at {offset}: the bucket has {whole.count}",
            )
        items = [
            (x.address, x.dtype, x.count, at) for x, at in zip(call.found["tensors"], offsets, strict=True)
        ]
        self._list = call.module.Packing(whole.address, whole.dtype, items)
        self._device = whole.device
        self._keep = (bucket, list(tensors))
        self.call = call
        self._workspace: Any = None
        self._address = 0

    def pack(
        self, scale: float = 1.0, *, stats: bool = False, stream: Any = None, blocks: int = 0
    ) -> DeviceStats | None:
        """Copies the tensors to the bucket, each value times `scale`. Enqueues and returns."""
        self.call.writes("bucket")
        return self._run(self._list.pack, scale, stats, stream, blocks)

    def unpack(
        self, scale: float = 1.0, *, stats: bool = False, stream: Any = None, blocks: int = 0
    ) -> DeviceStats | None:
        """Copies the bucket to the tensors, each value times `scale`. Enqueues and returns."""
        self.call.writes("tensors")
        return self._run(self._list.unpack, scale, stats, stream, blocks)

    def _run(self, method: Any, scale: float, stats: bool, stream: Any, blocks: int) -> DeviceStats | None:
        like = self._keep[0]
        handle = stream_handle(stream, like, self._device)
        where = native().Where(self._device, handle, blocks)
        if not stats:
            method(where, scale, 0)
            return None
        if self._workspace is None:
            self._workspace = new_bytes(self._list.workspace_bytes, like, self._device, handle)
            self._address = describe(self._workspace).address
        method(where, scale, self._address)
        return DeviceStats(where, self._workspace, self._address)
