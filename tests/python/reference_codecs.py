"""A reference of the codecs in NumPy, written only from the contracts in csrc/kernels/codec.h and topk.h.

Slow and plain: a codec is anything with the attributes kind, rounding, seed, ceil_scale and hadamard. Where
the contract decides bits, the reference has these bits. Where it does not (the order of summation in a block
of `sign`, and in a rotation of int4), the reference computes in float64, and the bits must be close to that.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Segments = Sequence[tuple[int, int, int]]
F32 = np.float32

KINDS = ["fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "mxfp8", "int8", "int4", "sign"]
TILE = 1024
BLOCK = dict(zip(KINDS, (1, 1, 256, 256, 32, 128, 32, 128), strict=True))
SCALE_BYTES = dict(zip(KINDS, (0, 0, 4, 4, 1, 2, 2, 4), strict=True))
ELEMENT_BITS = dict(zip(KINDS, (16, 16, 8, 8, 8, 8, 4, 1), strict=True))
LARGEST = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "mxfp8": 448.0, "int8": 127.0, "int4": 7.0}
TYPE: dict[str, Any] = {
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "mxfp8": ml_dtypes.float8_e4m3fn,
}
MIN_NORMAL = F32(2.0**-126)
NAN = np.uint32(0x7FC00000).view(F32)


@dataclass(frozen=True)
class Codec:
    kind: str
    rounding: str = "nearest"
    seed: int = 0
    ceil_scale: bool = False
    hadamard: bool = False


class Encoded(NamedTuple):
    wire: Array  # uint8
    decoded: Array  # float32, what the wire decodes to
    next_residual: Array  # float32


# ---- random bits: Philox 4x32-10, Salmon et al., SC 2011 ----


def philox(key: int, low: Array, high: int) -> Array:
    """uint32 (n, 4) for n counters whose low halves are given."""
    mask = np.uint64(0xFFFFFFFF)
    thirty_two = np.uint64(32)
    counters = [low & mask, low >> thirty_two]
    counters += [np.full_like(low, high & 0xFFFFFFFF), np.full_like(low, high >> 32)]
    keys = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a = counters[0] * np.uint64(0xD2511F53)
        b = counters[2] * np.uint64(0xCD9E8D57)
        counters = [
            (b >> thirty_two) ^ counters[1] ^ np.uint64(keys[0]),
            b & mask,
            (a >> thirty_two) ^ counters[3] ^ np.uint64(keys[1]),
            a & mask,
        ]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(counters, axis=1).astype("<u4")


@functools.lru_cache(maxsize=8)  # data of similar lengths needs the same bits
def _philox_again(key: int, packed_low: bytes, high: int) -> Array:
    return philox(key, np.frombuffer(packed_low, np.uint64), high)


def random_bits(bits: int, seed: int, stream: tuple[int, int, int], places: Array) -> Array:
    """`bits` (8 or 16) random bits for each element, whose `places` are tensor << 40 | offset."""
    step, turn, rank = stream
    per_counter = 128 // bits
    groups, where = np.unique(places // np.uint64(per_counter), return_inverse=True)
    words = _philox_again(seed, groups.tobytes(), step << 32 | (turn & 0xFF) << 24 | rank & 0xFFFFFF)
    drawn = words.view(np.uint8 if bits == 8 else "<u2")
    return drawn[where.ravel(), (places % np.uint64(per_counter)).astype(np.int64)].astype(np.int64)


# ---- one element ----


def round_float(y: Array, dtype: Any, r: Array | None, bits: int = 8) -> Array:
    """Rounds finite float32 to the nearest value of a small float, or to one of its neighbours; saturates."""
    info = ml_dtypes.finfo(dtype)
    largest = F32(info.max)
    if r is None:
        return np.clip(y, -largest, largest).astype(dtype)
    magnitude = np.abs(y).astype(np.float64)
    _, exponent = np.frexp(magnitude)  # magnitude = m 2^exponent with m in [1/2, 1)
    ulp = np.ldexp(1.0, np.maximum(exponent - 1, info.minexp) - info.nmant)
    ulps = np.floor(magnitude / ulp + (2 * r + 1) / 2.0 ** (bits + 1))  # exact: float64
    return np.copysign(np.minimum(ulps * ulp, float(largest)), y).astype(dtype)


def round_integer(y: Array, limit: float, r: Array | None) -> Array:
    rounded = np.rint(y) if r is None else np.floor(y.astype(np.float64) + (2 * r + 1) / 512)  # exact
    return np.clip(rounded, -limit, limit).astype(np.int64)


# ---- blocks ----


def bfloat16_up(s: Array) -> Array:
    """The least bfloat16 that is not below a positive float32, as float32."""
    return (((s.view(np.uint32).astype(np.uint64) + 0xFFFF) >> 16 << 16).astype(np.uint32)).view(F32)


def block_scales(codec: Any, amax: Array) -> Array:
    """The scales of finite blocks; 0 for those that decode to zeros."""
    kind = codec.kind
    top = F32(LARGEST[kind])
    if kind == "mxfp8":
        _, exponent = np.frexp(amax)
        exponent = exponent - 1 - 8
        if codec.ceil_scale:
            exponent = np.where(
                amax.astype(np.float64) > 448 * np.ldexp(1.0, exponent), exponent + 1, exponent
            )
        exponent = np.minimum(exponent, 119)  # 448 * 2^119 is finite
        return np.where((amax == 0) | (exponent < -126), 0, np.ldexp(1.0, exponent)).astype(F32)
    scales = amax / top
    if kind in ("int8", "int4"):
        scales = bfloat16_up(scales)
    # The largest scale, of the type on the wire, with which the largest code is finite.
    step = np.uint32(1 << 16) if kind in ("int8", "int4") else np.uint32(1)
    with np.errstate(over="ignore"):
        while (too_large := np.isinf(top * scales)).any():
            scales = np.where(too_large, (scales.view(np.uint32) - step).view(F32), scales)
    return np.where(scales < MIN_NORMAL, F32(0), scales)


def hadamard(blocks: Array) -> Array:
    """Rows of 32 times Sylvester's matrix, in float64; applied twice it gives 32 times the rows."""
    rotated: Array = blocks.astype(np.float64) @ sylvester(32)
    return rotated


@functools.cache
def sylvester(order: int) -> Array:
    if order == 1:
        return np.ones((1, 1))
    half = sylvester(order // 2)
    return np.block([[half, half], [half, -half]])


def encode(
    codec: Any,
    x: Array,
    *,
    step: int = 0,
    turn: int = 0,
    rank: int = 0,
    index: int = 0,
    segments: Segments | None = None,
    residual: Array | None = None,
    residual_scale: float = 1.0,
) -> Encoded:
    """Encodes elements [index, index + len(x)) of the data; `index` is a multiple of TILE."""
    kind, count, block = codec.kind, len(x), BLOCK[codec.kind]
    padded = -(-count // TILE) * TILE
    v, e = np.zeros(padded, F32), np.zeros(padded, F32)
    v[:count] = x.astype(F32)
    k = F32(residual_scale)
    if residual is not None:
        e[:count] = residual
        with np.errstate(all="ignore"):
            v[:count] += k * e[:count]

    # Each element's tensor and its offset in it; elements outside of all tensors count as zero.
    position = np.arange(index, index + padded)
    tensor, begin = np.full(padded, -1), np.zeros(padded, np.int64)
    for first, last, name in [(0, index + count, 0)] if segments is None else segments:
        inside = (first <= position) & (position < min(last, index + count))
        tensor[inside], begin[inside] = name, first
    v[tensor < 0] = 0
    places = np.where(tensor < 0, 0, tensor << 40 | (position - begin)).astype(np.uint64)
    scales, words, decoded = _encode_all(codec, v, tensor >= 0, places, (step, turn, rank))
    good = np.repeat(np.isfinite(v.reshape(-1, block)).all(axis=1), block)
    with np.errstate(all="ignore"):
        kept = np.where(good, (v - decoded) / k, e).astype(F32)
    kept[tensor < 0] = 0
    return Encoded(pack_wire(kind, scales, words, count), decoded[:count].astype(F32), kept[:count])


def encode_beginnings(codec: Any, x: Array, *, step: int = 0) -> Iterator[tuple[Array, Encoded]]:
    """x[:n] and the result of encode() on it, without a residual, for each n from 0 to len(x): only the last
    block of each is encoded anew, since blocks are independent."""
    kind, block, stream = codec.kind, BLOCK[codec.kind], (step, 0, 0)
    position = np.arange(-(-len(x) // TILE) * TILE)
    padded = np.zeros(len(position), F32)
    padded[: len(x)] = x

    def encode_last(lengths: Array) -> tuple[Array, Array, Array]:
        blocks = position.reshape(-1, block)[(lengths - 1) // block]
        inside = blocks < lengths[:, None]
        v = np.where(inside, padded[blocks], F32(0))
        places = np.where(inside, blocks, 0).astype(np.uint64)
        found = _encode_all(codec, v.ravel(), inside.ravel(), places.ravel(), stream)
        return tuple(each.reshape(len(lengths), -1) for each in found)  # type: ignore[return-value]

    all_scales, all_words, all_decoded = encode_last(np.arange(block, len(position) + 1, block))
    last_scales, last_words, last_decoded = encode_last(np.arange(1, len(x) + 1))
    yield x[:0], Encoded(np.zeros(0, np.uint8), np.zeros(0, F32), np.zeros(0, F32))
    for n in range(1, len(x) + 1):
        last, size = (n - 1) // block, -(-n // TILE) * TILE // block
        parts = []
        for whole, ends in ((all_scales, last_scales), (all_words, last_words), (all_decoded, last_decoded)):
            part = whole[:size].copy()
            part[last], part[last + 1 :] = ends[n - 1], 0
            parts.append(part)
        scales, words, decoded = parts
        yield x[:n], Encoded(pack_wire(kind, scales.ravel(), words, n), decoded.ravel()[:n], np.zeros(n, F32))


def _encode_all(
    codec: Any, v: Array, inside: Array, places: Array, stream: tuple[int, int, int]
) -> tuple[Array, Array, Array]:
    """Scales, words on the wire and decoded values of whole blocks."""
    kind, block = codec.kind, BLOCK[codec.kind]
    r = None
    if codec.rounding == "stochastic" and kind != "sign":
        r = random_bits(16 if kind == "bf16" else 8, codec.seed, stream, places)
    with np.errstate(all="ignore"):
        if kind in ("fp16", "bf16"):
            passed = np.where(np.isnan(v), NAN, v).astype(TYPE[kind])
            finite = np.where(np.isfinite(v), v, 0).astype(F32)
            codes = np.where(
                np.isfinite(v), round_float(finite, TYPE[kind], r, 8 if kind == "fp16" else 16), passed
            )
            return np.zeros(0, F32), codes.view(np.uint16), codes.astype(F32)
        blocks = v.reshape(-1, block)
        good = np.isfinite(blocks).all(axis=1)
        finite = np.where(good[:, None], blocks, F32(0))
        scales, words, decoded = _encode_blocks(codec, finite, inside.reshape(-1, block), r)
        return np.where(good, scales, NAN), words, np.where(good[:, None], decoded, NAN).ravel()


def _encode_blocks(codec: Any, blocks: Array, inside: Array, r: Array | None) -> tuple[Array, Array, Array]:
    """Scales, words on the wire and decoded values of finite blocks."""
    kind = codec.kind
    if kind == "sign":
        counts = np.maximum(inside.sum(axis=1), 1)
        scales = (np.abs(blocks).astype(np.float64).sum(axis=1) / counts).astype(F32)
        scales = np.where(scales < MIN_NORMAL, F32(0), scales)
        negative = (blocks < 0) & (scales[:, None] > 0)
        return scales, negative, np.where(negative, -scales[:, None], scales[:, None])
    rotated = (hadamard(blocks) / 32).astype(F32) if codec.hadamard else blocks
    scales = block_scales(codec, np.abs(rotated).max(axis=1))
    zero = scales == 0
    inverse = F32(1) / np.where(zero, F32(1), scales)
    y = np.where(zero[:, None], F32(0), rotated * inverse[:, None])
    if r is not None:
        r = r.reshape(y.shape)
    if kind in TYPE:
        codes = round_float(y, TYPE[kind], r)
        words, values = codes.view(np.uint8), codes.astype(F32)
    else:
        integers = round_integer(y, LARGEST[kind], r)
        words, values = integers.astype(np.int8).view(np.uint8), integers.astype(F32)
    decoded = values * scales[:, None]
    if codec.hadamard:
        decoded = hadamard(decoded).astype(F32)
    words = np.where(zero[:, None], 0, words).astype(np.uint8)
    return scales, words, np.where(zero[:, None], F32(0), decoded)


# ---- the wire ----


def scale_words(kind: str, scales: Array) -> Array:
    if kind == "mxfp8":
        exponents = np.frexp(np.where(np.isnan(scales), F32(1), scales))[1] - 1 + 127
        return np.where(np.isnan(scales), 255, np.where(scales == 0, 0, exponents)).astype(np.uint8)
    if kind in ("int8", "int4"):
        return (scales.view(np.uint32) >> 16).astype("<u2")
    return scales.astype("<f4")


def pack_wire(kind: str, scales: Array, words: Array, count: int) -> Array:
    """Tiles: scales, then elements; the last tile's elements end at a multiple of 16 bytes."""
    if kind == "sign":
        elements = np.packbits(words.ravel(), bitorder="little")
    elif kind == "int4":
        nibbles = words.ravel() & 0xF
        elements = nibbles[0::2] | nibbles[1::2] << 4
    else:
        elements = np.ascontiguousarray(words).ravel().astype("<u2" if kind in ("fp16", "bf16") else "u1")
    elements = elements.view(np.uint8).reshape(-1, TILE * ELEMENT_BITS[kind] // 8)
    parts = scale_words(kind, scales).view(np.uint8)
    parts = parts.reshape(len(elements), SCALE_BYTES[kind] * TILE // BLOCK[kind])
    wire = np.concatenate([parts, elements], axis=1).ravel()
    return wire[: wire_bytes(kind, count)]


def wire_bytes(kind: str, count: int) -> int:
    scales = SCALE_BYTES[kind] * TILE // BLOCK[kind]
    full, rest = divmod(count, TILE)
    size = full * (scales + TILE * ELEMENT_BITS[kind] // 8)
    if rest:
        size += scales + -(-rest * ELEMENT_BITS[kind] // 128) * 16
    return size


def decode(codec: Any, wire: Array, count: int) -> Array:
    """Decodes to float32 by the layout alone, so that it tests `encode` as well."""
    kind, block = codec.kind, BLOCK[codec.kind]
    tiles = -(-count // TILE)
    whole = np.zeros(tiles * wire_bytes(kind, TILE), np.uint8)
    whole[: len(wire)] = wire
    whole = whole.reshape(tiles, wire_bytes(kind, TILE))
    cut = SCALE_BYTES[kind] * TILE // block
    parts, elements = np.ascontiguousarray(whole[:, :cut]), np.ascontiguousarray(whole[:, cut:])
    if kind in ("fp16", "bf16"):
        return elements.view(TYPE[kind]).ravel()[:count].astype(F32)
    if kind == "mxfp8":
        scales = np.where(parts == 255, NAN, np.ldexp(1.0, parts.astype(np.int64) - 127)).astype(F32).ravel()
        scales = np.where(scales < MIN_NORMAL, F32(0), scales)
    elif kind in ("int8", "int4"):
        scales = (parts.view("<u2").astype(np.uint32) << 16).view(F32).ravel()
    else:
        scales = parts.view("<f4").ravel()
    if kind == "sign":
        values = 1 - 2 * np.unpackbits(elements.ravel(), bitorder="little").astype(F32)
    elif kind == "int4":
        nibbles = np.stack([elements.ravel() & 0xF, elements.ravel() >> 4], axis=1).ravel().astype(np.int64)
        values = (nibbles - 16 * (nibbles > 7)).astype(F32)
    elif kind == "int8":
        values = elements.ravel().view(np.int8).astype(F32)
    else:
        values = elements.ravel().view(TYPE[kind]).astype(F32)
    with np.errstate(all="ignore"):
        decoded = values.reshape(-1, block) * scales[:, None]
        if codec.hadamard:
            decoded = hadamard(decoded).astype(F32)
        decoded = np.where(np.isnan(scales)[:, None], NAN, np.where(scales[:, None] == 0, F32(0), decoded))
    return decoded.ravel()[:count].astype(F32)


# ---- top-k ----


def topk_record_bytes(capacity: int) -> int:
    return 16 + 8 * capacity


def topk(v: Array, k: int) -> Array:
    """The indices, ascending, of the k largest float32 values: NaN before Inf, ties to the lowest index."""
    keys = np.where(np.isnan(v), np.int64(1) << 40, (v.view(np.uint32) & 0x7FFFFFFF).astype(np.int64))
    return np.sort(np.argsort(-keys, kind="stable")[:k])


def topk_record(v: Array, indices: Array, capacity: int) -> Array:
    record = np.zeros(topk_record_bytes(capacity), np.uint8)
    record[:4] = np.array([len(indices)], "<u4").view(np.uint8)
    record[16 : 16 + 4 * len(indices)] = indices.astype("<u4").view(np.uint8)
    start = 16 + 4 * capacity
    record[start : start + 4 * len(indices)] = v[indices].astype("<f4").view(np.uint8)
    return record


# ---- shared_int ----


def shared_int(
    xs: Sequence[Array],
    width: int,
    seed: int,
    step: int,
    *,
    divisor: float = 1.0,
    segments: Segments | None = None,
) -> Array:
    """The result of an all_reduce of the ranks' `xs`, in float32."""
    count, block = len(xs[0]), 128
    padded = -(-count // block) * block
    limit = (2 ** (width - 1) - 1) // len(xs)
    levels = F32(limit)  # rounded down if not exact, or sums could overflow
    levels = np.nextafter(levels, F32(0)) if int(levels) > limit else levels
    position = np.arange(padded)
    places, inside = np.zeros(padded, np.uint64), np.zeros(padded, bool)
    for first, last, name in [(0, count, 0)] if segments is None else segments:
        here = (first <= position) & (position < last)
        places[here] = np.uint64(name << 40) | (position[here] - first).astype(np.uint64)
        inside |= here
    blocks = []
    for x in xs:
        v = np.zeros(padded, F32)
        v[:count] = x.astype(F32)
        v[~inside] = 0
        blocks.append(v.reshape(-1, block))
    amax = np.max([np.abs(b).max(axis=1) for b in blocks], axis=0)  # NaN propagates
    finite = np.isfinite(amax)
    scales = np.maximum(np.where(finite, amax, F32(0)) / levels, MIN_NORMAL)
    scales = np.where(finite & (amax < MIN_NORMAL), F32(0), scales).astype(F32)
    total = np.zeros((len(amax), block), np.int64)
    for rank, b in enumerate(blocks):
        r = random_bits(8, seed, (step, 0, rank), places).reshape(b.shape)
        used = finite & (scales > 0)
        with np.errstate(all="ignore"):
            y = np.where(used[:, None], b * (F32(1) / np.where(used, scales, F32(1)))[:, None], F32(0))
        total += round_integer(y, float(levels), r) * used[:, None]
    with np.errstate(all="ignore"):
        decoded = total.astype(F32) * scales[:, None] / F32(divisor)
    return np.where(finite[:, None], decoded, NAN).ravel()[:count].astype(F32)


# ---- routes: the results of collectives ----


def two_shot(codec: Any, xs: Sequence[Array], *, step: int = 0, feedback: list[Array] | None = None) -> Array:
    """The average: the owners of chunks sum the others' encoded values, and encode the average once.

    `feedback`, with a residual for each rank, is updated in place, in units of the sum.
    """
    n, count = len(xs), len(xs[0])
    out = np.empty(count, F32)
    for owner, chunk in enumerate(chunks(count, n)):
        total = xs[owner][chunk].astype(F32)
        for rank in range(n):
            if rank == owner:
                continue
            e = None if feedback is None else feedback[rank][chunk]
            sent = encode(codec, xs[rank][chunk], step=step, rank=rank, index=chunk.start, residual=e)
            if feedback is not None:
                feedback[rank][chunk] = sent.next_residual
            total = total + sent.decoded
        e = None if feedback is None else feedback[owner][chunk]
        sent = encode(
            codec,
            total / F32(n),
            step=step,
            turn=1,
            rank=owner,
            index=chunk.start,
            residual=e,
            residual_scale=1 / n,
        )
        if feedback is not None:
            feedback[owner][chunk] = sent.next_residual
        out[chunk] = sent.decoded
    return out


def ring(codec: Any, xs: Sequence[Array], *, step: int = 0, feedback: list[Array] | None = None) -> Array:
    """The average: on every hop a partial sum is decoded, added to and encoded again."""
    n, count = len(xs), len(xs[0])
    out = np.empty(count, F32)
    for owner, chunk in enumerate(chunks(count, n)):
        total = np.zeros(chunk.stop - chunk.start, F32)
        for hop in range(n):
            rank = (owner + 1 + hop) % n
            total = total + xs[rank][chunk].astype(F32)
            last = hop == n - 1
            e = None if feedback is None else feedback[rank][chunk]
            sent = encode(
                codec,
                total / F32(n) if last else total,
                step=step,
                turn=1 if hop else 0,
                rank=rank,
                index=chunk.start,
                residual=e,
                residual_scale=1 / n if last else 1,
            )
            if feedback is not None:
                feedback[rank][chunk] = sent.next_residual
            total = sent.decoded
        out[chunk] = total
    return out


def chunks(count: int, n: int) -> list[slice]:
    tiles = -(-count // TILE)
    edges = [min(tiles * rank // n * TILE, count) for rank in range(n + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def vnmse(got: Array, exact: Array) -> float:
    """|got - exact|^2 / |exact|^2, vector normalised mean square error."""
    exact = exact.astype(np.float64)
    return float(np.sum((got - exact) ** 2) / np.sum(exact**2))
