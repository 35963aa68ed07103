"""Products of activations and weights: as precise as their dtype, and no slower for few rows."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax import open_checkpoint
from lserve_jax.models.layers import project
from lserve_jax.models.llama import Llama

TINY = Path(__file__).parents[2] / "golden" / "tiny"


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


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_what_is_stored_wide_is_not_rounded_to_the_inputs_dtype(rows: int, rng: np.random.Generator):
    x, kernel = (jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in ((rows, 24), (40, 24)))
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
    wide = partial(project, out_dtype=jnp.dtype("float32"), is_stored_wide=True)
    np.testing.assert_allclose(wide(x, kernel), expected, rtol=0, atol=1e-5)
    on_gpu = jax.jit(wide).trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
    assert f"-> tensor<{rows}x40xf32>" in next(line for line in on_gpu.splitlines() if "dot_general" in line)


@pytest.mark.parametrize("is_tied", [False, True])
def test_logits_differ_where_bfloat16_would_tie(is_tied: bool):
    config = replace(open_checkpoint(str(TINY / "llama3")).config, tie_embeddings=is_tied)
    model, hidden = Llama(config, jnp.dtype("bfloat16")), jnp.linspace(-1, 1, config.hidden_size, dtype=jnp.bfloat16)
    rows = hidden[None, None]
    params = model.init(jax.random.key(0), rows, method="unembed")
    logits = model.apply(params, rows, method="unembed")
    assert isinstance(logits, jax.Array) and logits.dtype == jnp.float32
    assert np.mean(np.asarray(logits.astype(jnp.bfloat16), np.float32) == np.asarray(logits)) < 0.1
