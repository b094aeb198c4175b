"""Arguments that are numbers, and ones that are no buffers: a TypeError shows what was passed instead."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np


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


def buffer(x: Any, name: str) -> None:
    """Refuses what is often passed for an array or tensor: a gradient that is not there, and a number."""
    if x is None:
        raise TypeError(
            f"`{name}` is None: no gradient? Leave out, on all ranks, what backward() does not reach, or pass"
            " zeros for it"
        )
    if isinstance(x, (int, float, complex, np.generic)) and not isinstance(x, (str, bytes)):
        raise TypeError(
            f"`{name}` is {x!r}, a number: pass an array, which a result can be written to; a loss is"
            ' averaged by `comm.all_reduce(np.array([loss]), op="avg")[0]`'
        )


def _shown(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"an array of shape {tuple(value.shape)}"
    if value is None or isinstance(value, (str, bytes, float)):
        return repr(value)
    return f"a {type(value).__name__}"
