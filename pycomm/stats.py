"""Statistics of packed gradients, which Bucket and the GPU's Packer return for the values that they wrote."""

from __future__ import annotations

import math
from typing import NamedTuple


class Stats(NamedTuple):
    """Statistics of the written values.

    The squares and magnitudes are those of the scaled float32 values before rounding, without NaNs; the
    counts are those of the written values. The bits do not depend on the instruction set or the device.
    """

    sum_squares: float
    max_abs: float
    nans: int
    infs: int

    @property
    def norm(self) -> float:
        """The Euclidean norm, sqrt(sum_squares), to clip by."""
        return math.sqrt(self.sum_squares)

    @property
    def finite(self) -> bool:
        """Whether the values hold no NaN and no infinity."""
        return self.nans == 0 and self.infs == 0
