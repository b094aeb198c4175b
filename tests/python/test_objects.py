import math
import struct
import tracemalloc
from enum import IntEnum

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pycomm.objects import MAX_DEPTH, Object, decode, encode

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(1 << 4000), 1 << 4000)
    | st.floats()
    | st.text(st.characters())
    | st.text(st.characters(categories=["Cs"]))
    | st.binary()
)
OBJECTS = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30
)


def same(a: object, b: object) -> bool:
    """Whether two objects are equal, with the same types; floats are compared by their bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return a == b


@given(OBJECTS)
def test_round_trip(obj: Object) -> None:
    assert same(decode(encode(obj)), obj)


@pytest.mark.parametrize(
    ("obj", "data"),
    [
        (None, b"N"),
        (True, b"T"),
        (False, b"F"),
        (0, b"I\x01\x00"),
        (-1, b"I\x01\xff"),
        (127, b"I\x01\x7f"),
        (128, b"I\x02\x80\x00"),
        (1.0, b"D\0\0\0\0\0\0\xf0\x3f"),
        ("\u00e9", b"S\x02\xc3\xa9"),
        (b"x" * 200, b"B\xc8\x01" + b"x" * 200),
        ([None, []], b"L\x02NL\x00"),
        ({"a": 1}, b"M\x01\x01aI\x01\x01"),
    ],
)
def test_format(obj: object, data: bytes) -> None:
    assert encode(obj) == data
    assert same(decode(data), obj)


@pytest.mark.parametrize("value", [math.inf, -math.inf, -0.0, math.nan, 5e-324])
def test_floats(value: float) -> None:
    assert same(decode(encode(value)), value)


class Color(IntEnum):
    red = 1


@pytest.mark.parametrize(
    ("obj", "words"),
    [
        ((1, 2), ["obj is", "tuple", "list()"]),
        ({"a": [0, 1, 2, {3}]}, ['obj["a"][3]', "set"]),
        ([np.float64(1)], ["obj[0]", "numpy.float64", ".item()"]),
        ([Color.red], ["obj[0]", "Color"]),
        ({"a": {1: 2}}, ['obj["a"]', "key", "int"]),
        (bytearray(b"x"), ["bytearray"]),
        (object, ["obj is", "type"]),
        (lambda: 0, ["function"]),
        (1j, ["complex"]),
    ],
)
def test_other_types_are_named(obj: object, words: list[str]) -> None:
    with pytest.raises(TypeError) as raised:
        encode(obj)
    for word in words:
        assert word in str(raised.value)


def nested(depth: int) -> list[object]:
    obj: list[object] = []
    for _ in range(depth - 1):
        obj = [obj]
    return obj


def test_depth() -> None:
    deepest = nested(MAX_DEPTH)
    assert decode(encode(deepest)) == deepest
    with pytest.raises(ValueError, match="100 levels"):
        encode([deepest])
    with pytest.raises(ValueError, match="100 levels"):
        decode(b"L\x01" + encode(deepest))
    with pytest.raises(ValueError, match="100 levels"):
        decode(b"L\x01" * 1_000_000)
    itself: list[object] = []
    itself.append(itself)
    with pytest.raises(ValueError, match="contains itself"):
        encode(itself)


@given(
    st.binary(max_size=200)
    | st.lists(st.sampled_from(b"NTFIDSBLM\x00\x01\x02\x80\xff"), max_size=60).map(bytes)
)
def test_any_bytes_are_an_object_or_a_value_error(data: bytes) -> None:
    try:
        obj = decode(data)
    except ValueError:
        return
    assert same(decode(encode(obj)), obj)


@given(OBJECTS)
def test_cut_short(obj: Object) -> None:
    data = encode(obj)
    for end in range(len(data)):
        with pytest.raises(ValueError):
            decode(data[:end])


@pytest.mark.parametrize(
    "data", [b"", b"NN", b"X", b"n", b"M\x02\x01aN\x01aN", b"S\x01\xff", b"D1234567", b"I\xff" + b"\xff" * 20]
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode(data)


@pytest.mark.parametrize("kind", [b"S", b"B", b"I", b"L", b"M"])
@pytest.mark.parametrize("bits", [20, 31, 32, 40, 62])
def test_huge_lengths_allocate_nothing(kind: bytes, bits: int) -> None:
    length = bytearray()
    left = 1 << bits
    while left >= 0x80:
        length.append(left & 0x7F | 0x80)
        left >>= 7
    length.append(left)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="should follow"):
            decode(kind + bytes(length) + b"N" * 8)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()
