"""Decides whether two results of an op are the same."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import QuantizedArray, dequantize

TOLERANCE = 3e-2
"""Greatest error of an output row (of one token and head), relative to its norm: bfloat16 leaves a tenth of it."""


def compare_rows(actual: Any, expected: Any) -> None:
    """Raises AssertionError if a row [..., H] of attention outputs is wrong."""
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    error = np.linalg.norm(actual - expected, axis=-1) / np.maximum(np.linalg.norm(expected, axis=-1), 1e-6)
    assert not np.isnan(actual).any(), "NaN in the output"
    assert float(error.max()) <= TOLERANCE, f"a row's relative error is {float(error.max()):.4f}, over {TOLERANCE}"


def compare_lists(actual: Any, expected: Any) -> None:
    """Raises AssertionError if page lists differ in more pages than scores that are equal up to rounding explain."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    different = sum(
        len(set(mine) ^ set(theirs)) // 2
        for mine, theirs in zip(*(x.reshape(-1, x.shape[-1]) for x in (actual, expected)), strict=True)
    )
    assert (np.diff(np.where(actual < 0, 2**30, actual), axis=-1) >= 0).all(), "a page list is not in order"
    assert different <= max(1, expected.size // 1000), f"{different} of {expected.size} pages differ"


def compare_stored(actual: Any, expected: Any) -> None:
    """Raises AssertionError if codes differ by more than one, or more often than halfway quotients explain."""
    wide = [np.asarray(dequantize(x, jnp.float32)) for x in (actual, expected)]
    steps = np.asarray(expected.scale)[..., None] * 1.01 if isinstance(expected, QuantizedArray) else 0.0
    difference = np.abs(wide[0] - wide[1])
    assert not np.isnan(wide[0]).any(), "NaN in a page"
    assert (difference <= steps).all(), f"stored numbers differ by {float(difference.max()):.4g}"
    assert (difference > 0.0).mean() < 0.01, f"{(difference > 0).mean():.1%} of the stored numbers differ"
