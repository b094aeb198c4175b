"""A user's own object, by "module:name": an algorithm or a codec. Needs the standard library alone."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def is_own(text: str) -> bool:
    return ":" in text


def load(text: str) -> Any:
    """The object that "module:name" names; modules of the current directory are found too. ValueError if
    there is no such thing."""
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{text}: {error}; name a module that can be imported from here, and what is in it"
        ) from None
