"""Conformance of `quantized_matmul`: values of every storage, rows that are zero or not finite, blocks, memory."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from pallas_kernels import QuantizedMatrix, quantized_matmul
from pallas_kernels.core.quantized_matrix import quantize_groups, quantize_rows
from pallas_kernels.quantized_matmul import xla
from pallas_kernels.quantized_matmul.digits import FEW_ROWS, digits
from tests.pallas_kernels.cases import (
    MATRICES,
    abstract,
    assert_same_bits,
    dense_matrix,
    implementations,
    jitted,
    random_matrix,
    temporary_bytes,
)

each_implementation = pytest.mark.parametrize("implementation", implementations("quantized_matmul"))
each_matrix = pytest.mark.parametrize("storage", MATRICES)

OUTPUTS, INPUTS = 37, 256
TOLERANCES = {
    # Sums of a thousand terms in another order.
    "float32": 1e-6,
    # Weights and results are rounded to 8 bits.
    "bfloat16": 2.0**-8,
}
"""Greatest |out − Σ_d x_d · w_d| as a share of Σ_d |x_d · w_d|, by the dtype of the rows."""


def rows(rng: np.random.Generator, count: int, dtype: str, inputs: int = INPUTS) -> NDArray[Any]:
    return rng.normal(size=(count, inputs)).astype(jnp.dtype(dtype))


def multiply(implementation: str, x: Any, w: QuantizedMatrix, out_dtype: str | None = None) -> NDArray[Any]:
    out = jitted("quantized_matmul", implementation)(x, w, out_dtype=out_dtype)
    assert out.dtype == (out_dtype or x.dtype) and out.shape == (x.shape[0], w.shape[0])
    return np.asarray(out)


def assert_is_product(out: NDArray[Any], x: NDArray[Any], w: QuantizedMatrix, tolerance: float) -> None:
    """The sums of float64; rows of integers may differ by half a step of each of their numbers."""
    wide, dense = np.asarray(x).astype(np.float64), dense_matrix(w)
    bound = tolerance * (np.abs(wide) @ np.abs(dense).T)
    if w.input_bits:
        steps = 127 * 256 if w.input_bits == 16 or len(x) <= FEW_ROWS else 127
        bound += 0.51 / steps * np.abs(wide).max(1, keepdims=True) * np.abs(dense).sum(1)
    error = np.abs(out.astype(np.float64) - wide @ dense.T)
    assert (error <= bound).all(), f"{(error / np.maximum(bound, 1e-30)).max():.2f} of what is allowed"


@pytest.mark.parametrize("implementation", [*implementations("quantized_matmul"), "reference"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("count", [1, 3, 4, 9])
@each_matrix
def test_is_the_product_with_the_numbers_that_the_codes_stand_for(
    storage: str, count: int, dtype: str, implementation: str, rng: np.random.Generator
):
    w, x = random_matrix(rng, OUTPUTS, INPUTS, **MATRICES[storage]), rows(rng, count, dtype)
    assert_is_product(multiply(implementation, x, w), x, w, TOLERANCES[dtype])


@each_implementation
@pytest.mark.parametrize("storage", [name for name in MATRICES if name.endswith(("rows", "inputs"))])
@pytest.mark.parametrize("count", [2, 5])
def test_one_scale_per_row_is_applied_to_exact_products(
    storage: str, count: int, implementation: str, rng: np.random.Generator
):
    """Codes have few bits: nothing is rounded before the sum where the result is wide."""
    w, x = random_matrix(rng, OUTPUTS, INPUTS, **MATRICES[storage]), rows(rng, count, "bfloat16")
    assert_is_product(multiply(implementation, x, w, "float32"), x, w, TOLERANCES["float32"])


@each_implementation
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("count", [1, FEW_ROWS, FEW_ROWS + 1, 33])
def test_a_product_of_integers_has_the_bits_of_the_reference(
    count: int, dtype: str, implementation: str, rng: np.random.Generator
):
    """Sums reach 127² · 4096, which float32 could not add up."""
    w = random_matrix(rng, 24, 4096, **MATRICES["int8-inputs"])
    x = rows(rng, count, dtype, 4096) * np.exp(rng.normal(size=(count, 1)) * 5).astype(jnp.dtype(dtype))
    x[0] = np.sign(x[0]) * 3
    w = replace(w, codes=w.codes.at[3].set(127 * np.sign(np.asarray(x[0])).astype(np.int8)))
    for out_dtype in ("float32", "bfloat16"):
        both = [multiply(name, x, w, out_dtype) for name in (implementation, "reference")]
        assert_same_bits(*both)


@pytest.mark.parametrize("implementation", [*implementations("quantized_matmul"), "reference"])
@pytest.mark.parametrize("count", [3, 6])
@each_matrix
def test_zero_rows_are_zero_and_rows_without_numbers_spoil_no_other(
    storage: str, count: int, implementation: str, rng: np.random.Generator
):
    w, x = random_matrix(rng, OUTPUTS, INPUTS, **MATRICES[storage]), rows(rng, count, "bfloat16")
    x[0] = 0
    expected = multiply(implementation, x, w)
    assert not expected[0].any()
    x[1, INPUTS // 2] = np.nan
    x[2, 5] = -np.inf
    out = multiply(implementation, x, w)
    assert_same_bits(out[[0, *range(3, count)]], expected[[0, *range(3, count)]])
    assert np.isnan(out[1]).all()
    has_a_factor = dense_matrix(w)[:, 5] != 0
    assert not np.isfinite(out[2, has_a_factor].astype(np.float32)).any()


@pytest.mark.parametrize("inputs", [256, 4096])
@pytest.mark.parametrize("count", [1, FEW_ROWS, 33])
def test_integers_do_not_hide_nan(count: int, inputs: int, rng: np.random.Generator):
    """XLA's maximum over a row loses NaN on CPUs, depending on the shape."""
    x = rows(rng, count, "float32", inputs)
    x[0, 5] = np.nan
    scale = np.asarray(jax.jit(lambda x: digits(x, 8).scale)(x))
    np.testing.assert_array_equal(np.isnan(scale[:, 0]), np.arange(count) == 0)


def test_two_digits_are_one_integer_of_sixteen_bits(rng: np.random.Generator):
    x = np.concatenate([rng.normal(size=(1, 4096)), np.linspace(-1, 1, 4096)[None]]).astype(np.float32)
    parts = digits(jnp.asarray(x), 8)
    codes, scale = (np.asarray(part).astype(np.int64 if part.dtype == np.int8 else np.float64) for part in parts)
    whole = codes[:2] * 256 + codes[2:]
    np.testing.assert_array_equal(np.abs(whole).max(1), 127 * 256)
    assert (np.abs(whole * scale - x) <= 0.503 * scale).all()  # the division rounds to 24 bits


@each_implementation
def test_rows_of_any_magnitude_fit_eight_bits(implementation: str, rng: np.random.Generator):
    """Of subnormal numbers, which a device may take for zeros, only that they stay harmless."""
    w = random_matrix(rng, OUTPUTS, INPUTS, **MATRICES["int8-inputs"])
    x = rows(rng, 5, "float32") * np.array([1e-44, 1e-38, 1e-30, 1.0, 1e30], np.float32)[:, None]
    out = multiply(implementation, x, w)
    assert np.isfinite(out).all() and np.abs(out[:2]).max() < 1e-34
    assert_is_product(out[2:], x[2:], w, TOLERANCES["float32"])


@each_implementation
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("count", [3, 4, 8])
@each_matrix
def test_a_row_depends_on_no_other(storage: str, count: int, dtype: str, implementation: str, rng: np.random.Generator):
    w, x = random_matrix(rng, OUTPUTS, INPUTS, **MATRICES[storage]), rows(rng, count, dtype)
    together = multiply(implementation, x, w)
    assert_same_bits(multiply(implementation, x[::-1], w), together[::-1])
    others = np.concatenate([x[:1], rows(rng, count - 1, dtype)])
    assert_same_bits(multiply(implementation, others, w)[0], together[0])
    if w.input_bits or count < 4:
        assert_same_bits(multiply(implementation, x[1:2], w), together[1:2])


@pytest.mark.parametrize("outputs", [16, 17, 32, 47])
@pytest.mark.parametrize("count", [2, 5])
@each_matrix
def test_blocks_cover_every_output_once(
    storage: str, count: int, outputs: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    """Sixteen at a time; the last block overlaps with the one before it."""
    monkeypatch.setattr(xla, "_BLOCK", 1)
    w, x = random_matrix(rng, outputs, INPUTS, **MATRICES[storage]), rows(rng, count, "float32")
    multiply_in_blocks: Any = xla.quantized_matmul
    multiply_in_blocks.clear_cache()
    out = multiply_in_blocks(x, w)
    multiply_in_blocks.clear_cache()
    assert_is_product(np.asarray(out), x, w, TOLERANCES["float32"])


@pytest.mark.parametrize("implementation", [*implementations("quantized_matmul"), "reference"])
@pytest.mark.parametrize(("outputs", "group"), [(1, 2), (3, 8), (5, 64)])
def test_smallest_sizes(outputs: int, group: int, implementation: str, rng: np.random.Generator):
    for codes in ("uint8", "int8"):
        for has_low in (False, True):
            w = random_matrix(rng, outputs, 64, codes=codes, group=group, has_low=has_low)
            x = rows(rng, 1, "float32", 64)
            assert_is_product(multiply(implementation, x, w), x, w, TOLERANCES["float32"])


@each_implementation
@each_matrix
def test_no_rows_give_no_results(storage: str, implementation: str, rng: np.random.Generator):
    w = random_matrix(rng, OUTPUTS, INPUTS, **MATRICES[storage])
    assert multiply(implementation, rows(rng, 0, "bfloat16"), w).size == 0


@each_implementation
def test_weights_that_were_quantised_give_nearly_their_own_product(implementation: str, rng: np.random.Generator):
    """Eight bits keep seven, four bits three: errors of random signs add up to a fraction of a percent and a tenth."""
    weights, x = (rng.normal(size=(n, 512)).astype(np.float32) for n in (64, 8))
    exact = x @ weights.T
    for w, share in (
        (quantize_rows(weights, np), 0.02),
        (quantize_rows(weights, np, input_bits=8), 0.03),
        (quantize_groups(weights, 32, np), 0.12),
    ):
        error = multiply(implementation, x, w) - exact
        assert np.sqrt(np.mean(error**2)) < share * np.sqrt(np.mean(exact**2))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices dequantise a whole matrix")
@pytest.mark.parametrize("count", [1, 4])
@each_matrix
def test_a_cpu_never_holds_the_whole_matrix_in_wide_numbers(storage: str, count: int, rng: np.random.Generator):
    small = random_matrix(rng, 8, 2048, **MATRICES[storage])
    w = jax.tree.map(lambda x: abstract(8192, *x.shape[1:], dtype=x.dtype), small)
    run = partial(quantized_matmul, implementation="xla")
    codes = 8192 * 2048 if storage.startswith("float8") else 0  # a copy of the bytes
    assert temporary_bytes(run, abstract(count, 2048, dtype=jnp.bfloat16), w) - codes < 8 * 2**20


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ((2, INPUTS - 1), {}, "rows (2, 255) and a matrix (37, 256) have no product"),
        ((INPUTS,), {}, "rows (256,) and a matrix (37, 256) have no product"),
        ((2, INPUTS), {"low": jnp.zeros((OUTPUTS, 1))}, "int8 inputs need a matrix of int8 codes"),
        ((2, INPUTS), {"scale": jnp.ones((OUTPUTS, 2))}, "int8 inputs need a matrix of int8 codes"),
        ((2, INPUTS), {"codes": jnp.zeros((OUTPUTS, INPUTS // 2), jnp.uint8)}, "int8 inputs need a matrix of int8"),
    ],
)
def test_refuses_what_has_no_meaning(
    shape: tuple[int, ...], change: dict[str, Any], message: str, rng: np.random.Generator
):
    w = replace(random_matrix(rng, OUTPUTS, INPUTS, **MATRICES["int8-inputs"]), **change)
    with pytest.raises(ValueError, match=re.escape(message)):
        quantized_matmul(jnp.zeros(shape), w)
    with pytest.raises(ValueError, match="have no product"):
        quantized_matmul(jnp.zeros((2, INPUTS)), w.reshape(1, OUTPUTS))
