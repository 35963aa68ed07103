"""Random weights, pages, page tables and queries, made on the device."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.config.inference import InferenceConfig
from lserve_jax.config.pages import visible_pages
from lserve_jax.config.sizes import PoolSizes
from lserve_jax.models.llama import Params
from lserve_jax.runtime.cache import KVCache
from lserve_jax.weights import abstract_params
from pallas_kernels import NO_PAGE, PageTables, QuantizedArray, QuantizedKeys


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: np.dtype, deviation: float) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(deviation, dtype)


@partial(jax.jit, static_argnames=("shape",))
def _codes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.bits(key, shape, jnp.uint8)


def _filled(tree: Any, fill: Callable[[str, jax.Array, Any], Any]) -> Any:
    """Returns real arrays for a tree of abstract ones, made on the device leaf by leaf to limit temporaries."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, QuantizedArray | QuantizedKeys)
    )
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))
    named = [(jax.tree_util.keystr(path[-1:], simple=True), leaf) for path, leaf in leaves]
    return structure.unflatten(fill(name, key, leaf) for (name, leaf), key in zip(named, keys, strict=True))


def random_params(config: InferenceConfig) -> Params:
    """Returns normal weights with standard deviation 0.02, and norms of 1."""

    def fill(name: str, key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.ones(leaf.shape, leaf.dtype) if name == "scale" else _normal(key, leaf.shape, leaf.dtype, 0.02)

    return _filled(abstract_params(config.model, jnp.dtype(config.dtype)), fill)


def random_cache(template: KVCache) -> KVCache:
    """Returns pages and tails of standard normal keys and values, and bounds of keys around zero."""

    def fill(name: str, key: jax.Array, leaf: Any) -> Any:
        if isinstance(leaf, QuantizedKeys):
            return QuantizedKeys(codes=_codes(key, leaf.codes.shape), bits=leaf.bits)
        if isinstance(leaf, QuantizedArray):  # codes of all bits, evenly: from -3 to 3
            numbers = (6 / (2**leaf.bits - 1), -3)
            scale, low = (jnp.full(leaf.scale.shape, value, leaf.scale.dtype) for value in numbers)
            return QuantizedArray(codes=_codes(key, leaf.codes.shape), scale=scale, low=low, bits=leaf.bits)
        match name:
            case "pages" | "scores":  # of a selection
                return jnp.full(leaf.shape, NO_PAGE if name == "pages" else -jnp.inf, leaf.dtype)
            case "k_min" | "k_max":
                bound = jnp.abs(_normal(key, leaf.shape, leaf.dtype, 1.0))
                return -bound if name == "k_min" else bound
        return _normal(key, leaf.shape, leaf.dtype, 1.0)

    return _filled(template, fill)


def page_tables(
    config: InferenceConfig, pools: PoolSizes, *, slots: int, context: int, span: range, window: int
) -> PageTables:
    """Returns random page tables of ``slots`` sequences, each with a slot, for a call of the queries ``span``.

    The streaming table holds the pages that they see and no others, as the engine's does. Pages go round in a ring, so
    that what successive calls both see stays where it is.
    """
    attention, rng = config.attention, np.random.default_rng(0)
    width = -(-context // attention.page_size)
    nothing = np.full((slots, width), NO_PAGE)
    retrieval = rng.permutation(pools.retrieval)[: slots * width].reshape(slots, width) if pools.retrieval else nothing
    each = pools.streaming // slots
    own = rng.permutation(pools.streaming)[: each * slots].reshape(slots, each) if each else nothing
    logical, sinks = np.arange(width), min(-(-attention.sink // attention.page_size), each)
    ring = np.where(logical < sinks, logical, sinks + (logical - sinks) % max(each - sinks, 1))
    is_seen = visible_pages(
        span.start, len(span), sink=attention.sink, window=window, page_size=attention.page_size, num_pages=width
    )
    streaming = np.where(is_seen, own[:, ring], NO_PAGE)
    return PageTables(*(x.astype(np.int32) for x in (retrieval, streaming, np.arange(slots))))


def attention_inputs(config: InferenceConfig, batch: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns random queries [B, T, N, H] and keys, which serve as values too, [B, T, K, H]."""
    model, keys = config.model, jax.random.split(jax.random.key(1, impl="rbg"))
    q, kv = (
        _normal(key, (batch, count, heads, model.head_dim), jnp.dtype(config.dtype), 1.0)
        for key, heads in zip(keys, (model.num_heads, model.num_kv_heads), strict=True)
    )
    return q, kv
