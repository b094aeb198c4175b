"""pycomm as a backend of torch.distributed: the calls that engine_gloo makes."""

from __future__ import annotations

import engine_gloo

import pycomm.torch  # noqa: F401  (registers the backend)


class Engine(engine_gloo.Engine):  # type: ignore[misc]  # mypy does not read engine_gloo here
    backend = "pycomm"
