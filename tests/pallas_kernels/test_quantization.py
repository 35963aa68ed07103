from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from pallas_kernels import (
    QuantizedArray,
    QuantizedKeys,
    dequantize,
    dequantize_keys,
    quantize,
    quantize_keys,
    rotate,
)
from pallas_kernels.core.quantization import bits_of, key_bounds
from tests.pallas_kernels.cases import assert_same_bits

LEVELS = {8: 255, 4: 15}
compiled = jax.jit(quantize, static_argnums=1)


def quantize_bounded(x: jax.Array, bits: int, sub_size: int = 4) -> tuple[QuantizedKeys, jax.Array, jax.Array]:
    """Keys within their own bounds, and these."""
    bounds = key_bounds(x, sub_size)
    return quantize_keys(x, *bounds, bits), *bounds


compiled_keys = jax.jit(quantize_bounded, static_argnums=(1, 2))


def unpacked(array: QuantizedArray | QuantizedKeys) -> NDArray[Any]:
    """Codes [..., H], one a byte."""
    codes = np.asarray(array.codes)
    return codes if array.bits == 8 else np.concatenate([codes & 15, codes >> 4], axis=-1)


def spread_rows(rng: np.random.Generator, spread: float) -> NDArray[np.float64]:
    """Rows [5, 16] with tails as heavy as told, up to a million."""
    return rng.normal(size=(5, 16)) * np.exp(spread * rng.normal(size=(5, 16))).clip(1e-6, 1e6)


def of_float16(x: ArrayLike) -> NDArray[np.float32]:
    """The distance from the float16 numbers near ``x`` to the next."""
    return np.spacing(np.abs(np.asarray(x, np.float16))).astype(np.float32)


# --- values, row by row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), spread=st.floats(0, 6), offset=st.floats(-3e4, 3e4), magnitude=st.floats(-7.0, 0.0))
def test_values_come_back_within_half_a_step(bits: int, seed: int, spread: float, offset: float, magnitude: float):
    """Rows of every shape: heavy tails, far from zero, below float16's normal range.

    A number is half a step off, or as far as the offset is rounded if that lies above it, or as far as the steps fall
    short of the greatest.
    """
    x = spread_rows(np.random.default_rng(seed), spread)
    x = ((x / max(np.abs(x).max() / 3e4, 1) + offset) * 10.0**magnitude).astype(np.float32)
    array = compiled(x, bits)
    assert array.scale.dtype == array.low.dtype == np.float16
    scale, low = np.asarray(array.scale, np.float32), np.asarray(array.low, np.float32)
    assert np.isfinite(scale).all() and np.isfinite(low).all()
    np.testing.assert_array_equal(low, x.min(-1).astype(np.float16))
    assert (scale >= 0).all()
    assert (np.abs(scale - np.maximum(x.max(-1) - low, 0) / LEVELS[bits]) <= 0.501 * of_float16(scale)).all()
    error = np.abs(np.asarray(dequantize(array, jnp.float32)) - x).max(-1)
    bounds = np.stack([scale / 2, of_float16(low) / 2, LEVELS[bits] * 0.501 * of_float16(scale)])
    assert (error <= bounds.max(0) + 2.0**-22 * (np.abs(x).max(-1) + np.abs(low))).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.140625, 2.0**-24, 65504.0, -65504.0])
def test_constant_rows_of_numbers_that_float16_has_are_exact(bits: int, value: float):
    x = np.full((2, 16), value, np.float32)
    array = compiled(x, bits)
    np.testing.assert_array_equal(np.asarray(dequantize(array, jnp.float32)), x)
    assert not np.asarray(array.scale).any() and not np.asarray(array.codes).any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [np.pi, -3000.7, 60001.0, 1e-5, 1e-30])
def test_other_constant_rows_are_rounded_as_float16_does(bits: int, value: float):
    """Or less, where that lies below: the scale then makes up for it."""
    x = np.full((2, 16), value, np.float32)
    error = np.abs(np.asarray(dequantize(compiled(x, bits), jnp.float32)) - x).max()
    assert error <= of_float16(value) / 2


@pytest.mark.parametrize("bits", [8, 4])
def test_nearly_constant_rows_are_rounded_as_float16_does(bits: int):
    x = np.float32(1e4) + np.arange(16, dtype=np.float32) * np.float32(2.0**-10)
    assert np.abs(np.asarray(dequantize(compiled(x, bits), jnp.float32)) - x).max() <= of_float16(1e4) / 2


@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_beyond_float16_leave_the_others_of_their_row_finite(bits: int):
    x = np.zeros((3, 16), np.float32)
    x[0], x[1, 3], x[2, 3] = 1e5, -1e6, 1e6
    array = compiled(x, bits)
    back = np.asarray(dequantize(array, jnp.float32))
    assert np.isfinite(back).all()
    assert (np.abs(back - x)[[0, 2]] <= np.asarray(array.scale, np.float32)[[0, 2], None]).all()
    assert (back[1, 3], np.abs(back[1, 4:]).max() <= float(array.scale[1])) == (-65504, True)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_outlier_costs_precision_and_nothing_else(bits: int):
    x = np.linspace(-1, 1, 16, dtype=np.float32)
    x[5] = 3e4
    array = compiled(x, bits)
    back = np.asarray(dequantize(array, jnp.float32))
    assert np.abs(back - x).max() <= float(array.scale) / 2 + 0.01


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_use_the_whole_range_and_are_the_formula(bits: int, rng: np.random.Generator):
    """The stored numbers, not those before they were rounded to float16, choose the codes."""
    x = rng.normal(size=(50, 16)).astype(np.float32)
    array = compiled(x, bits)
    codes = unpacked(array)
    assert (codes.min(-1) == 0).all() and (codes.max(-1) == LEVELS[bits]).all()
    scale, low = (np.asarray(y, np.float64)[:, None] for y in (array.scale, array.low))
    formula = np.clip((x - low) / scale, 0, LEVELS[bits])
    assert np.abs(codes - formula).max() <= 0.5 + 1e-4


def test_four_bit_codes_lie_half_a_row_apart_in_a_byte():
    x = np.arange(16, dtype=np.float32)
    np.testing.assert_array_equal(compiled(x, 4).codes, [i | (i + 8) << 4 for i in range(8)])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("function", [quantize, quantize_bounded])
def test_a_program_of_its_own_and_a_part_of_another_give_the_same_bits(
    function: Callable[..., Any], bits: int, dtype: str, rng: np.random.Generator
):
    """A chunk and a decode step are different programs, and eager calls a third: all must store the same codes."""
    x = jnp.asarray(rng.normal(size=(400, 16, 64)), dtype)
    alone = function(x, bits)
    for other in (jax.jit(partial(function, bits=bits)), jax.jit(partial(jax.lax.map, partial(function, bits=bits)))):
        assert_same_bits(other(x), alone)


@pytest.mark.parametrize("bits", [8, 4])
def test_products_with_codes_are_products_with_values(bits: int, rng: np.random.Generator):
    """``Σ p v = Σ (p scale) code + Σ p low``: what kernels use."""
    x, p = rng.normal(size=(20, 16)), rng.random(20)
    array = compiled(x.astype(np.float32), bits)
    codes, scale, low = (np.asarray(y, np.float64) for y in (unpacked(array), array.scale, array.low))
    back = np.asarray(dequantize(array, jnp.float32), np.float64)
    np.testing.assert_allclose((p * scale) @ codes + (p * low).sum(), p @ back, atol=1e-5)


def test_the_shape_is_that_of_the_values():
    for bits in (8, 4):
        array = compiled(np.zeros((2, 3, 16), np.float32), bits)
        keys, *_ = compiled_keys(np.zeros((2, 8, 16), np.float32), bits, 4)
        assert array.shape == (2, 3, 16) and array.scale.shape == array.low.shape == (2, 3)
        assert keys.shape == (2, 8, 16)
        assert bits_of(jax.tree.map(lambda x: x, array)) == bits_of(jax.tree.map(lambda x: x, keys)) == bits
    assert (bits_of(jnp.zeros(2, jnp.bfloat16)), bits_of(jnp.zeros(2, jnp.float32))) == (16, 32)


# --- keys, channel by channel ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sub_size", [2, 4, 8, 16])
def test_bounds_are_those_of_each_channel_of_a_sub_page(sub_size: int, rng: np.random.Generator):
    keys = rng.normal(size=(3, 2, 16, 6)).astype(np.float32)
    k_min, k_max = key_bounds(jnp.asarray(keys), sub_size)
    assert k_min.shape == k_max.shape == (3, 2, 16 // sub_size, 6)
    for sub in range(16 // sub_size):
        tokens = keys[:, :, sub * sub_size : (sub + 1) * sub_size]
        np.testing.assert_array_equal(k_min[:, :, sub], tokens.min(2))
        np.testing.assert_array_equal(k_max[:, :, sub], tokens.max(2))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sub_size", [2, 4, 16])
@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), spread=st.floats(0, 6), offset=st.floats(-1e6, 1e6), magnitude=st.floats(-30, 30))
def test_keys_come_back_within_half_a_step_of_their_channel(
    bits: int, sub_size: int, seed: int, spread: float, offset: float, magnitude: float
):
    """Channels of every range, near and far from zero. 16 tokens a page: 16 are one sub-page."""
    rng = np.random.default_rng(seed)
    channels = spread_rows(rng, spread)[:2, None] + offset * rng.normal(size=(2, 1, 16))
    x = ((rng.normal(size=(2, 16, 16)) * channels + offset) * 10.0**magnitude).astype(np.float32)
    keys, k_min, k_max = compiled_keys(x, bits, sub_size)
    low, high = (np.asarray(y).repeat(sub_size, axis=1) for y in (k_min, k_max))
    back = np.asarray(dequantize_keys(keys, k_min, k_max, jnp.float32))
    step = (high.astype(np.float64) - low) / LEVELS[bits]
    assert (np.abs(back - x.astype(np.float64)) <= step / 2 + 2.0**-22 * np.maximum(np.abs(low), np.abs(high))).all()
    codes = unpacked(keys)
    np.testing.assert_array_equal(codes[x == low], 0)
    np.testing.assert_array_equal(codes[(x == high) & (high > low)], LEVELS[bits])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.1415927, 1e-30, 3e38])
def test_channels_that_are_constant_over_a_sub_page_are_exact(
    bits: int, dtype: str, value: float, rng: np.random.Generator
):
    x = jnp.asarray(rng.normal(size=(2, 16, 8)), dtype).at[:, 4:8, 3].set(value).at[:, 8:, 6].set(-value)
    keys, k_min, k_max = compiled_keys(x, bits, 4)
    back = dequantize_keys(keys, k_min, k_max, x.dtype)
    assert back.dtype == x.dtype and back.shape == x.shape
    np.testing.assert_array_equal(back[:, 4:8, 3], x[:, 4:8, 3])
    np.testing.assert_array_equal(back[:, 8:, 6], x[:, 8:, 6])


def test_bounds_of_one_sub_page_do_not_know_of_another(rng: np.random.Generator):
    x = rng.normal(size=(1, 16, 8)).astype(np.float32)
    large = np.concatenate([x[:, :8], x[:, 8:] * 1000], axis=1)
    small, other = (np.asarray(compiled_keys(keys, 8, 8)[0].codes[:, :8]) for keys in (x, large))
    np.testing.assert_array_equal(small, other)
    assert (np.asarray(compiled_keys(x, 8, 16)[0].codes) != np.asarray(compiled_keys(large, 8, 16)[0].codes)).any()


def test_few_bits_lose_less_of_keys_by_channel_than_by_row(rng: np.random.Generator):
    """As keys are: few channels, always the same, many times as large as the rest and nearly constant."""
    x = rng.normal(size=(1, 64, 64)).astype(np.float32)
    x[:, :, [3, 40]] += 25

    def loss(back: jax.Array) -> float:
        return float(np.linalg.norm(np.asarray(back) - x))

    keys, k_min, k_max = compiled_keys(x, 4, 16)
    by_row = loss(dequantize(quantize(jnp.asarray(x), 4), jnp.float32))
    assert loss(dequantize_keys(keys, k_min, k_max, jnp.float32)) < 0.4 * by_row


# --- both ------------------------------------------------------------------------------------------------------------


def test_an_ordinary_array_is_only_converted():
    x = jnp.asarray([1.5, -2.0])
    assert dequantize(x, jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(dequantize(x, jnp.float32), x)
    assert dequantize_keys(x, None, None, jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(dequantize_keys(x, None, None, jnp.float32), x)


@pytest.mark.parametrize("bits", [2, 5, 16, 0])
def test_other_widths_are_refused(bits: int):
    with pytest.raises(ValueError, match=rf"^bits={bits} must be 8 or 4$"):
        quantize(jnp.zeros((2, 16)), bits)
    with pytest.raises(ValueError, match=rf"^bits={bits} must be 8 or 4$"):
        quantize_bounded(jnp.zeros((2, 16, 16)), bits)


def test_rows_of_odd_length_are_refused():
    with pytest.raises(ValueError, match=r"last axis of \(2, 15\) must be even"):
        quantize(jnp.zeros((2, 15)), 4)
    with pytest.raises(ValueError, match=r"last axis of \(2, 16, 15\) must be even"):
        quantize_bounded(jnp.zeros((2, 16, 15)), 4)


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
