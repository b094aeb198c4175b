"""A safe encoding of small Python objects, for the object collectives. Nothing is ever unpickled.

What can be encoded: ``None``, ``bool``, ``int`` of any size, ``float`` (NaN and infinities included),
``str``, ``bytes``, ``list``, and ``dict`` with ``str`` keys: the types of JSON plus bytes, and exactly these.
A subclass, a tuple or a NumPy scalar would come back as another type, so it is a TypeError that names the
type and the place, as in ``obj["a"][3]``.

Format: one byte for the type, then

    N T F    None, True, False: nothing
    I        length, the integer's bytes (two's complement, little-endian, the shortest)
    D        8 bytes, an IEEE double, little-endian
    S B      length, UTF-8 or the bytes themselves
    L        length, that many values
    M        length, that many pairs: length and UTF-8 of the key, value

with lengths in base 128, low digits first, the top bit of a byte saying that more follow.

`decode` accepts any bytes: it returns an object or raises ValueError, and the size of its input bounds what
it allocates.
"""

from __future__ import annotations

import struct
from typing import TypeAlias

Object: TypeAlias = None | bool | int | float | str | bytes | list["Object"] | dict[str, "Object"]

MAX_DEPTH = 100  # lists and dicts within each other


def encode(obj: object) -> bytes:
    """Raises TypeError for objects that cannot be encoded, ValueError for those nested too deeply."""
    out = bytearray()
    _encode(obj, out, "obj", 0)
    return bytes(out)


def decode(data: bytes) -> Object:
    """Raises ValueError for bytes that `encode` cannot have written."""
    reader = _Reader(data)
    obj = reader.value(0)
    if reader.left():
        raise ValueError(f"{reader.left()} bytes follow the encoded object")
    return obj


def _encode(obj: object, out: bytearray, path: str, depth: int) -> None:
    kind = type(obj)
    if obj is None:
        out += b"N"
    elif obj is True:
        out += b"T"
    elif obj is False:
        out += b"F"
    elif isinstance(obj, int) and kind is int:
        out += b"I"
        _put_sized(out, obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True))
    elif isinstance(obj, float) and kind is float:
        out += b"D" + struct.pack("<d", obj)
    elif isinstance(obj, str) and kind is str:
        out += b"S"
        _put_sized(out, _utf8(obj))
    elif isinstance(obj, bytes) and kind is bytes:
        out += b"B"
        _put_sized(out, obj)
    elif isinstance(obj, list) and kind is list:
        _check_depth(path, depth)
        out += b"L"
        _put_length(out, len(obj))
        for i, item in enumerate(obj):
            _encode(item, out, f"{path}[{i}]", depth + 1)
    elif isinstance(obj, dict) and kind is dict:
        _check_depth(path, depth)
        out += b"M"
        _put_length(out, len(obj))
        for key, item in obj.items():
            if type(key) is not str:
                raise TypeError(f"{path} has a key of type {type(key).__name__}, {key!r}: keys must be str")
            _put_sized(out, _utf8(key))
            _encode(item, out, f'{path}["{key}"]', depth + 1)
    else:
        raise TypeError(
            f"{path} is of type {kind.__module__}.{kind.__qualname__}, which cannot be sent as an object:"
            " use None, bool, int, float, str, bytes, list and dict with str keys (convert a tuple with"
            " list(), a NumPy scalar with .item(), and send arrays with the collectives for arrays)"
        )


def _check_depth(path: str, depth: int) -> None:
    if depth >= MAX_DEPTH:
        where = path if len(path) <= 60 else path[:60] + "..."
        raise ValueError(
            f"{where} is nested more than {MAX_DEPTH} levels deep, or contains itself: make it flatter"
        )


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # preserves any str, lone surrogates included


def _put_length(out: bytearray, length: int) -> None:
    while length >= 0x80:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    out.append(length)


def _put_sized(out: bytearray, data: bytes) -> None:
    _put_length(out, len(data))
    out += data


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def left(self) -> int:
        return len(self._data) - self._at

    def value(self, depth: int) -> Object:
        kind = self._take(1)
        if kind == b"N":
            return None
        if kind == b"T":
            return True
        if kind == b"F":
            return False
        if kind == b"I":
            return int.from_bytes(self._sized(), "little", signed=True)
        if kind == b"D":
            number: float = struct.unpack("<d", self._take(8))[0]
            return number
        if kind == b"S":
            return self._text()
        if kind == b"B":
            return self._sized()
        if kind in (b"L", b"M") and depth >= MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        if kind == b"L":
            return [self.value(depth + 1) for _ in range(self._length(item_bytes=1))]
        if kind == b"M":
            pairs: dict[str, Object] = {}
            for _ in range(self._length(item_bytes=2)):
                key = self._text()
                if key in pairs:
                    raise ValueError(f"the key {key!r} occurs twice")
                pairs[key] = self.value(depth + 1)
            return pairs
        raise ValueError(f"byte {self._at - 1}: {kind!r} is not a type")

    def _take(self, count: int) -> bytes:
        if count > self.left():
            raise ValueError(f"byte {self._at}: {count} bytes should follow, {self.left()} do")
        self._at += count
        return self._data[self._at - count : self._at]

    def _length(self, item_bytes: int) -> int:
        """Reads a length, and checks that as many items of at least `item_bytes` can follow."""
        length = 0
        for shift in range(0, 63, 7):
            digit = self._take(1)[0]
            length |= (digit & 0x7F) << shift
            if digit < 0x80:
                if length * item_bytes > self.left():
                    raise ValueError(f"byte {self._at}: {length} items should follow in {self.left()} bytes")
                return length
        raise ValueError(f"byte {self._at}: a length of more than 63 bits")

    def _sized(self) -> bytes:
        return self._take(self._length(item_bytes=1))

    def _text(self) -> str:
        return self._sized().decode("utf-8", "surrogatepass")
