"""The KV cache: a pytree of page pools, one entry a layer, taken donated and returned by every step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lserve_jax.config.inference import InferenceConfig
from pallas_kernels import NO_PAGE, LayerKV, PagedKV, QuantizedArray, selection_width

_BITS = {"int8": 8, "int4": 4}


class LayerCache(NamedTuple):
    """One layer: its pools, and the pages that each slot's retrieval heads chose last.

    ``selected`` is [slots, K_retrieval, width] int32 (see `pallas_kernels.page_select`), or None where all are read:
    also where the whole pool has no more pages than a selection.
    """

    kv: LayerKV
    selected: jax.Array | None


type KVCache = tuple[LayerCache, ...]


def init_cache(config: InferenceConfig, *, slots: int, retrieval_pages: int, streaming_pages: int) -> KVCache:
    """Returns an empty cache, one `LayerCache` a layer. Usable under `jax.eval_shape`.

    Pages are shared by all sequences; who holds which is the host's business (`lserve_jax.engine.allocator`). Nothing
    need be cleared when a page changes hands.

    Args:
      config: model, head classes and element type of the pages.
      slots: sequences of a decode batch.
      retrieval_pages: pages of each layer's retrieval pool.
      streaming_pages: pages of each layer's streaming pool.
    """
    for name, value in (("slots", slots), ("retrieval_pages", retrieval_pages), ("streaming_pages", streaming_pages)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    return tuple(
        _layer(config, layer, slots, retrieval_pages, streaming_pages) for layer in range(config.model.num_layers)
    )


def _layer(config: InferenceConfig, layer: int, slots: int, retrieval_pages: int, streaming_pages: int) -> LayerCache:
    retrieval = config.num_retrieval[layer]
    streaming = config.model.num_kv_heads - retrieval
    kv = LayerKV(
        retrieval=_pool(config, config.kv_dtype, retrieval_pages, retrieval, has_statistics=True)
        if retrieval
        else None,
        streaming=_pool(config, config.streaming_dtype, streaming_pages, streaming) if streaming else None,
    )
    num_selected = config.num_selected(layer)
    if num_selected is None or num_selected >= retrieval_pages or not retrieval:
        return LayerCache(kv, None)
    width = selection_width(num_selected, config.attention.selector_interval, config.attention.page_size)
    return LayerCache(kv, jnp.full((slots, retrieval, width), NO_PAGE, jnp.int32))


def _pool(config: InferenceConfig, dtype: str, pages: int, heads: int, *, has_statistics: bool = False) -> PagedKV:
    attention, head_dim = config.attention, config.model.head_dim

    def elements() -> jax.Array | QuantizedArray:
        shape = (pages, heads, attention.page_size, head_dim)
        if dtype not in _BITS:
            return jnp.zeros(shape, dtype)
        bits = _BITS[dtype]
        codes = jnp.zeros((*shape[:-1], head_dim * bits // 8), jnp.uint8)
        return QuantizedArray(codes=codes, scale=jnp.zeros(shape[:-1]), zero=jnp.zeros(shape[:-1]), bits=bits)

    if not has_statistics:
        return PagedKV(elements(), elements())
    subs = attention.page_size // attention.sub_page_size
    k_min, k_max = (jnp.zeros((pages, heads, subs, head_dim), config.dtype) for _ in range(2))
    return PagedKV(elements(), elements(), k_min, k_max)
