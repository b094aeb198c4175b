"""How the demo's model is trained, on any number of ranks: with what batches, steps and learning rates.

The training loop is `train` in ../reducer_numpy.py.
"""

from __future__ import annotations

import math
import zlib

import numpy as np

import pycomm

from .model import Model

SEED = 1
STEPS = 400
GLOBAL_BATCH = 960  # divisible by 1 to 6, and by 8
LEARNING_RATE = 4e-3


def learning_rate(step: int, steps: int) -> float:
    """Twenty steps of warm-up, then half a cosine down to zero."""
    return LEARNING_RATE * min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def replicas_equal(comm: pycomm.Communicator, model: Model) -> bool:
    """Whether every rank holds the same parameters, bit for bit."""
    mine = np.array([zlib.crc32(model.params)], np.uint32)
    return len(set(comm.all_gather(mine))) == 1
