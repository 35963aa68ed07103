"""Softmax block by block: the denominator as a column, and the exponential of bfloat16 weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.core.online_softmax import FLOOR, OnlineSoftmax, columns_with_ones, with_ones


def weights(scores: np.ndarray, maximum: float) -> np.ndarray:
    """The weights of one row of scores, by values that are a unit matrix."""
    size = len(scores)
    state = OnlineSoftmax(jnp.full(1, maximum), jnp.zeros(1), jnp.zeros((1, size)))
    values = jnp.eye(size, dtype=jnp.bfloat16)
    return np.asarray(state.add(jnp.asarray(scores, jnp.float32)[None], values, scale=1.0).values[0], np.float64)


def test_bfloat16_weights_are_exponentials_to_their_last_digit():
    scores = -np.concatenate([[0.0], np.geomspace(1e-6, 86, 700), np.linspace(0, 86, 700)])
    np.testing.assert_allclose(weights(scores, 0.0), np.exp(scores), rtol=2**-8 + 1e-4)


def test_what_is_far_below_the_maximum_weighs_nothing_at_all():
    assert (weights(np.array([0.0, -88.1, -1e4, -1e20, -1e30, -np.inf]), 0.0)[1:] == 0).all()


@pytest.mark.parametrize("head_dim", [16, 24, 64, 128])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_column_of_ones_gives_the_denominator(head_dim: int, dtype: str, rng: np.random.Generator):
    scores = rng.normal(size=(5, 40)).astype(np.float32) * 3
    v = rng.normal(size=(40, head_dim)).astype(np.float32)
    exists = np.arange(40) < 29
    values = with_ones(jnp.asarray(np.where(exists[:, None], v, np.nan), dtype), jnp.asarray(exists))
    assert values.shape == (40, columns_with_ones(head_dim))
    state = OnlineSoftmax.start((5,), values.shape[1])
    for begin in (0, 20):
        part = slice(begin, begin + 20)
        state = state.add(jnp.asarray(scores[:, part]), values[part], scale=0.5, has_ones=True)
    expected = np.asarray(jax.nn.softmax(jnp.asarray(scores[:, :29]) * 0.5, axis=-1)) @ v[:29]
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(np.asarray(state.finish_ones(head_dim)), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_that_sees_nothing_is_zero(dtype: str):
    values = with_ones(jnp.ones((4, 8), dtype), jnp.ones(4, bool))
    state = OnlineSoftmax.start((2,), values.shape[1])
    hidden = jnp.zeros((2, 4), bool)
    state = state.add(jnp.full((2, 4), jnp.nan), values, scale=0.125, visible=hidden, has_ones=True)
    assert float(state.maximum.max()) == pytest.approx(FLOOR)
    assert not np.asarray(state.finish_ones(8)).any()
