"""Checks of arguments that should be numbers or buffers: a TypeError shows what was passed instead."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import numpy as np

_LONGEST = 60  # letters of a value in a message


def number(value: Any, name: str) -> float:
    """`value` as a float. It may be a number, or an array or tensor without dimensions."""
    if not isinstance(value, (str, bytes)):
        try:
            return float(value)
        except OverflowError:
            return math.inf
        except (TypeError, ValueError, RuntimeError):  # the last for torch's tensors of several elements
            pass
    raise TypeError(f"`{name}` is {shown(value)}: pass a number")


def integer(value: Any, name: str) -> int:
    """`value` as an int."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` is {shown(value)}: pass an integer") from None


def buffer(x: Any, name: str) -> None:
    """Refuses what is often passed instead of an array or tensor: a missing gradient, or a number."""
    if x is None:
        raise TypeError(
            f"`{name}` is None: no gradient? Leave out, on all ranks, what backward() does not reach, or pass"
            " zeros for it"
        )
    if isinstance(x, (int, float, complex, np.generic)) and not isinstance(x, (str, bytes)):
        raise TypeError(
            f"`{name}` is {x!r}, a number: pass an array, which a result can be written to; a loss is"
            ' averaged with `comm.all_reduce(np.array([loss]), op="avg")[0]`'
        )


def refuse(x: Any, name: str) -> NoReturn:
    """Raises for an object that is no buffer, and says what to pass instead."""
    buffer(x, name)
    if isinstance(x, Mapping):
        raise TypeError(f"`{name}` is a {type(x).__name__}: pass its arrays as a list, list(x.values())")
    if isinstance(x, (list, tuple)):
        raise TypeError(
            f"`{name}` is a {type(x).__name__}: pass one array or tensor; all_reduce and broadcast alone"
            " take a list of them"
        )
    if isinstance(x, Iterable) and not isinstance(x, (str, bytes)):
        raise TypeError(f"`{name}` is a {type(x).__name__}: pass a list of its arrays, list(x)")
    raise TypeError(
        f"`{name}` is a {type(x).__name__}: pass a NumPy array, a tensor, or anything with DLPack or the"
        " buffer protocol"
    )


def shown(value: Any) -> str:
    """A value for a message, or its type if the value is too long."""
    if hasattr(value, "shape"):
        return f"an array of shape {tuple(value.shape)}"
    text = repr(value)
    return (
        text
        if len(text) <= _LONGEST and "\n" not in text and " at 0x" not in text
        else f"a {type(value).__name__}"
    )
