from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pallas_kernels import QuantizedArray, dequantize, quantize, rotate

LEVELS = {8: 255, 4: 15}
compiled = jax.jit(quantize, static_argnums=1)


def unpacked(array: QuantizedArray) -> NDArray[Any]:
    """Codes [..., H], one a byte."""
    codes = np.asarray(array.codes)
    return codes if array.bits == 8 else np.concatenate([codes & 15, codes >> 4], axis=-1)


def rounding(x: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """What float32 may add to half a step: a few units in the last place of the row's largest value and of its zero."""
    largest = np.abs(x).max(-1)
    return 2.0**-22 * (largest + 255 * scale)


@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), spread=st.floats(0, 12), offset=st.floats(-1e6, 1e6), magnitude=st.floats(-30, 30))
def test_values_come_back_within_half_a_step(bits: int, seed: int, spread: float, offset: float, magnitude: float):
    """Rows of every shape: heavy tails, far from zero, tiny, huge."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(5, 16)) * np.exp(spread * rng.normal(size=(5, 16))).clip(1e-6, 1e6) + offset
    x = (x * 10.0**magnitude).astype(np.float32)
    array = compiled(x, bits)
    scale, zero = np.asarray(array.scale), np.asarray(array.zero)
    assert np.isfinite(scale).all() and np.isfinite(zero).all() and (scale > 0).all()
    error = np.abs(np.asarray(dequantize(array, jnp.float32)) - x).max(-1)
    assert (error <= scale / 2 + rounding(x, scale)).all()
    exact = (x.max(-1) - x.min(-1)) / LEVELS[bits]
    floor = np.abs(x).max(-1) * 2.0**-20
    np.testing.assert_allclose(scale, np.maximum(exact, floor), rtol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.1415927, 1e-30, 65504.0, -3e38, 1e-44])
def test_constant_rows_are_exact(bits: int, value: float):
    x = np.full((2, 16), value, np.float32)
    array = compiled(x, bits)
    back = np.asarray(dequantize(array, jnp.float32))
    assert np.isfinite(np.asarray(array.scale)).all() and np.isfinite(np.asarray(array.zero)).all()
    # XLA flushes numbers below float32's normal range to zero.
    np.testing.assert_array_equal(back, np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x))


@pytest.mark.parametrize("bits", [8, 4])
def test_nearly_constant_rows_do_not_overflow(bits: int):
    x = np.float32(1e4) + np.arange(16, dtype=np.float32) * np.float32(2.0**-10)
    array = compiled(x, bits)
    assert np.isfinite(np.asarray(array.zero))
    assert np.abs(np.asarray(dequantize(array, jnp.float32)) - x).max() <= 1e4 * 2.0**-20


@pytest.mark.parametrize("bits", [8, 4])
def test_an_outlier_costs_precision_and_nothing_else(bits: int):
    x = np.linspace(-1, 1, 16, dtype=np.float32)
    x[5] = 3e4
    array = compiled(x, bits)
    back = np.asarray(dequantize(array, jnp.float32))
    assert abs(back[5] - 3e4) < 0.01 and np.abs(back - x).max() <= float(array.scale) / 2 + 0.01


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_use_the_whole_range_and_are_the_formula(bits: int, rng: np.random.Generator):
    x = rng.normal(size=(50, 16)).astype(np.float32)
    array = compiled(x, bits)
    codes = unpacked(array)
    assert (codes.min(-1) == 0).all() and (codes.max(-1) == LEVELS[bits]).all()
    wide = x.astype(np.float64)
    scale = (wide.max(-1) - wide.min(-1)) / LEVELS[bits]
    formula = wide / scale[:, None] - (wide.min(-1) / scale)[:, None]
    assert np.abs(codes - formula).max() <= 0.5 + 1e-4
    np.testing.assert_allclose(array.zero, -wide.min(-1) / scale, rtol=1e-5)


def test_four_bit_codes_lie_half_a_row_apart_in_a_byte():
    x = np.arange(16, dtype=np.float32)
    np.testing.assert_array_equal(compiled(x, 4).codes, [i | (i + 8) << 4 for i in range(8)])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_program_of_its_own_and_a_part_of_another_give_the_same_bits(bits: int, dtype: str, rng: np.random.Generator):
    """A chunk and a decode step are different programs, and eager calls a third: all must store the same codes."""
    x = jnp.asarray(rng.normal(size=(400, 3, 64)), dtype)
    alone = quantize(x, bits)
    for other in (compiled(x, bits), jax.jit(lambda x: jax.lax.map(lambda row: quantize(row, bits), x))(x)):
        for mine, theirs in zip(jax.tree.leaves(alone), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("bits", [8, 4])
def test_products_with_codes_are_products_with_values(bits: int, rng: np.random.Generator):
    """``q · k = scale (q · code − zero Σ q)`` and ``Σ p v = Σ (p scale) code − Σ p scale zero``: what kernels use."""
    x, q, p = rng.normal(size=(20, 16)), rng.normal(size=16), rng.random(20)
    array = compiled(x.astype(np.float32), bits)
    codes, scale, zero = (np.asarray(y, np.float64) for y in (unpacked(array), array.scale, array.zero))
    back = np.asarray(dequantize(array, jnp.float32), np.float64)
    np.testing.assert_allclose(scale * (codes @ q - zero * q.sum()), back @ q, atol=1e-5)
    np.testing.assert_allclose((p * scale) @ codes - (p * scale * zero).sum(), p @ back, atol=1e-5)


def test_the_shape_is_that_of_the_values():
    for bits in (8, 4):
        array = compiled(np.zeros((2, 3, 16), np.float32), bits)
        assert array.shape == (2, 3, 16) and array.scale.shape == array.zero.shape == (2, 3)
        assert jax.tree.map(lambda x: x, array).bits == bits


def test_an_ordinary_array_is_only_converted():
    x = jnp.asarray([1.5, -2.0])
    assert dequantize(x, jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(dequantize(x, jnp.float32), x)


@pytest.mark.parametrize("bits", [2, 5, 16, 0])
def test_other_widths_are_refused(bits: int):
    with pytest.raises(ValueError, match=rf"^bits={bits} must be 8 or 4$"):
        quantize(jnp.zeros((2, 16)), bits)


def test_rows_of_odd_length_are_refused():
    with pytest.raises(ValueError, match=r"last axis of \(2, 15\) must be even"):
        quantize(jnp.zeros((2, 15)), 4)


@pytest.mark.parametrize("head_dim", [1, 2, 64, 80, 96, 128])
def test_rotating_keeps_products_and_twice_is_nothing(head_dim: int, rng: np.random.Generator):
    q, k = rng.normal(size=(2, 7, 3, head_dim)).astype(np.float32)
    np.testing.assert_allclose(np.sum(rotate(q) * rotate(k), -1), np.sum(q * k, -1), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(rotate(rotate(k)), k, rtol=0, atol=1e-5)
    rounded = jnp.asarray(k, jnp.bfloat16)
    assert rotate(rounded).dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(rotate(rounded), np.float32), rotate(rounded.astype(jnp.float32)), rtol=2**-8)


def test_four_bits_lose_less_of_keys_with_outliers_when_these_are_rotated(rng: np.random.Generator):
    """As keys have them: few channels, always the same, many times as large as the rest."""
    keys = rng.normal(size=(100, 64)).astype(np.float32)
    keys[:, [3, 40]] *= 12

    def loss(back: jax.Array) -> float:
        return float(np.linalg.norm(np.asarray(back) - keys))

    plain = loss(dequantize(quantize(jnp.asarray(keys), 4), jnp.float32))
    rotated = loss(rotate(dequantize(quantize(rotate(jnp.asarray(keys)), 4), jnp.float32)))
    assert rotated < 0.6 * plain
