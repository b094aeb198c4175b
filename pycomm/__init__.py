"""Collective communication for training: proved schedules, run over shared memory.

comm = pycomm.init()
comm.all_reduce(gradient, op="avg")
"""

from typing import Any

try:
    from pycomm import interpreter  # noqa: F401, I001
    from pycomm import _native  # noqa: F401
except ImportError as error:
    if error.name not in ("pycomm", "pycomm._native"):
        raise
    raise ImportError(
        f"{__path__[0]} is the source folder of pycomm, without the compiled module: leave it to import an "
        "installed pycomm, or build one here with `pip install -e .`"
    ) from None

from pycomm import codecs
from pycomm._native import (
    AbortedError,
    CommError,
    CommTimeoutError,
    MismatchError,
    PeerLostError,
    PersistentOp,
    Work,
)
from pycomm._native import version as __version__
from pycomm.algorithm import Algorithm
from pycomm.bucket import Bucket, Stats
from pycomm.group import Communicator, init, premul_sum, run_local

__all__ = [
    "AbortedError",
    "Algorithm",
    "Bucket",
    "CommError",
    "CommTimeoutError",
    "Communicator",
    "MismatchError",
    "PeerLostError",
    "PersistentOp",
    "Stats",
    "Work",
    "__version__",
    "codecs",
    "cuda",
    "init",
    "premul_sum",
    "run_local",
]


def __getattr__(name: str) -> Any:
    """pycomm.cuda, which few programs need, is imported when it is first asked for."""
    if name == "cuda":
        import pycomm.cuda

        return pycomm.cuda
    raise AttributeError(f"module 'pycomm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is meant to be used: submodules that hold it are seen by whoever imports them."""
    return sorted(__all__)
