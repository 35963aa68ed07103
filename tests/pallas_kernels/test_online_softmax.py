"""Softmax block by block: keys that do not exist, and the exponential of bfloat16 weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.core.online_softmax import FLOOR, OnlineSoftmax


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_that_do_not_exist_weigh_nothing_whatever_they_score(dtype: str, rng: np.random.Generator):
    scores = rng.normal(size=(5, 40)).astype(np.float32) * 3
    v = rng.normal(size=(40, 16)).astype(np.float32)
    exists = np.arange(40) < 29
    scores[:, 29:] = scores[:, 20:21]  # copies of an existing key
    state = OnlineSoftmax.start((5,), 16)
    for begin in (0, 20):
        part = slice(begin, begin + 20)
        values, given = jnp.asarray(v[part], dtype), jnp.asarray(exists[part])
        state = state.add(jnp.asarray(scores[:, part]), values, scale=0.5, exists=given)
    expected = np.asarray(jax.nn.softmax(jnp.asarray(scores[:, :29]) * 0.5, axis=-1)) @ v[:29]
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(np.asarray(state.finish()), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_that_sees_nothing_is_zero(dtype: str):
    state = OnlineSoftmax.start((2,), 8)
    hidden = jnp.zeros((2, 4), bool)
    state = state.add(jnp.full((2, 4), jnp.nan), jnp.ones((4, 8), dtype), scale=0.125, visible=hidden)
    assert float(state.maximum.max()) == pytest.approx(FLOOR)
    assert not np.asarray(state.finish()).any()
