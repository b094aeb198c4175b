"""Statistics of packed gradients: what Bucket and the GPU's Packer say of the values that they wrote."""

from __future__ import annotations

import math
from typing import NamedTuple


class Stats(NamedTuple):
    """Of the values that were written.

    Squares and magnitudes are of the scaled float32 values before they were rounded, NaNs left out; the
    counts are of what was written. The bits do not depend on the instruction set or the device.
    """

    sum_squares: float
    max_abs: float
    nans: int
    infs: int

    @property
    def norm(self) -> float:
        """The Euclidean norm, sqrt(sum_squares): to clip by."""
        return math.sqrt(self.sum_squares)

    @property
    def finite(self) -> bool:
        """Whether there is no NaN and no infinity."""
        return self.nans == 0 and self.infs == 0
