"""The values of options that several commands have; a ValueError names the option and its value."""

from __future__ import annotations

import re

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
MOST_RANKS = 4096
MOST_NUMBERS = 4096


def parse_size(text: str, option: str = "") -> int:
    found = re.fullmatch(r"(\d{1,20})([KMG]?)(i?B)?", text, re.IGNORECASE)
    if not found:
        raise ValueError(f"{option} {text!r} is not a size: 4, 1K, 64M, 1G".lstrip())
    return int(found[1]) * UNITS[found[2].upper()]


def dtype_name(text: str) -> str:
    """The library's name of the type; a TypeError lists the names."""
    from pycomm import _native  # the launcher starts without it

    return _native.dtype_name(text)


def at_least(least: int, option: str, value: int | None) -> None:
    if value is not None and value < least:
        raise ValueError(f"{option} {value}: at least {least}")


def at_most(most: int, option: str, value: int) -> None:
    if value > most:
        raise ValueError(f"{option} {value}: at most {most}")


def check_ranks(option: str, ranks: int) -> None:
    at_least(1, option, ranks)
    at_most(MOST_RANKS, option, ranks)


def numbers(text: str) -> list[int]:
    """The numbers in a list such as "1-4,8"."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            low, high = int(first), int(last or first)
        except ValueError:
            raise ValueError(f"{part!r} in {text!r} is neither a number nor a range such as 1-17") from None
        if low > high:
            raise ValueError(f"{part!r} in {text!r}: a range must go up")
        if high - low >= MOST_NUMBERS:
            raise ValueError(f"{part!r} in {text!r}: a range has at most {MOST_NUMBERS} numbers")
        found += range(low, high + 1)
    return found


def needs(what: str, package: str) -> str:
    return f"{what} needs {package}: pip install {package}"
