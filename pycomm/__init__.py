"""Collective communication for training: proved schedules, run over shared memory.

comm = pycomm.init()
comm.all_reduce(gradient, op="avg")
"""

from typing import TYPE_CHECKING

from pycomm import interpreter  # noqa: F401

if TYPE_CHECKING:
    from pycomm import cuda
    from pycomm._native import version as __version__
    from pycomm.api import *

__all__ = [
    "AbortedError",
    "Algorithm",
    "Bucket",
    "CommError",
    "CommTimeoutError",
    "Communicator",
    "GradientReducer",
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
    "shared_arrays",
    "trace",
]

if not TYPE_CHECKING:  # which a name that is misspelt would pass

    def __getattr__(name):
        """All names are imported when one is first asked for; pycomm.cuda, which few need, by itself."""
        if name not in __all__:
            raise AttributeError(f"module 'pycomm' has no attribute {name!r}")
        if name == "cuda":
            import pycomm.cuda

            return pycomm.cuda
        from pycomm import api

        for each in __all__:
            if each != "cuda":
                globals().setdefault(each, getattr(api, each))
        return globals()[name]


def __dir__() -> list[str]:
    """What is meant to be used: submodules that hold it are seen by whoever imports them."""
    return sorted(__all__)
