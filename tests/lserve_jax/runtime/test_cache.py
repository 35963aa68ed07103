"""The cache as its callers make it: every size that they name is one that kernels accept."""

from functools import partial
from typing import Any

import jax
import pytest

from lserve_jax import HeadClasses, InferenceConfig, ModelConfig, from_preset, init_cache
from lserve_jax.config.hf import read_hf
from lserve_jax.config.sizes import PoolSizes
from lserve_jax.runtime.cache import KVCache, padded
from lserve_jax.runtime.steps import decode_step, prefill_step
from lserve_jax.weights import abstract_params
from pallas_kernels import PageTables
from tests.lserve_jax.checkpoints import tiny_config
from tests.pallas_kernels import hopper
from tests.pallas_kernels.cases import abstract


def model(**fields: Any) -> ModelConfig:
    """A model of heads that kernels accept, 64 channels each; 2 layers of 4 query and 2 KV heads."""
    shape = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return read_hf(tiny_config(**{"num_hidden_layers": 2, "torch_dtype": "bfloat16", **shape, **fields}), source="tiny")


def selecting(num_retrieval: tuple[int, int], **fields: Any) -> InferenceConfig:
    """Pages of 16 tokens and one sub-page, of which two are selected."""
    policy: dict[str, Any] = {
        "page_size": 16,
        "sub_page_size": 16,
        "token_budget": 32,
        "selector_interval": 1,
        "sink": 16,
    }
    heads = HeadClasses(order=((0, 1), (0, 1)), num_retrieval=num_retrieval)
    return InferenceConfig(model=model(), attention=from_preset("lserve", **policy | fields), heads=heads)


def pages_of(cache: KVCache) -> set[int]:
    return {pool.k.shape[0] for layer in cache for pool in (layer.kv.retrieval,) if pool is not None}


@pytest.mark.parametrize("pages", [3, 5, 8])
@pytest.mark.parametrize("num_retrieval", [(2, 2), (1, 2), (0, 1)])
def test_a_cache_of_any_number_of_pages_is_one_that_kernels_take(num_retrieval: tuple[int, int], pages: int):
    """A step of Hopper's kernels is traced: one that refuses ends it with its reason."""
    config = selecting(num_retrieval)
    config = InferenceConfig(
        model=config.model, attention=config.attention, heads=config.heads, implementation="mosaic_gpu"
    )
    cache = jax.eval_shape(partial(init_cache, config, max_num_seqs=1, retrieval_pages=pages, streaming_pages=pages))
    assert any(layer.selected is not None for layer in cache)
    table: Any = abstract(1, pages)
    with hopper.on_h200():
        _, after = jax.eval_shape(
            partial(decode_step, config=config),
            *(abstract_params(config.model, config.dtype), cache),
            *(abstract(1) for _ in range(3)),
            PageTables(table, table),
        )
    assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(lambda leaf: leaf.shape, cache)


@pytest.mark.parametrize("preset", ["dense", "streaming", "qserve"])
def test_kernels_take_a_cache_that_selects_no_pages(preset: str):
    """Prompt and decode steps of layers that read every page, one with streaming heads; 4-bit keys have bounds."""
    heads = HeadClasses(order=((0, 1), (0, 1)), num_retrieval=(1, 2))
    policy = from_preset(preset, page_size=16, sub_page_size=16)
    config = InferenceConfig(model=model(), attention=policy, heads=heads, implementation="mosaic_gpu")
    cache = jax.eval_shape(partial(init_cache, config, max_num_seqs=1, retrieval_pages=3, streaming_pages=3))
    assert pages_of(cache) == {3}
    bounds = [layer.kv.retrieval.k_min for layer in cache if layer.kv.retrieval is not None]
    assert all((found is None) == (preset != "qserve") for found in bounds)
    params, table = abstract_params(config.model, config.dtype), abstract(1, 3)
    tables: Any = PageTables(table, table)
    with hopper.on_h200():
        for step, tokens in ((prefill_step, abstract(1, 32)), (decode_step, abstract(1))):
            arguments = (params, cache, tokens, abstract(1), abstract(1), tables)
            _, after = jax.eval_shape(partial(step, config=config), *arguments)
            assert jax.tree.structure(after) == jax.tree.structure(cache)


def test_all_layers_have_the_same_pages_and_at_most_seven_more_than_asked_for():
    """One retrieval head of one sub-page per page: the statistics of eight pages are one copy."""
    asked = PoolSizes(retrieval=3, streaming=3)
    assert padded(selecting((2, 2)), asked).retrieval == 4
    assert padded(selecting((1, 2)), asked).retrieval == padded(selecting((1, 0)), asked).retrieval == 8
    assert padded(selecting((2, 2), sub_page_size=4), asked) == asked
    assert padded(selecting((0, 0)), asked) == asked
    cache = init_cache(selecting((1, 2)), max_num_seqs=1, retrieval_pages=3, streaming_pages=3)
    assert pages_of(cache) == {8}
    assert {layer.kv.streaming.k.shape[0] for layer in cache if layer.kv.streaming is not None} == {3}


def test_what_is_padded_needs_no_more_padding():
    for pages in range(20):
        once = padded(selecting((1, 2)), PoolSizes(retrieval=pages, streaming=1))
        assert once.retrieval - pages in range(8)
        assert padded(selecting((1, 2)), once) == once


@pytest.mark.parametrize("name", ["retrieval_pages", "streaming_pages"])
@pytest.mark.parametrize("value", [0, 2.5])
def test_a_pool_without_a_page_is_refused_by_name(name: str, value: float):
    sizes: dict[str, Any] = {"max_num_seqs": 1, "retrieval_pages": 3, "streaming_pages": 3, name: value}
    with pytest.raises(ValueError, match=rf"^{name}={value} must be a whole number from 1$"):
        init_cache(selecting((1, 1)), **sizes)
