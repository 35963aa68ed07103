"""Decides whether two results of an op are the same."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import LayerKV, PagedKV, PageTables, QuantizedArray, QuantizedKeys, Selection, dequantize
from pallas_kernels.core.paging import pools, slots_of
from pallas_kernels.core.sealing import keys_of

TOLERANCE = 3e-2
"""Greatest error of an output row (of one token and head), relative to its norm: bfloat16 leaves a tenth of it."""


def compare_rows(actual: Any, expected: Any) -> None:
    """Raises AssertionError if a row [..., H] of attention outputs is wrong."""
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    error = np.linalg.norm(actual - expected, axis=-1) / np.maximum(np.linalg.norm(expected, axis=-1), 1e-6)
    assert not np.isnan(actual).any(), "NaN in the output"
    assert float(error.max()) <= TOLERANCE, f"a row's relative error is {float(error.max()):.4f}, over {TOLERANCE}"


def compare_selections(actual: Selection, expected: Selection) -> None:
    """Raises AssertionError if lists or what is remembered differ more than scores that are equal up to rounding."""
    ours, right = np.asarray(actual.pages), np.asarray(expected.pages)
    different = sum(
        len(set(mine) ^ set(theirs)) // 2
        for mine, theirs in zip(*(x.reshape(-1, x.shape[-1]) for x in (ours, right)), strict=True)
    )
    assert (np.diff(np.where(ours < 0, 2**30, ours), axis=-1) >= 0).all(), "a page list is not in order"
    assert different <= max(1, right.size // 1000), f"{different} of {right.size} pages differ"
    mine, theirs = (np.asarray(x.scores)[ours == right] for x in (actual, expected))
    assert np.isclose(mine, theirs, rtol=0, atol=TOLERANCE).all(), "what is remembered of a page is wrong"


def compare_written(actual: LayerKV, expected: LayerKV, tables: PageTables, span: range) -> None:
    """Raises AssertionError if a write of the positions ``span`` of each sequence left other pages or another tail."""
    size = expected.page_size
    touched = np.arange(span.start // size, -(-span.stop // size))
    for (_, mine, table, _), (_, theirs, _, _) in zip(*(pools(kv, tables) for kv in (actual, expected)), strict=True):
        pages = np.unique(np.asarray(table)[:, touched])
        _compare_pages(*(jax.tree.map(lambda x, pages=pages: x[pages], pool) for pool in (mine, theirs)))
    slots, rows = slots_of(tables, len(tables.retrieval)), (span.stop - 1) % size + 1
    for mine, theirs in zip(actual.tail, expected.tail, strict=True):
        _compare_stored(*(x[slots, :, :rows] for x in (mine, theirs)), steps=0.0)


def _compare_pages(actual: PagedKV, expected: PagedKV) -> None:
    """Raises AssertionError if pages of a pool differ by more than rounding explains."""
    k_steps = v_steps = 0.0
    if expected.k_min is not None:
        low, high = (np.asarray(x, np.float32) for x in (expected.k_min, expected.k_max))
        for mine, theirs in ((actual.k_min, low), (actual.k_max, high)):
            _compare_stored(mine, theirs, steps=0.0)
        if isinstance(expected.k, QuantizedKeys):
            k_steps = np.repeat((high - low) / (2**expected.k.bits - 1), expected.sub_page_size, axis=2)
    if isinstance(expected.v, QuantizedArray):
        v_steps = np.asarray(expected.v.scale, np.float32)[..., None]
    _compare_stored(*(keys_of(x, jnp.float32) for x in (actual, expected)), steps=k_steps)
    _compare_stored(*(dequantize(x.v, jnp.float32) for x in (actual, expected)), steps=v_steps)


def _compare_stored(actual: Any, expected: Any, *, steps: Any) -> None:
    """Raises AssertionError if codes differ by more than one, or more often than halfway quotients explain."""
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    difference = np.abs(actual - expected)
    assert not np.isnan(actual).any(), "NaN in a page"
    assert (difference <= steps * 1.01).all(), f"stored numbers differ by {float(difference.max()):.4g}"
    assert (difference > 0.0).mean() < 0.01, f"{(difference > 0).mean():.1%} of the stored numbers differ"
