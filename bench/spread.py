"""Median and quartiles of samples."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """Median and quartiles of so many samples."""

    median: float
    low: float
    high: float
    samples: int


def spread(found: Sequence[float] | np.ndarray) -> Spread:
    """Returns the median and the quartiles of samples."""
    low, median, high = (float(share) for share in np.percentile(found, [25, 50, 75]))
    return Spread(median, low, high, len(found))
