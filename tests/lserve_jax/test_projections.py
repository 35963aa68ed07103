"""Products of activations and weights: as precise as their dtype, and no slower for few rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax.layers import project


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_those_of_numpy_for_any_number_of_rows(rows: int, dtype: str, rng: np.random.Generator):
    x = jnp.asarray(rng.normal(size=(1, rows, 24)), dtype)
    kernel = jnp.asarray(rng.normal(size=(40, 24)), dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
    result = project(x, kernel)
    assert (result.shape, result.dtype) == ((1, rows, 40), jnp.dtype(dtype))
    relative = 1e-6 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=relative, atol=relative)


def test_float32_asks_for_float32():
    x, kernel = jnp.ones((8, 16)), jnp.ones((8, 16))
    assert "precision = [HIGHEST, HIGHEST]" in jax.jit(project).lower(x, kernel).as_text()


def test_the_matrix_is_not_transposed_in_memory():
    x, kernel = jnp.ones((1, 64), jnp.bfloat16), jnp.ones((4096, 64), jnp.bfloat16)
    compiled = jax.jit(project).lower(x, kernel).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < kernel.nbytes / 4
