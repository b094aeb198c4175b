"""Tells torch.distributed the name of the backend, which is loaded when torch first makes a group of it.

`import torch` calls `register` through the entry point `torch.backends`, in every program where pycomm is
installed. So importing this module loads neither NumPy nor the compiled module, and nothing here raises.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

NAME = "pycomm"


def register() -> None:
    """For `init_process_group("pycomm")` and "cpu:pycomm". A second call does nothing."""
    from torch import distributed  # not before torch itself asks for it

    if distributed.is_available() and not hasattr(distributed.Backend, NAME.upper()):
        # A list: torch 2.13 takes a string's letters for devices.
        distributed.Backend.register_backend(NAME, _create, devices=["cpu"])


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    from pycomm.torch import backend_class

    return backend_class.join(store, rank, size, timeout)
