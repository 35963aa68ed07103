"""Density of prefill: the share of a prompt's history that its retrieval heads read."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lserve_jax.config.inference import InferenceConfig, LayerKind
from lserve_jax.models.layerwise import run_model
from lserve_jax.models.llama import Params
from lserve_jax.runtime.attend import Span, history_walk, prefill_attend
from lserve_jax.runtime.cache import KVCache, LayerCache
from pallas_kernels import BlockList, PageTables
from pallas_kernels.core.dtypes import narrowed
from pallas_kernels.core.paging import div_up


class Density(NamedTuple):
    """Pairs of a tile of queries and a block of its history, of all retrieval heads, in each layer.

    Attributes:
      read: [L, B] int32 those that are read; 0 in layers that leave nothing out.
      all: [L, B] int32 those that there are; 0 in layers that leave nothing out.
    """

    read: jax.Array
    all: jax.Array


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def density_step(
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    tables: PageTables,
    ends: jax.Array,
    *,
    config: InferenceConfig,
) -> tuple[Density, KVCache]:
    """Returns how much of their history the tokens of a prompt chunk read, and the cache with the chunk.

    The arguments are those of `prefill_step`, and so is the cache.
    """
    arguments = (params, cache, tokens, tables)
    params, cache, tokens, tables = narrowed(arguments)
    span = Span(*narrowed((starts, counts, ends)))
    inner = prefill_attend(config, tables, *span[:2], ends=span.ends)

    def attend(
        kind: LayerKind, q: jax.Array, k: jax.Array, v: jax.Array, state: LayerCache
    ) -> tuple[jax.Array, tuple[LayerCache, Density]]:
        out, after = inner(kind, q, k, v, state)
        walk = history_walk(config, kind, q, after.kv, tables, span)
        return out, (after, _density(None if walk is None else walk.retrieval, span))

    positions = span.starts[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    _, states = run_model(params, cache, tokens, positions, attend, config)
    densities = [density for _, density in states]
    return jax.tree.map(lambda *layers: jnp.stack(layers), *densities), tuple(state for state, _ in states)


def _density(lists: object, span: Span) -> Density:
    """Returns the density of one layer, arrays [B]."""
    if not isinstance(lists, BlockList):
        return Density(jnp.zeros_like(span.starts), jnp.zeros_like(span.starts))
    tiles, heads = div_up(span.counts, lists.queries), lists.blocks.shape[1]
    read = jnp.sum(lists.blocks >= 0, axis=(1, 2, 3), dtype=jnp.int32)
    return Density(read, heads * tiles * div_up(span.starts, lists.keys))
