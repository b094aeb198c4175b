"""Arguments that are numbers: what is none is a TypeError that shows it."""

from __future__ import annotations

import math
import operator
from typing import Any


def number(value: Any, name: str) -> float:
    """`value` as a float: a number, or an array or tensor of no dimension."""
    if not isinstance(value, (str, bytes)):
        try:
            return float(value)
        except OverflowError:
            return math.inf
        except (TypeError, ValueError, RuntimeError):  # torch's own for tensors of several elements
            pass
    raise TypeError(f"`{name}` is {_shown(value)}: pass a number")


def integer(value: Any, name: str) -> int:
    """`value` as an int."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` is {_shown(value)}: pass an integer") from None


def _shown(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"an array of shape {tuple(value.shape)}"
    if value is None or isinstance(value, (str, bytes, float)):
        return repr(value)
    return f"a {type(value).__name__}"
