"""Codecs, shared integers and top-k on GPU buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pycomm import _native
from pycomm.cuda.arrays import Call, describe, native, new_bytes, require, stream_handle


def _segments(segments: Sequence[tuple[int, int, int]] | None) -> list[tuple[int, int, int]]:
    """As the codecs need them: in order, at multiples of 256, and numbered below 2^24."""
    found = [(int(begin), int(end), int(number)) for begin, end, number in segments or ()]
    last = 0
    for i, (begin, end, number) in enumerate(found):
        require(
            begin % _native.SEGMENT_ALIGN == 0 and last <= begin <= end and 0 <= number < 1 << 24,
            f"`segments[{i}]` is {(begin, end, number)}: tensors follow each other, begin at multiples of "
            f"{_native.SEGMENT_ALIGN}, and have numbers below 2^24",
        )
        last = end
    return found


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
    turn: int = 0,
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
    call = Call(stream, blocks, srcs=list(srcs), out=outs, residual=residual, next_residual=next_residual)
    call.writes("out", "next_residual")
    arrays = call.found["srcs"] + call.found["out"]
    floats = [a for a in arrays if a.dtype != "uint8"]
    if count is None:
        require(bool(floats), "there are wire bytes alone: say with count= how many elements they are of")
        count = floats[0].count
    for a in arrays:
        want, what = (host.wire_bytes(count), "bytes") if a.dtype == "uint8" else (count, "elements")
        require(a.count == want, f"an array has {a.count} {what} where {count} elements take {want}")
    held = formats or ["wire" if a.dtype == "uint8" else "raw" for a in call.found["srcs"]]
    for name in ("residual", "next_residual"):
        for a in call.found[name]:
            require(
                a.dtype == "float32" and a.count == count, f"`{name}` must be {count} elements of float32"
            )
    require(
        (residual is None) == (next_residual is None), "pass both `residual` and `next_residual`, or neither"
    )
    to = out_format or ("wire" if call.found["out"][0].dtype == "uint8" else "final")
    given = {a.dtype for a, f in zip(call.found["srcs"], held, strict=True) if f not in ("wire", "partial")}
    given |= {a.dtype for a in call.found["out"] if to == "final"}
    require(len(given) <= 1, f"floats are {', '.join(sorted(given))}: pass arrays of one type")
    encoding = call.module.Encoding(
        step,
        turn,
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
    if add and (dtype := describe(out, "out").dtype) != "float32":
        raise TypeError(f"`out` is {dtype}: sums are float32")
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
    call = Call(stream, blocks, x=x, amax=amax, residual=residual)
    call.writes("amax")
    found = call.one("x")
    require(
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
    call = Call(stream, blocks, x=x, amax=amax, out=out, residual=residual, next_residual=next_residual)
    call.writes("out", "next_residual")
    found = call.one("x")
    require(call.one("out").count == found.count, "`out` must have as many elements as `x`")
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
    call = Call(stream, blocks, q=q, amax=amax, out=out)
    call.writes("out")
    found = call.one("out")
    require(call.one("q").count == found.count, "`out` must have as many elements as `q`")
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
    call = Call(
        stream, blocks, x=x, residual=residual, next_residual=next_residual, out=out, workspace=workspace
    )
    call.writes("out", "next_residual", "workspace")
    found = call.one("x")
    size = 16 + 8 * k
    needed = call.module.topk_workspace_bytes(found.count)
    if out is None:
        out = call.make("out", size)
    if workspace is None:
        workspace = call.make("workspace", needed)
    record, room = call.one("out"), call.one("workspace")
    require(record.count == size, f"`out` has {record.count} bytes: a record of {k} elements takes {size}")
    require(room.count >= needed, f"`workspace` has {room.count} bytes: {needed} are needed")
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
    """How many bytes topk_encode(x, ..., workspace=) needs: 8 for 4096 elements, and 20 KB."""
    return int(native().topk_workspace_bytes(describe(x).count))


def topk_decode_add(record: Any, k: int, sum: Any, *, stream: Any = None, blocks: int = 0) -> Any:
    """Adds a record's values to `sum`, float32. Entries that do not fit it are left out."""
    call = Call(stream, blocks, record=record, sum=sum)
    call.writes("sum")
    found = call.one("sum")
    if found.dtype != "float32":
        raise TypeError(f"`sum` is {found.dtype}: sums are float32")
    size = call.one("record").count
    require(size == 16 + 8 * k, f"`record` has {size} bytes: one of {k} elements takes {16 + 8 * k}")
    call.module.topk_decode_add(call.where, call.address("record"), k, found.address, found.count)
    return sum
