"""Collective communication for training: proved schedules, run over shared memory.

comm = pycomm.init()
comm.all_reduce(gradient, op="avg")
"""

from pycomm._native import (
    AbortedError,
    CommError,
    CommTimeoutError,
    MismatchError,
    PeerLostError,
    Work,
)
from pycomm._native import version as __version__
from pycomm.algorithm import Algorithm
from pycomm.group import Communicator, init, premul_sum, run_local

__all__ = [
    "AbortedError",
    "Algorithm",
    "CommError",
    "CommTimeoutError",
    "Communicator",
    "MismatchError",
    "PeerLostError",
    "Work",
    "__version__",
    "init",
    "premul_sum",
    "run_local",
]
