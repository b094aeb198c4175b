"""The kernels on GPU buffers: reduce, pack and unpack, codecs, top-k. The same bits as on the CPU.

Arguments are CuPy arrays, torch tensors, or anything with `__cuda_array_interface__` or DLPack, contiguous
and all on one device. A call enqueues its work and returns. It goes to torch's or CuPy's current stream,
whichever the arrays are of; `stream=` names another one: its handle, or an object of torch or CuPy. Calls can
be captured in a CUDA graph. Results do not depend on `blocks=`, the most thread blocks that a call may use
(all that the device holds).

Importing this needs no GPU; the first call loads what was built for it, and says what is missing.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pycomm import _native
from pycomm.bucket import Stats

__all__ = [
    "Packing",
    "decode",
    "encode",
    "is_available",
    "reduce",
    "shared_amax",
    "shared_decode",
    "shared_encode",
    "topk_decode_add",
    "topk_encode",
    "transcode",
]

_FLOATS = ("float32", "float16", "bfloat16")


def is_available() -> bool:
    """Whether the kernels were built and a device is there."""
    try:
        native()
    except RuntimeError:
        return False
    return True


@functools.lru_cache(maxsize=1)
def native() -> Any:
    """The extension module. Raises RuntimeError that says what is missing."""
    try:
        module: Any = importlib.import_module("pycomm._cuda")
    except ImportError as error:
        if error.name != "pycomm._cuda":
            raise
        raise RuntimeError(
            "pycomm was built without CUDA kernels: install the CUDA toolkit (12.4 or newer, nvcc on the "
            "PATH) and build pycomm again, with PYCOMM_CUDA=ON to be told what is wrong"
        ) from None
    devices, reason = module.device_count()
    if devices == 0:
        built, driver = module.versions()
        found = f"the driver has CUDA {_version(driver)}" if driver else "there is no NVIDIA driver"
        raise RuntimeError(
            f"no CUDA device: {reason or 'none is visible'} (built with CUDA {_version(built)}, {found}): "
            f"install a driver for CUDA {built // 1000} or newer, and look at CUDA_VISIBLE_DEVICES"
        )
    return module


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@dataclass(frozen=True)
class Array:
    """What a kernel needs to know of an argument."""

    address: int
    dtype: str
    count: int
    device: int


# Bytes and the names of what they hold, as DLPack has them: (code, bits).
_DLPACK = {
    (0, 8): "int8",
    (0, 16): "int16",
    (0, 32): "int32",
    (0, 64): "int64",
    (1, 8): "uint8",
    (1, 16): "uint16",
    (1, 32): "uint32",
    (1, 64): "uint64",
    (2, 16): "float16",
    (2, 32): "float32",
    (2, 64): "float64",
    (4, 16): "bfloat16",
    (5, 64): "complex64",
    (5, 128): "complex128",
    (6, 8): "bool",
    (10, 8): "float8_e4m3fn",
    (12, 8): "float8_e5m2",
}
_CUDA, _MANAGED = 2, 13  # DLPack's device types


def describe(x: Any, name: str = "x") -> Array:
    """Address, type, elements and device of an array. Raises TypeError or ValueError that says what to do."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        if x.device.type != "cuda":
            raise TypeError(f"`{name}` is on {x.device}: pass a tensor on a CUDA device, x.cuda()")
        if not x.is_contiguous():
            raise ValueError(f"`{name}` is not contiguous: pass x.contiguous() and copy the result back")
        return Array(x.data_ptr(), str(x.dtype).removeprefix("torch."), x.numel(), x.device.index)
    interface = getattr(x, "__cuda_array_interface__", None)
    if interface is not None:
        return _from_interface(x, interface, name)
    if hasattr(x, "__dlpack__"):
        return _from_dlpack(x, name)
    raise TypeError(
        f"`{name}` is a {type(x).__name__}: pass a CuPy array, a torch tensor on a CUDA device, or anything "
        "with __cuda_array_interface__ or DLPack"
    )


def _from_interface(x: Any, interface: dict[str, Any], name: str) -> Array:
    import numpy as np

    dtype = getattr(x, "dtype", None)
    try:  # the interface's type strings have no name for bfloat16 and float8: the object's own dtype does
        described = np.dtype(dtype if dtype is not None else interface["typestr"])
    except TypeError:
        described = np.dtype(interface["typestr"])
    shape, strides = interface["shape"], interface.get("strides")
    expected = described.itemsize
    for extent, stride in zip(reversed(shape), reversed(strides or ()), strict=bool(strides)):
        if extent != 1 and stride != expected:
            raise ValueError(
                f"`{name}` is not contiguous in C order: pass a contiguous copy, copy the result back"
            )
        expected *= extent
    count = 1
    for extent in shape:
        count *= extent
    address = interface["data"][0] or 0
    device = getattr(getattr(x, "device", None), "id", None)  # CuPy's
    if not isinstance(device, int):
        device = native().device_of(address) if address else 0
    return Array(address, described.name, count, device)


def _from_dlpack(x: Any, name: str) -> Array:
    kind, device = x.__dlpack_device__()
    if kind not in (_CUDA, _MANAGED):
        raise TypeError(f"`{name}` is not on a CUDA device (DLPack device type {int(kind)})")
    address, code, bits, lanes, count, contiguous = native().read_dlpack(x.__dlpack__(stream=-1))
    if lanes != 1 or (code, bits) not in _DLPACK:
        raise TypeError(
            f"`{name}` has elements that cannot be communicated (DLPack code {code}, {bits} bits)"
        )
    if not contiguous:
        raise ValueError(
            f"`{name}` is not contiguous in C order: pass a contiguous copy, copy the result back"
        )
    return Array(address, _DLPACK[code, bits], count, device)


def stream_handle(stream: Any, like: Any, device: int) -> int:
    """A stream's handle: of `stream`, or the current one of the library that `like` is of."""
    if stream is None:
        torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
        if torch is not None and isinstance(like, torch.Tensor):
            return int(torch.cuda.current_stream(device).cuda_stream)
        if cupy is not None and isinstance(like, cupy.ndarray):
            return int(cupy.cuda.get_current_stream(device).ptr)
        return 0  # the legacy default stream, which waits for all that block it and is waited for by them
    if isinstance(stream, int):
        return stream
    for attribute in ("cuda_stream", "ptr"):
        handle = getattr(stream, attribute, None)
        if handle is not None:
            return int(handle)
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return int((protocol() if callable(protocol) else protocol)[1])
    raise TypeError(f"`stream` is a {type(stream).__name__}: pass a stream of torch or CuPy, or a handle")


def new_bytes(size: int, like: Any, device: int, stream: int) -> Any:
    """Device memory that lives in the order of `stream`, from the library that `like` is of."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(like, torch.Tensor):
        if stream == torch.cuda.current_stream(device).cuda_stream:
            return torch.empty(size, dtype=torch.uint8, device=like.device)
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=like.device)):
            return torch.empty(size, dtype=torch.uint8, device=like.device)
    if cupy is not None:
        with cupy.cuda.Device(device):
            if stream in (0, 1, 2):
                return cupy.empty(size, cupy.uint8)
            with cupy.cuda.ExternalStream(stream, device):
                return cupy.empty(size, cupy.uint8)
    raise TypeError(
        f"memory for the result is needed, and {type(like).__name__} is of neither torch nor CuPy: pass it "
        "yourself (out=, workspace=)"
    )


class _Call:
    """The arguments of one call: all on one device, and where it runs."""

    def __init__(self, stream: Any, blocks: int, **arrays: Any) -> None:
        self.module = native()
        self.found: dict[str, list[Array]] = {}
        self.device: int | None = None
        for name, value in arrays.items():
            values = value if isinstance(value, list) else [] if value is None else [value]
            self.found[name] = [self._enter(x, name) for x in values]
        self.like = next(v[0] if isinstance(v, list) else v for v in arrays.values() if v is not None)
        self.stream = stream_handle(stream, self.like, self.device or 0)
        self.where = self.module.Where(self.device or 0, self.stream, blocks)

    def _enter(self, x: Any, name: str) -> Array:
        found = describe(x, name)
        if self.device is None:
            self.device = found.device
        elif found.device != self.device:
            raise ValueError(
                f"`{name}` is on device {found.device}, and others are on {self.device}: move it"
            )
        return found

    def one(self, name: str) -> Array:
        return self.found[name][0]

    def address(self, name: str) -> int:
        return self.found[name][0].address if self.found[name] else 0

    def new_bytes(self, size: int) -> Any:
        return new_bytes(size, self.like, self.device or 0, self.stream)


def _segments(segments: Sequence[tuple[int, int, int]] | None) -> list[tuple[int, int, int]]:
    """As the codecs need them: in order, at multiples of 256, and numbered below 2^24."""
    found = [(int(begin), int(end), int(number)) for begin, end, number in segments or ()]
    last = 0
    for i, (begin, end, number) in enumerate(found):
        _require(
            begin % _native.SEGMENT_ALIGN == 0 and last <= begin <= end and 0 <= number < 1 << 24,
            f"`segments[{i}]` is {(begin, end, number)}: tensors follow each other, begin at multiples of "
            f"{_native.SEGMENT_ALIGN}, and have numbers below 2^24",
        )
        last = end
    return found


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


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
    _require(len(srcs) > 0, "`srcs` is empty: pass one array or more")
    call = _Call(stream, blocks, srcs=list(srcs), out=outs)
    dtype = _element_type([a.dtype for a in call.found["srcs"] + call.found["out"]])
    count = call.found["srcs"][0].count
    for name, found in call.found.items():
        for array in found:
            _require(array.count == count, f"`{name}` has {array.count} elements where others have {count}")
    held = {a.dtype for a in call.found["out"]}
    _require(len(held) == 1, f"`out` holds {', '.join(sorted(held))}: results are of one type")
    whole = all(a.dtype == dtype for a in call.found["srcs"])
    final = held == {dtype}
    if divisor is None:
        divisor = len(call.found["srcs"]) if op == "avg" else 1
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

    def __init__(self, where: Any, workspace: Any) -> None:
        self._where, self._workspace = where, workspace
        self._read: Stats | None = None

    def read(self) -> Stats:
        """Those of the last pack or unpack that has run, a graph's replay as well."""
        return Stats(*native().read_stats(self._where, describe(self._workspace).address))

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
        call = _Call(None, 0, bucket=bucket, tensors=list(tensors))
        _require(len(tensors) == len(offsets), f"{len(offsets)} offsets for {len(tensors)} tensors")
        whole = call.one("bucket")
        for i, (x, offset) in enumerate(zip(call.found["tensors"], offsets, strict=True)):
            _require(
                offset >= 0 and offset + x.count <= whole.count,
                f"`tensors[{i}]` has {x.count} elements at {offset}: the bucket has {whole.count}",
            )
        items = [
            (x.address, x.dtype, x.count, at) for x, at in zip(call.found["tensors"], offsets, strict=True)
        ]
        self._list = call.module.Packing(whole.address, whole.dtype, items)
        self._device = whole.device
        self._keep = (bucket, list(tensors))
        self._workspace: Any = None

    def pack(
        self, scale: float = 1.0, *, stats: bool = False, stream: Any = None, blocks: int = 0
    ) -> DeviceStats | None:
        return self._run(self._list.pack, scale, stats, stream, blocks)

    def unpack(
        self, scale: float = 1.0, *, stats: bool = False, stream: Any = None, blocks: int = 0
    ) -> DeviceStats | None:
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
        method(where, scale, describe(self._workspace).address)
        return DeviceStats(where, self._workspace)


def _codec(codec: Any) -> tuple[_native.Codec, Any]:
    """The codec of _native and of _cuda. `codec`: of pycomm.codecs or _native, or a name: nearest."""
    if isinstance(codec, str):
        codec = _native.Codec(codec)
    host: _native.Codec = codec.native() if hasattr(codec, "native") else codec
    if not isinstance(host, _native.Codec):
        raise TypeError(f"`codec` is a {type(codec).__name__}: pass a name, or a codec of pycomm.codecs")
    return host, native().Codec(host.kind, host.rounding, host.seed, host.ceil_scale, host.hadamard)


def transcode(
    codec: Any,
    srcs: Sequence[Any],
    out: Any,
    *,
    count: int | None = None,
    formats: Sequence[str] | None = None,
    out_format: str | None = None,
    prescale: float = 1.0,
    divisor: float = 1.0,
    step: int = 0,
    stage: int = 0,
    rank: int = 0,
    index: int = 0,
    segments: Sequence[tuple[int, int, int]] | None = None,
    residual: Any = None,
    next_residual: Any = None,
    residual_scale: float = 1.0,
    stream: Any = None,
    blocks: int = 0,
) -> Any:
    """The sum of the sources, each decoded or converted to float32, to `out`: encoded, or as floats.

    uint8 arrays hold wire bytes; the others floats (`formats` and `out_format`: raw, partial or final, wire).
    `count`: elements, where there are wire bytes alone.
    """
    outs = list(out) if isinstance(out, (list, tuple)) else [out]
    host, device_codec = _codec(codec)
    call = _Call(stream, blocks, srcs=list(srcs), out=outs, residual=residual, next_residual=next_residual)
    arrays = call.found["srcs"] + call.found["out"]
    floats = [a for a in arrays if a.dtype != "uint8"]
    if count is None:
        _require(bool(floats), "there are wire bytes alone: say with count= how many elements they are of")
        count = floats[0].count
    for a in arrays:
        want, what = (host.wire_bytes(count), "bytes") if a.dtype == "uint8" else (count, "elements")
        _require(a.count == want, f"an array has {a.count} {what} where {count} elements take {want}")
    held = formats or ["wire" if a.dtype == "uint8" else "raw" for a in call.found["srcs"]]
    for name in ("residual", "next_residual"):
        for a in call.found[name]:
            _require(
                a.dtype == "float32" and a.count == count, f"`{name}` must be {count} elements of float32"
            )
    _require(
        (residual is None) == (next_residual is None), "pass both `residual` and `next_residual`, or neither"
    )
    to = out_format or ("wire" if call.found["out"][0].dtype == "uint8" else "final")
    given = {a.dtype for a, f in zip(call.found["srcs"], held, strict=True) if f not in ("wire", "partial")}
    given |= {a.dtype for a in call.found["out"] if to == "final"}
    _require(len(given) <= 1, f"floats are {', '.join(sorted(given))}: pass arrays of one type")
    encoding = call.module.Encoding(
        step,
        stage,
        rank,
        index,
        _segments(segments),
        call.address("residual"),
        call.address("next_residual"),
        residual_scale,
    )
    call.module.transcode(
        call.where,
        device_codec,
        next(iter(given), "float32"),
        [a.address for a in call.found["srcs"]],
        list(held),
        [a.address for a in call.found["out"]],
        to,
        count,
        prescale,
        divisor,
        encoding,
    )
    return out


def encode(codec: Any, x: Any, out: Any = None, *, stream: Any = None, **options: Any) -> Any:
    """`x` encoded: uint8, `out` or a new array. For the options see transcode()."""
    if out is None:
        found = describe(x)
        size = _codec(codec)[0].wire_bytes(found.count)
        out = new_bytes(size, x, found.device, stream_handle(stream, x, found.device))
    return transcode(codec, [x], out, stream=stream, **options)


def decode(codec: Any, wire: Any, out: Any, *, add: bool = False, stream: Any = None, blocks: int = 0) -> Any:
    """What `wire` holds to `out`; or added to it, which then is float32."""
    if add and describe(out, "out").dtype != "float32":
        raise TypeError(f"`out` is {describe(out, 'out').dtype}: sums are float32")
    return transcode(codec, [out, wire] if add else [wire], out, stream=stream, blocks=blocks)


def shared_amax(
    x: Any,
    amax: Any,
    *,
    segments: Sequence[tuple[int, int, int]] | None = None,
    residual: Any = None,
    residual_scale: float = 1.0,
    stream: Any = None,
    blocks: int = 0,
) -> Any:
    """The largest magnitude of each 128 elements, a NaN where one is not finite: float32."""
    call = _Call(stream, blocks, x=x, amax=amax, residual=residual)
    found = call.one("x")
    _require(
        call.one("amax").count == -(-found.count // 128), "`amax` must have an element for each 128 of `x`"
    )
    encoding = call.module.Encoding(
        segments=_segments(segments), residual=call.address("residual"), residual_scale=residual_scale
    )
    call.module.shared_amax(
        call.where, found.dtype, found.address, found.count, call.address("amax"), encoding
    )
    return amax


def shared_encode(
    x: Any,
    amax: Any,
    out: Any,
    *,
    world: int,
    seed: int = 0,
    step: int = 0,
    rank: int = 0,
    segments: Sequence[tuple[int, int, int]] | None = None,
    residual: Any = None,
    next_residual: Any = None,
    residual_scale: float = 1.0,
    stream: Any = None,
    blocks: int = 0,
) -> Any:
    """`x` as integers of `out`'s type, int8, int16 or int32, that `world` ranks can add."""
    call = _Call(stream, blocks, x=x, amax=amax, out=out, residual=residual, next_residual=next_residual)
    found = call.one("x")
    _require(call.one("out").count == found.count, "`out` must have as many elements as `x`")
    encoding = call.module.Encoding(
        step,
        0,
        rank,
        0,
        _segments(segments),
        call.address("residual"),
        call.address("next_residual"),
        residual_scale,
    )
    call.module.shared_encode(
        call.where,
        found.dtype,
        found.address,
        found.count,
        call.address("amax"),
        _width(call.one("out").dtype),
        world,
        seed,
        encoding,
        call.address("out"),
    )
    return out


def shared_decode(
    q: Any, amax: Any, out: Any, *, world: int, divisor: float = 1.0, stream: Any = None, blocks: int = 0
) -> Any:
    """The integers' sum to floats, over `divisor`."""
    call = _Call(stream, blocks, q=q, amax=amax, out=out)
    found = call.one("out")
    _require(call.one("q").count == found.count, "`out` must have as many elements as `q`")
    call.module.shared_decode(
        call.where,
        call.address("q"),
        found.count,
        call.address("amax"),
        _width(call.one("q").dtype),
        world,
        divisor,
        found.dtype,
        found.address,
    )
    return out


def _width(dtype: str) -> int:
    widths = {"int8": 8, "int16": 16, "int32": 32}
    if dtype not in widths:
        raise TypeError(f"the integers are {dtype}: use int8, int16 or int32")
    return widths[dtype]


def topk_encode(
    x: Any,
    k: int,
    out: Any = None,
    *,
    residual: Any = None,
    next_residual: Any = None,
    residual_scale: float = 1.0,
    workspace: Any = None,
    stream: Any = None,
    blocks: int = 0,
) -> Any:
    """The record of the k elements of largest magnitude: uint8, `out` or a new array.

    `workspace`: uint8 memory of topk_workspace_bytes(x) to work in; by default new memory of torch or CuPy.
    """
    call = _Call(
        stream, blocks, x=x, residual=residual, next_residual=next_residual, out=out, workspace=workspace
    )
    found = call.one("x")
    size = 16 + 8 * k
    needed = call.module.topk_workspace_bytes(found.count)
    if out is None:
        out = call.new_bytes(size)
    if workspace is None:
        workspace = call.new_bytes(needed)
    record, room = describe(out, "out"), describe(workspace, "workspace")
    _require(record.count == size, f"`out` has {record.count} bytes: a record of {k} elements takes {size}")
    _require(room.count >= needed, f"`workspace` has {room.count} bytes: {needed} are needed")
    call.module.topk_encode(
        call.where,
        found.dtype,
        found.address,
        found.count,
        k,
        record.address,
        call.address("residual"),
        call.address("next_residual"),
        residual_scale,
        room.address,
    )
    return out


def topk_workspace_bytes(x: Any) -> int:
    return int(native().topk_workspace_bytes(describe(x).count))


def topk_decode_add(record: Any, k: int, sum: Any, *, stream: Any = None, blocks: int = 0) -> Any:
    """Adds a record's values to `sum`, float32. Entries that do not fit it are left out."""
    call = _Call(stream, blocks, record=record, sum=sum)
    found = call.one("sum")
    if found.dtype != "float32":
        raise TypeError(f"`sum` is {found.dtype}: sums are float32")
    size = call.one("record").count
    _require(size == 16 + 8 * k, f"`record` has {size} bytes: one of {k} elements takes {16 + 8 * k}")
    call.module.topk_decode_add(call.where, call.address("record"), k, found.address, found.count)
    return sum
