"""95% intervals of means and of paired differences."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054
_FEW = 10


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its 95% confidence interval; None if there are too few values for one."""

    mean: float
    low: float | None
    high: float | None


def proportion(values: Sequence[float]) -> Estimate:
    """Returns the mean of values between 0 and 1 with Wilson's score interval (1927).

    The interval is exact in meaning for hits and misses; for scores in between it is wider than necessary.
    """
    n, p = len(values), float(np.mean(values))
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Estimate(mean=p, low=middle - half, high=middle + half)


def average(values: Sequence[float]) -> Estimate:
    """Returns the mean of values with Student's interval."""
    return _student(np.asarray(values, np.float64))


def agreement(values: Sequence[float]) -> Estimate:
    """Returns the mean of shares between 0 and 1 with the interval of their `difference` from 1, which ends at 1."""
    d = difference(values, np.ones(len(values)).tolist(), is_score=True)
    assert d.low is not None and d.high is not None, "scores of which few differ have Tango's interval"
    return Estimate(mean=1 + d.mean, low=1 + d.low, high=min(1 + d.high, 1.0))


def difference(values: Sequence[float], reference: Sequence[float], *, is_score: bool) -> Estimate:
    """Returns the mean of ``values - reference``, pair by pair.

    The interval is Student's. For scores, which lie between 0 and 1, it is Tango's (1998) if pairs differ by whole
    points, or if hardly any differ: few differences do not show their spread, and without differences Student's
    interval would have no width. A part of a point then counts as a part of a pair, which makes the interval wider than
    necessary.
    """
    d = np.subtract(np.asarray(values, np.float64), np.asarray(reference, np.float64))
    is_coarse = bool(np.isin(d, (-1.0, 0.0, 1.0)).all()) or np.count_nonzero(d) < _FEW
    return _tango(d) if is_score and is_coarse else _student(d)


def _tango(d: NDArray[np.float64]) -> Estimate:
    """Returns the interval of differences that a score test does not reject, with the variance that each implies."""
    n, gained, lost = len(d), float(d[d > 0].sum()), float(-d[d < 0].sum())
    mean = (gained - lost) / n

    def statistic(delta: float) -> float:
        # The likeliest share of lost pairs if the true difference is delta: a root of a quadratic.
        b = (2 * n - gained + lost) * delta - gained - lost
        likeliest = (math.sqrt(max(b**2 + 8 * n * lost * delta * (1 - delta), 0.0)) - b) / (4 * n)
        variance = n * max(2 * likeliest + delta * (1 - delta), 0.0)
        return (gained - lost - n * delta) / math.sqrt(variance) if variance else math.copysign(math.inf, mean - delta)

    return Estimate(mean=mean, low=_root(statistic, _Z, -1.0, mean), high=_root(statistic, -_Z, mean, 1.0))


def _root(falling: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Returns by bisection the argument for which a falling function has a value."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > value else (low, middle)
    return (low + high) / 2


def _student(d: NDArray[np.float64]) -> Estimate:
    mean = float(d.mean())
    if len(d) < 2:
        return Estimate(mean=mean, low=None, high=None)
    from scipy.special import stdtrit

    half = float(stdtrit(len(d) - 1, 0.975)) * float(d.std(ddof=1)) / math.sqrt(len(d))
    return Estimate(mean=mean, low=mean - half, high=mean + half)
