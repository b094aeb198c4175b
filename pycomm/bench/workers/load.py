"""Loads a user's own algorithm or codec, by "module:name". Needs only the standard library."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from importlib.machinery import PathFinder
from typing import Any


def is_own(text: str) -> bool:
    return ":" in text


def load(text: str) -> Any:
    """The object that "module:name" names; modules of the current directory come first. Raises ValueError if
    it does not exist, or if the module raises. What the module prints goes to stderr, since stdout may be an
    output file."""
    module, _, name = text.partition(":")
    if os.getcwd() in sys.path:
        sys.path.remove(os.getcwd())
    sys.path.insert(0, os.getcwd())
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{text}: {error}; name a module that can be imported from here") from None
    except (Exception, SystemExit) as error:  # whatever the module raises
        raise ValueError(f"{text}: importing {module} raises {type(error).__name__}: {error}") from None
    _check_origin(text, module.partition(".")[0])
    try:
        return getattr(found, name)
    except AttributeError as error:
        raise ValueError(f"{text}: {error}; name an object of the module") from None


def _check_origin(text: str, package: str) -> None:
    """Raises ValueError if an already imported module hides the user's module of the same name."""
    here = PathFinder.find_spec(package, [os.getcwd()])
    if here is None or here.origin is None:
        return
    origin = getattr(sys.modules[package].__spec__, "origin", None)
    if origin is None or not os.path.exists(origin) or not os.path.samefile(origin, here.origin):
        raise ValueError(
            f"{text}: the name {package} is taken by another module that is imported already; rename"
            f" {here.origin}"
        )
