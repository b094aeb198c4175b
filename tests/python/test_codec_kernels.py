"""Codecs as loops, bit by bit, against reference_codecs.py: all kinds, types, instruction sets and lengths.

Where codec.h leaves bits open, the comparison is in float64: the last bit of `sign`'s mean, and of int4's
rotation.
"""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference_codecs as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pycomm import _native
from pycomm.codecs.kinds import DEFAULTS, BlockCodec

Array = np.ndarray[Any, Any]
F32 = np.float32
SPECIAL = np.array(
    [
        0.0,
        -0.0,
        np.nan,
        np.inf,
        -np.inf,
        1e-45,
        -1e-40,
        2**-126,
        3.4028235e38,
        -3.4028235e38,
        448,
        65504,
        65520,
        1,
    ],
    F32,
)
ISAS = _native.available_isas()


def codecs() -> Iterator[Any]:
    for kind in reference.KINDS:
        for rounding in ["nearest", "stochastic"] if kind != "sign" else ["nearest"]:
            yield _native.Codec(kind, rounding=rounding, seed=0xFEDCBA9876543210)
    for rounding in ["nearest", "stochastic"]:
        yield _native.Codec("mxfp8", rounding=rounding, ceil_scale=True)
        yield _native.Codec("int4", rounding=rounding, seed=7, hadamard=True)


CODECS = list(codecs())


def test_no_codec_is_left_out() -> None:
    known = [name for name, codec in DEFAULTS.items() if isinstance(codec, BlockCodec)]
    assert known == reference.KINDS


def describe(codec: Any) -> str:
    extras = "-ceil" * codec.ceil_scale + "-hadamard" * codec.hadamard
    return f"{codec.kind}-{codec.rounding}{extras}"


every_codec = pytest.mark.parametrize("codec", CODECS, ids=describe)


def gradient(count: int, seed: int = 0, dtype: Any = F32) -> Array:
    """Heavy-tailed values, with blocks of very different magnitudes."""
    rng = np.random.default_rng([seed, count])
    magnitude = np.repeat(np.exp(4 * rng.standard_normal(count // 100 + 1)), 100)[:count]
    return (rng.standard_t(3, count) * magnitude).astype(dtype)


def same_bits(got: Array, expected: Array, *context: object) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape, context
    wrong = np.flatnonzero(got.view(f"u{got.itemsize}") != expected.view(f"u{got.itemsize}"))
    assert wrong.size == 0, (*context, wrong[:5], got[wrong[:5]], expected[wrong[:5]])


def decoded(codec: Any, wire: Array, count: int, dtype: Any = F32) -> Array:
    out = np.full(count, 99, dtype)
    _native.decode(codec, wire, out)
    return out


def check(
    codec: Any,
    x: Array,
    isa: str | None = None,
    residual: Array | None = None,
    want: reference.Encoded | None = None,
    **encoding: Any,
) -> None:
    """Native encode and decode of x give the reference's wire, values and residuals."""
    context = codec.kind, codec.rounding, len(x), isa
    scale = encoding.get("residual_scale", 1.0)
    want = want or reference.encode(codec, x, residual=residual, **encoding)
    if residual is not None:
        encoding |= {"residual": residual, "next_residual": np.full(len(x), 99, F32)}
    wire = _native.encode(codec, x, isa=isa, **encoding)
    assert wire.size == reference.wire_bytes(codec.kind, len(x)) == codec.wire_bytes(len(x)), context
    got = decoded(codec, wire, len(x))
    if codec.kind == "sign" or codec.hadamard:
        check_nearly(codec, x, got, want.decoded, *context)
        same = reference.decode(codec, wire, len(x))  # the wire decodes to the reference's values
        np.testing.assert_allclose(got, same, rtol=1e-6, atol=np.nanmax(np.abs(same), initial=0) * 1e-6)
    else:
        same_bits(wire, want.wire, *context)
        same_bits(got, want.decoded, *context)
        if residual is not None:
            same_bits(encoding["next_residual"], want.next_residual, *context)
    if residual is not None:  # v = D + k e', whatever was rounded
        v = x.astype(np.float64) + scale * residual.astype(np.float64)
        good = np.isfinite(got)
        back = got[good] + scale * encoding["next_residual"][good].astype(np.float64)
        if encoding.get("segments") is None:
            slack = 4e-7 * (np.abs(v[good]) + np.abs(got[good]) + np.abs(scale * residual[good]))
            assert (np.abs(back - v[good]) <= slack + 1e-44 * max(scale, 1)).all(), context


def check_nearly(codec: Any, x: Array, got: Array, want: Array, *context: object) -> None:
    """Equal except for last bits, and for the few elements of a rotation close to a rounding boundary."""
    same_bits(np.isnan(got), np.isnan(want), *context)
    good = ~np.isnan(want)
    near = np.abs(got[good] - want[good].astype(np.float64)) <= 1e-6 * np.abs(want[good]) + 1e-44
    if codec.kind == "sign":
        assert near.all(), context
        return
    # One code that differs moves the 32 elements of its block by a scale.
    padded = np.zeros(-(-len(x) // 32) * 32)
    padded[: len(x)][good] = np.abs(got[good].astype(np.float64) - want[good])
    spread = np.zeros_like(padded)
    spread[: len(x)][good] = np.abs(want[good])
    moved = padded.reshape(-1, 32).max(axis=1) > 1e-5 * spread.reshape(-1, 32).max(axis=1)
    assert moved.sum() <= max(2, 0.05 * len(moved)), context


# Every length up to more than a tile, then those close to the end of a block or a tile.
LENGTHS = [*range(140), *range(250, 262), *range(1010, 1040), 2047, 2048, 2049, *range(4090, 4100)]


@every_codec
def test_every_length(codec: Any) -> None:
    for count in LENGTHS:
        check(codec, gradient(count), isa=ISAS[count % len(ISAS)], step=count, turn=1, rank=2)


@every_codec
def test_every_length_to_4099(codec: Any) -> None:
    for x, want in reference.encode_beginnings(codec, gradient(4099), step=3):
        check(codec, x, step=3, want=want)


@every_codec
@pytest.mark.parametrize("isa", ISAS)
def test_large_and_unaligned_on_every_instruction_set(codec: Any, isa: str) -> None:
    x = gradient(200_003)
    for start in range(1, 9):
        check(codec, x[start : 150_000 + start], isa=isa, step=2**32 - 1, rank=2**24 - 1, turn=255)


@every_codec
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_types(codec: Any, dtype: Any) -> None:
    x = np.clip(gradient(5003), -6e4, 6e4).astype(dtype)
    check(codec, x, step=5)
    wire = _native.encode(codec, x)
    with np.errstate(over="ignore"):
        same_bits(decoded(codec, wire, len(x), dtype), decoded(codec, wire, len(x)).astype(dtype))
    total = gradient(len(x), 1)
    expected = total + decoded(codec, wire, len(x))
    _native.decode(codec, wire, total, add=True)
    same_bits(total, expected)


@every_codec
@settings(max_examples=60)
@given(st.data())
def test_any_values(codec: Any, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 300))
    floats = st.floats(width=32, allow_nan=True, allow_infinity=True) | st.sampled_from(SPECIAL.tolist())
    x = data.draw(hnp.arrays(F32, count, elements=floats, fill=st.just(0.0)))
    x[x == 0] = 0  # the rotation's zeros may differ in sign
    step, turn, rank = data.draw(
        st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 255), st.integers(0, 2**24 - 1))
    )
    if codec.hadamard or codec.kind == "sign":
        x = np.clip(x, -1e37, 1e37)
    check(codec, x, isa=data.draw(st.sampled_from(ISAS)), step=step, turn=turn, rank=rank)


@every_codec
def test_special_values(codec: Any) -> None:
    """Each value alone, in a block of ones and in a block of zeros: NaN if it is not finite, never Inf."""
    block = max(reference.BLOCK[codec.kind], 1)
    for value in SPECIAL:
        for others in (0.0, 1.0):
            x = np.full(3 * block, others, F32)
            x[block] = value
            got = decoded(codec, _native.encode(codec, x), len(x))
            if codec.kind in ("fp16", "bf16"):
                assert np.isfinite(value) or (np.isnan(value) and np.isnan(got[1])) or got[1] == value
                assert np.isfinite(np.delete(got, 1)).all()
            elif np.isfinite(value):
                assert np.isfinite(got).all(), (value, others)
            else:
                assert (got[block : 2 * block].view(np.uint32) == 0x7FC00000).all(), (value, others)
                assert np.isfinite(got[:block]).all() and np.isfinite(got[2 * block :]).all()


@every_codec
def test_nothing_finite_decodes_to_infinity(codec: Any) -> None:
    rng = np.random.default_rng(3)
    for low in (0.0, 0.9, 1.0):
        x = (rng.uniform(low, 1, 4096) * rng.choice([-1, 1], 4096)).astype(F32) * F32(3.4028235e38)
        got = decoded(codec, _native.encode(codec, x), len(x))
        assert np.isfinite(got).all(), (low, np.flatnonzero(~np.isfinite(got))[:5])


@every_codec
def test_zeros_and_denormal_scales_are_positive_zero(codec: Any) -> None:
    for x in (np.zeros(700, F32), np.full(700, -0.0, F32), np.full(700, -1e-42, F32)):
        got = decoded(codec, _native.encode(codec, x), len(x))
        assert codec.kind in ("fp16", "bf16") or (got.view(np.uint32) == 0).all()


@every_codec
def test_the_error_does_not_depend_on_the_magnitude(codec: Any) -> None:
    if codec.kind == "fp16":
        pytest.skip("its range is that of the format: 6e-8 to 65504")
    x = np.random.default_rng(4).standard_normal(1 << 14).astype(F32)
    at_one = reference.vnmse(decoded(codec, _native.encode(codec, x), len(x)), x)
    for magnitude in (1e-30, 1e-20, 1e-5, 1e10, 1e30):
        scaled = (x * F32(magnitude)).astype(F32)
        got = decoded(codec, _native.encode(codec, scaled), len(x))
        # Scales are powers of two: the distance of a block's magnitude to the next one matters.
        slack = 1.25 if codec.kind == "mxfp8" else 1.05
        assert 1 / slack < reference.vnmse(got, scaled) / at_one < slack, magnitude


@every_codec
@pytest.mark.parametrize("isa", ISAS)
def test_residuals(codec: Any, isa: str) -> None:
    x, residual = gradient(3001), gradient(3001, 1)
    x[[5, 300, 1500]] = np.nan, np.inf, -np.inf
    for scale in (1.0, 0.125, 1024.0, 1 / 3):
        check(codec, x, isa, residual, step=1, residual_scale=scale)
    in_place = residual.copy()
    _native.encode(codec, x, residual=in_place, next_residual=in_place)
    apart = np.empty_like(residual)
    _native.encode(codec, x, residual=residual, next_residual=apart)
    same_bits(in_place, apart)
    block = reference.BLOCK[codec.kind]
    for place in (5, 300, 1500):  # a block that is not finite keeps e
        kept = slice(place // block * block, (place // block + 1) * block)
        same_bits(in_place[kept], residual[kept])


@every_codec
@pytest.mark.parametrize("isa", ISAS)
def test_segments(codec: Any, isa: str) -> None:
    """A tensor's bits do not depend on its place in a bucket, nor on its neighbours."""
    lengths, ids = [1000, 1, 256, 0, 700, 2500], [5, 2**24 - 1, 0, 8, 9, 77]
    begins = np.cumsum([0, *(-(-n // 256) * 256 for n in lengths)])
    segments = [(int(b), int(b) + n, i) for b, n, i in zip(begins, lengths, ids, strict=False)]
    x = gradient(int(begins[-1]), 2)  # the gaps hold garbage, which must not matter
    check(codec, x, isa, step=9, segments=segments)
    check(codec, x, isa, gradient(len(x), 3), step=9, segments=segments)
    got = decoded(codec, _native.encode(codec, x, step=9, segments=segments, isa=isa), len(x))
    for begin, end, number in segments:
        alone = x[begin:end].copy()
        wire = _native.encode(codec, alone, step=9, segments=[(0, end - begin, number)])
        same_bits(got[begin:end], decoded(codec, wire, end - begin), number)
    inside = np.zeros(len(x), bool)
    for begin, end, _ in segments:
        inside[begin:end] = True
    if codec.kind != "sign":  # its bits cannot represent zero: gaps decode to the block's mean
        assert (got[~inside] == 0).all() or codec.hadamard


@every_codec
def test_random_bits_tell_steps_stages_ranks_and_seeds_apart(codec: Any) -> None:
    if codec.rounding == "nearest":
        pytest.skip("nothing random")
    x = gradient(2048)
    base = {"step": 1, "turn": 1, "rank": 1}
    wires = [_native.encode(codec, x, **base).tobytes()]
    wires += [_native.encode(codec, x, **{**base, key: 2}).tobytes() for key in base]
    wires.append(_native.encode(codec, x, segments=[(0, len(x), 1)], **base).tobytes())
    other = _native.Codec(codec.kind, rounding="stochastic", seed=codec.seed + 1, hadamard=codec.hadamard)
    wires.append(_native.encode(other, x, **base).tobytes())
    assert len(set(wires)) == len(wires)
    assert _native.encode(codec, x, **base).tobytes() == wires[0]


@every_codec
def test_stochastic_rounding_has_no_bias(codec: Any) -> None:
    if codec.rounding == "nearest":
        pytest.skip("nothing random")
    x = np.random.default_rng(6).standard_normal(1024).astype(F32)
    steps = 2000
    errors = (
        np.array(
            [decoded(codec, _native.encode(codec, x, step=step), len(x)) for step in range(steps)], np.float64
        )
        - x
    )
    # A mean of independent errors is within 5 deviations. 8 bits resolve probabilities to 1/256, so up to
    # half of that remains, relative to the distance between neighbours.
    distance = np.ptp(errors, axis=0).reshape(-1, min(reference.BLOCK[codec.kind], 32)).max(axis=1)
    distance = np.repeat(distance, len(x) // len(distance)) if len(distance) < len(x) else distance.max()
    beyond = np.abs(errors.mean(axis=0)) > 5 * errors.std(axis=0) / np.sqrt(steps) + distance / 512
    saturating = codec.kind == "mxfp8" and not codec.ceil_scale  # the largest of a block saturates on purpose
    assert beyond.sum() <= (len(x) // 20 if saturating else 0), np.flatnonzero(beyond)


def test_philox_gives_its_authors_vectors() -> None:
    """Known answers of Random123: all zeros, and all ones."""
    zeros = reference.philox(0, np.zeros(1, np.uint64), 0)[0]
    assert [hex(word) for word in zeros] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    ones = 2**64 - 1
    words = reference.philox(ones, np.array([ones], np.uint64), ones)[0]
    assert [hex(word) for word in words] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]


# ---- top-k ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_topk(isa: str, dtype: Any) -> None:
    rng = np.random.default_rng(8)
    for count in [0, 1, 2, 15, 16, 17, 1000, 4099, 100_003]:
        for x in (
            rng.standard_normal(count).astype(dtype),
            rng.integers(-3, 4, count).astype(dtype),  # thousands of ties
            np.zeros(count, dtype),
            (rng.standard_normal(count) * 10.0 ** rng.integers(-30, 5, count)).astype(dtype),
            np.where(rng.random(count) < 0.01, np.nan, np.where(rng.random(count) < 0.5, np.inf, -1)).astype(
                dtype
            ),
        ):
            for k in {1, 2, max(1, count // 100), max(1, count // 2), max(count, 1), count + 3}:
                v = x.astype(F32)
                chosen = reference.topk(v, k)
                record = _native.topk_encode(x, k, isa=isa)
                want = reference.topk_record(v, chosen, k)
                finite = np.isfinite(v[chosen]).all()
                same_bits(
                    record if finite else record[: 16 + 4 * k],
                    want if finite else want[: 16 + 4 * k],
                    count,
                    k,
                )
                total = np.ones(count, F32)
                _native.topk_decode_add(record, k, total)
                expected = np.ones(count, F32)
                expected[chosen] += v[chosen]
                np.testing.assert_array_equal(total, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_topk_residuals(isa: str) -> None:
    x, residual = gradient(5003), gradient(5003, 1)
    for scale in (1.0, 3.0):
        after = np.empty_like(x)
        record = _native.topk_encode(
            x, 50, residual=residual, next_residual=after, residual_scale=scale, isa=isa
        )
        v = x + F32(scale) * residual
        chosen = reference.topk(v, 50)
        same_bits(record, reference.topk_record(v, chosen, 50))
        left = v / F32(scale)
        left[chosen] = 0
        np.testing.assert_array_equal(after, left)


def test_topk_records_that_do_not_fit_are_refused() -> None:
    record = _native.topk_encode(gradient(1000), 10)
    with pytest.raises(ValueError):
        _native.topk_decode_add(record, 10, np.zeros(3, F32))  # indices beyond the sum
    record[:4] = 255
    with pytest.raises(ValueError):
        _native.topk_decode_add(record, 10, np.zeros(1000, F32))  # a count beyond the capacity
