"""Whole steps of an 8B model, compiled for an H200: Hopper's kernels throughout, nothing copied, little besides."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax import HeadClasses, InferenceConfig, from_preset, init_cache
from lserve_jax.config import ModelConfig
from lserve_jax.heads import classify
from lserve_jax.models.known import known_configs
from lserve_jax.models.llama import abstract_params
from lserve_jax.steps import decode_step
from pallas_kernels import PageTables
from tests.pallas_kernels import hopper
from tests.pallas_kernels.cases import abstract

CONTEXT = 131_072


def _config(kv_dtype: str) -> InferenceConfig:
    """Llama-3.1-8B with half of the KV heads streaming, but none in one layer and all in another."""
    model = ModelConfig.from_hf(known_configs()["llama-3.1-8b"], source="known.json")
    gates = np.tile(np.linspace(1, 0, model.num_kv_heads), (model.num_layers, 1))
    half = classify(gates, 0.5, "layer")
    counts = (model.num_kv_heads, 0, *half.num_retrieval[2:])
    heads = HeadClasses(order=half.order, num_retrieval=counts)
    return InferenceConfig(model=model, attention=from_preset("lserve", kv_dtype=kv_dtype), heads=heads)


def _state(config: InferenceConfig) -> tuple[Any, Any, PageTables]:
    pages = CONTEXT // config.attention.page_size
    cache = jax.eval_shape(partial(init_cache, config, slots=1, retrieval_pages=pages, streaming_pages=64))
    table: Any = abstract(1, pages)
    return abstract_params(config.model, jnp.dtype(config.dtype)), cache, PageTables(table, table)


def _assert_lean(program: Any, cache: Any, temporary_bytes: int) -> None:
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert memory.temp_size_in_bytes < temporary_bytes


@pytest.mark.slow
def test_decode_step_of_8b() -> None:
    config = _config("int8")
    params, cache, tables = _state(config)

    def step(params: Any, cache: Any, ints: Any, tables: PageTables) -> Any:
        return decode_step(params, cache, ints, ints, ints, tables, config=config)

    program, kernels = hopper.compiled(step, params, cache, abstract(1), tables, donate=(1,))
    hopper.assert_fits(kernels)
    names = {kernel.name.rsplit("_", 1)[0] for kernel in kernels}
    assert {"decode_attention", "decode_attention_merge", "page_select_score", "page_select_choose"} <= names
    assert "scatter" not in program.as_text()  # XLA's way of writing pages
    _assert_lean(program, cache, 64 * 2**20)
