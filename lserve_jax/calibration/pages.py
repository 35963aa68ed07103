"""Runs a model on a chunk of a sequence whose earlier tokens are in a dense KV cache, with access to its heads."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lserve_jax.calibration.attention import by_kv_head, by_query_head
from lserve_jax.config.inference import InferenceConfig, LayerKind
from lserve_jax.models import layerwise
from lserve_jax.models.layers import each_layer
from lserve_jax.models.llama import Params, RopeTables
from lserve_jax.runtime.cache import KVCache, LayerCache
from pallas_kernels import LayerKV, PageTables, kv_write
from pallas_kernels.core.paging import is_visible, newest_page


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence; the pages hold the tokens before them.

    Attributes:
      tokens: [T] int32.
      targets: [T] int32 the right next tokens; -1 for those that do not count.
      asks: [T] int32 the passage from which each target comes, 0 for none.
      start: scalar int32 position of the first token.
      count: scalar int32 valid tokens.
      table: [pages] int32 page table.
      sources: [S] int32, S = pages · page_size: the passage to which each token of the sequence belongs, 0 for none.
    """

    tokens: jax.Array
    targets: jax.Array
    asks: jax.Array
    start: jax.Array
    count: jax.Array
    table: jax.Array
    sources: jax.Array

    @property
    def is_target(self) -> jax.Array:
        """[T] float32: 1 for tokens with a target, 0 for others."""
        return (self.targets >= 0).astype(jnp.float32)

    def nll(self, log_probabilities: jax.Array) -> jax.Array:
        """Returns the negative log-likelihood [T] of the targets, 0 for no target, from log-probabilities [T, V]."""
        found = jnp.take_along_axis(log_probabilities, jnp.maximum(self.targets, 0)[:, None], axis=-1)[:, 0]
        return -found * self.is_target


class LayerHeads(NamedTuple):
    """A layer's heads: the chunk's queries [K, G, T, H], keys and values [T, K, H], and the tokens before it."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    kv: LayerKV

    def map[T](self, chunk: Chunk, head: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], T]) -> T:
        """Returns the stacked results of ``head`` for each KV head, computed one at a time, and again for a gradient.

        Args:
          chunk: the chunk, which names the pages.
          head: number of the head, queries [G, T, H], keys and values [S + T, H] → any arrays.
        """
        size, head_dim, pool = chunk.sources.size, self.k.shape[-1], self.kv.retrieval
        assert pool is not None
        open_page = newest_page(chunk.start, self.kv.page_size)  # of the token before the chunk
        is_open = (jnp.arange(chunk.table.size, dtype=jnp.int32) == open_page)[:, None, None]

        @jax.checkpoint
        def one(index: jax.Array) -> T:
            keys, values = (
                jnp.concatenate(
                    [
                        jnp.where(is_open, tail[0, index], pages[chunk.table, index]).reshape(size, head_dim),
                        new[:, index],
                    ]
                )
                for pages, tail, new in zip((pool.k, pool.v), self.kv.tail, (self.k, self.v), strict=True)
                if isinstance(pages, jax.Array)  # Reader refuses quantised pages
            )
            return head(index, self.q[index], keys, values)

        return jax.lax.map(one, jnp.arange(self.k.shape[1], dtype=jnp.int32))


def visible_keys(chunk: Chunk, sink: int, local: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the keys of pages and chunk that each query sees, [T, S + T] bool: with dense and streaming attention."""
    size = chunk.sources.size
    at = chunk.start + jnp.arange(chunk.tokens.size, dtype=jnp.int32)
    before = jnp.arange(size, dtype=jnp.int32)
    positions = jnp.concatenate([before, at])
    exists = jnp.concatenate([before < chunk.start, jnp.ones(at.size, bool)])
    dense = exists & is_visible(at[:, None], positions, None, None)
    return dense, exists & is_visible(at[:, None], positions, sink, local)


type Attend[T] = Callable[[int, jax.Array, LayerHeads, jax.Array], tuple[jax.Array, T]]
"""Layer, its input hidden states [1, T, D], heads and gates [K] → outputs [K, G, T, H] and any other result."""


def forward[T](
    params: Params, cache: KVCache, chunk: Chunk, gates: jax.Array, attend: Attend[T], config: InferenceConfig
) -> tuple[jax.Array, list[T], KVCache]:
    """Returns the hidden states [1, T, D] after the final norm, each layer's results, and the cache with the chunk.

    Args:
      params: the model's parameters in the checkpoint's order of heads.
      cache: the cache of a dense model with the tokens before the chunk.
      chunk: the tokens.
      gates: [L, K].
      attend: the attention of a layer.
      config: a dense model.
    """
    positions = chunk.start + jnp.arange(chunk.tokens.size, dtype=jnp.int32)
    x, rope = layerwise.begin(params, config, chunk.tokens[None], positions[None])

    def run(layer: int, x: jax.Array, entry: tuple[LayerCache, jax.Array]) -> tuple[jax.Array, tuple[T, LayerCache]]:
        state, gate = entry
        return jax.checkpoint(partial(_layer, params, config, layer, rope, state, chunk, attend))(x, gate)

    x, results = each_layer(x, zip(cache, gates, strict=True), run)
    found, new_cache = zip(*results, strict=True)
    return layerwise.end(params, config, x), list(found), tuple(new_cache)


def _layer(
    params: Params,
    config: InferenceConfig,
    layer: int,
    rope: RopeTables,
    cache: LayerCache,
    chunk: Chunk,
    attend: Attend[Any],
    x: jax.Array,
    gate: jax.Array,
) -> tuple[jax.Array, Any]:
    table = chunk.table[None]

    def through_pages(
        kind: LayerKind, q: jax.Array, k: jax.Array, v: jax.Array, state: LayerCache
    ) -> tuple[jax.Array, Any]:
        heads = LayerHeads(by_kv_head(q[0], k.shape[2]), k[0], v[0], state.kv)
        outputs, found = attend(layer, x, heads, gate)
        k, v = (jax.lax.stop_gradient(new) for new in (k, v))  # the chunk does not read the pages that it writes
        kv = kv_write(k, v, state.kv, PageTables(table, table), chunk.start[None], chunk.count[None])
        return by_query_head(outputs)[None].astype(q.dtype), (found, state._replace(kv=kv))

    return layerwise.run_layer(params, config, layer, x, rope, cache, through_pages)
