"""The KV cache: a pytree of page pools, one entry per layer, which every step takes donated and returns."""

import math
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp

from lserve_jax.config.checks import require_whole
from lserve_jax.config.inference import InferenceConfig, LayerKind, Storage
from lserve_jax.config.sizes import PoolSizes, Sizes, check_sizes
from pallas_kernels import LayerKV, PagedKV, QuantizedArray, QuantizedKeys, Selection, Tail, selection_width

_BITS = {"int8": 8, "int4": 4}


class LayerCache(NamedTuple):
    """One layer: its pools, and the last page selection of each slot's retrieval heads.

    ``selected`` has arrays [max_num_seqs, K_retrieval, width] (see `pallas_kernels.page_select`), or is None if the
    layer reads every page or a selection has room for the whole pool.
    """

    kv: LayerKV
    selected: Selection | None


type KVCache = tuple[LayerCache, ...]


def init_cache(
    config: InferenceConfig,
    *,
    max_num_seqs: int | None = None,
    retrieval_pages: int,
    streaming_pages: int,
    slots: int | None = None,
) -> KVCache:
    """Returns an empty cache, one `LayerCache` per layer. Usable under `jax.eval_shape`.

    All sequences share the pages; the host decides which sequence gets which page (`lserve_jax.engine.allocator`). A
    page that passes to another sequence need not be cleared.

    Args:
      config: model, head classes and element type of the pages.
      max_num_seqs: sequences per decode batch, each with a slot.
      retrieval_pages: pages of each layer's retrieval pool; 0 if no layer has one. The pool may have a few more, which
        kernels need (`padded`): page ids may be less than the pool's own number of pages.
      streaming_pages: pages of each layer's streaming pool; 0 if no layer has one.
      slots: deprecated name of ``max_num_seqs``.

    Raises:
      InputError: if a size is below 1, or a pool that a layer needs has no page.
    """
    if (slots is None) == (max_num_seqs is None):
        raise TypeError("init_cache needs max_num_seqs")
    if slots is not None:
        warnings.warn("init_cache(slots=) is deprecated: say max_num_seqs=", FutureWarning, stacklevel=2)
        max_num_seqs = slots
    check_sizes(max_num_seqs=max_num_seqs)
    assert max_num_seqs is not None
    for name, pages in (("retrieval", retrieval_pages), ("streaming", streaming_pages)):
        if any(getattr(kind, name) for kind in config.kinds):
            require_whole(f"{name}_pages", pages)
    pools = padded(config, PoolSizes(retrieval=retrieval_pages, streaming=streaming_pages))
    return tuple(_layer(config, kind, max_num_seqs, pools) for kind in config.kinds)


def padded(config: InferenceConfig, pools: PoolSizes) -> PoolSizes:
    """Returns the pools that `init_cache` allocates for ``pools``: no smaller, at most 7 retrieval pages larger.

    Kernels copy eight rows of key statistics at once, one for each head and sub-page. If a page has fewer, the rows of
    the whole pool are a multiple of eight. All layers have equally many pages.
    """
    subs = config.attention.page_size // config.attention.sub_page_size
    selecting = [kind.num_retrieval for kind in config.kinds if kind.decode.num_selected is not None]
    unit = max((8 // math.gcd(8, heads * subs) for heads in selecting), default=1)
    return replace(pools, retrieval=-(-pools.retrieval // unit) * unit)


def empty_cache(config: InferenceConfig, sizes: Sizes, pools: PoolSizes) -> KVCache:
    """Returns the empty cache of an engine."""
    return init_cache(
        config,
        max_num_seqs=sizes.max_num_seqs,
        retrieval_pages=pools.retrieval,
        streaming_pages=pools.streaming,
    )


def _layer(config: InferenceConfig, kind: LayerKind, max_num_seqs: int, pools: PoolSizes) -> LayerCache:
    shape = (max_num_seqs, config.model.num_kv_heads, config.attention.page_size, config.model.head_dim)
    kv = LayerKV(
        retrieval=_pool(config, kind.retrieval, pools.retrieval),
        streaming=_pool(config, kind.streaming, pools.streaming),
        tail=Tail(*(jnp.zeros(shape, config.dtype) for _ in range(2))),
    )
    attention, num_selected = config.attention, kind.decode.num_selected
    least = attention.least_selected
    if num_selected is None or least is None or least >= pools.retrieval:  # a list of the whole pool selects nothing
        return LayerCache(kv, None)
    width = selection_width(num_selected, attention.selector_interval, attention.page_size)
    return LayerCache(kv, Selection.empty(max_num_seqs, kind.num_retrieval, width))


def _pool(config: InferenceConfig, storage: Storage | None, pages: int) -> PagedKV | None:
    if storage is None:
        return None
    heads, page_size, head_dim = storage.num_kv_heads, config.attention.page_size, config.model.head_dim
    shape = (pages, heads, page_size, head_dim)
    if storage.dtype in _BITS:
        bits = _BITS[storage.dtype]
        codes = (*shape[:-1], head_dim * bits // 8)
        k: Any = QuantizedKeys(codes=jnp.zeros(codes, jnp.uint8), bits=bits)
        scale, low = (jnp.zeros(shape[:-1], jnp.float16) for _ in range(2))
        v: Any = QuantizedArray(codes=jnp.zeros(codes, jnp.uint8), scale=scale, low=low, bits=bits)
    else:
        k, v = (jnp.zeros(shape, storage.dtype) for _ in range(2))
    found = PagedKV(k, v)
    if storage.sub_page_size is not None:
        bounds = (pages, heads, page_size // storage.sub_page_size, head_dim)
        found = found._replace(k_min=jnp.zeros(bounds, config.dtype), k_max=jnp.zeros(bounds, config.dtype))
    if storage.has_means:
        means = (pages, heads, head_dim)
        found = found._replace(k_mean=jnp.zeros(means, config.dtype), v_mean=jnp.zeros(means, config.dtype))
    return found
