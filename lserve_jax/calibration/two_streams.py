"""DuoAttention's objective (Xiao et al., arXiv 2410.10819): how a model's hidden states change as its heads stream."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.calibration.attention import average, by_kv_head, by_query_head, scores, weights
from lserve_jax.config.inference import InferenceConfig, LayerKind
from lserve_jax.models import layerwise
from lserve_jax.models.layers import each_layer
from lserve_jax.models.llama import Params, RopeTables
from pallas_kernels import LayerKV, PagedKV, PageTables, Tail, prefill_attention
from pallas_kernels.core.paging import is_visible

BLOCK = 256
"""Queries whose scores are in memory at once."""


class Example(NamedTuple):
    """One sequence: tokens [T] int32, with T a multiple of `BLOCK` or less than it; which of them count [T] bool."""

    tokens: jax.Array | np.ndarray
    is_labelled: jax.Array | np.ndarray


def distillation_loss(params: Params, example: Example, gates: jax.Array, config: InferenceConfig) -> jax.Array:
    """Returns the mean squared difference of two streams' final hidden states at the labelled tokens.

    The full stream is the model. In the blended stream, a head's output is

        gate · (the full stream's output) + (1 − gate) · (streaming attention in the blended stream)

    so that the gradient of the gates passes through streaming attention only. Memory grows linearly with the sequence.

    Args:
      params: the model's parameters in the checkpoint's order of heads.
      example: the sequence.
      gates: [L, K] float32.
      config: a dense model; its ``attention`` has the ``sink`` and ``local`` of streaming.
    """
    positions = jnp.arange(example.tokens.size, dtype=jnp.int32)
    x, rope = layerwise.begin(params, config, jnp.asarray(example.tokens)[None], positions[None])

    def run(layer: int, streams: tuple[jax.Array, jax.Array], gate: jax.Array) -> tuple[Any, None]:
        full, blended = streams
        full, outputs = layerwise.run_layer(params, config, layer, full, rope, config, _full_attention)
        return (full, _blended_layer(params, config, layer, rope)(blended, outputs, gate)), None

    streams, _ = each_layer((x, x), gates, run)
    ends = (layerwise.end(params, config, x)[0].astype(jnp.float32) for x in streams)
    squares = jnp.mean(jnp.square(jnp.subtract(*ends)), axis=-1)
    is_labelled = jnp.asarray(example.is_labelled, jnp.float32)
    return squares @ is_labelled / jnp.maximum(jnp.sum(is_labelled), 1.0)


def _full_attention(
    kind: LayerKind, q: jax.Array, k: jax.Array, v: jax.Array, state: InferenceConfig
) -> tuple[jax.Array, jax.Array]:
    """Returns causal attention outputs [1, T, N, H] twice; the whole sequence is one prompt chunk."""
    page = jnp.zeros((1, k.shape[2], state.attention.page_size, k.shape[3]), k.dtype)  # never read: there is no history
    kv = LayerKV(retrieval=PagedKV(page, page), streaming=None, tail=Tail(page, page))
    table, start, count = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32), jnp.full(1, q.shape[1], jnp.int32)
    tables = PageTables(table, table)
    out = prefill_attention(
        *(q, k, v, kv, tables, start, count),
        sink=0,
        local=1,
        has_history=False,
        implementation=state.implementation,
    )
    return out, out


def _blended_layer(
    params: Params, config: InferenceConfig, layer: int, rope: RopeTables
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Returns a layer as a function of hidden states, the full stream's attention outputs, and gates [K]."""

    @jax.checkpoint
    def run(x: jax.Array, outputs: jax.Array, gate: jax.Array) -> jax.Array:
        def attend(kind: LayerKind, q: jax.Array, k: jax.Array, v: jax.Array, state: None) -> tuple[jax.Array, None]:
            own = streaming_attention(q[0], k[0], v[0], sink=config.attention.sink, local=config.attention.local)
            share = jnp.repeat(gate, q.shape[2] // k.shape[2])[:, None]
            return (share * outputs.astype(jnp.float32) + (1 - share) * own[None]).astype(q.dtype), state

        return layerwise.run_layer(params, config, layer, x, rope, None, attend)[0]

    return run


def streaming_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, sink: int, local: int) -> jax.Array:
    """Returns outputs [T, N, H] float32 of heads that see a sink and a window, for q [T, N, H] and k, v [T, K, H].

    It is differentiable and equals `prefill_attention` for streaming heads. Only the scores [G, BLOCK, sink + local +
    BLOCK] of one KV head and one block of queries are in memory at a time, also for the gradient.
    """
    tokens, num_heads, _ = k.shape
    block = min(BLOCK, tokens)
    assert tokens % block == 0, (tokens, block)
    before = -(-(local - 1) // block)  # blocks before a query's block that its window reaches
    sink, starts = min(sink, tokens), jnp.arange(0, tokens, block, dtype=jnp.int32)

    @jax.checkpoint
    def attend(first: tuple[jax.Array, jax.Array], piece: tuple[jax.Array, ...]) -> jax.Array:
        queries, keys, values, start = piece
        at = start + jnp.arange(block, dtype=jnp.int32)
        near = start - before * block + jnp.arange((before + 1) * block, dtype=jnp.int32)
        # A key of the sink that also lies in the window counts once.
        is_near = is_visible(at[:, None], near, 0, local) & (near >= sink)
        is_seen = jnp.concatenate([jnp.arange(sink, dtype=jnp.int32) <= at[:, None], is_near], axis=1)
        keys, values = (jnp.concatenate(pair) for pair in zip(first, (keys, values), strict=True))
        return average(weights(scores(queries, keys), is_seen), values)

    def head(one: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        queries, keys, values = one  # [G, T, H], [T, H]
        blocks = jnp.moveaxis(queries.reshape(queries.shape[0], -1, block, queries.shape[-1]), 1, 0)
        pieces = (blocks, *(_windows(x, block, before) for x in (keys, values)), starts)
        outputs = jax.lax.map(partial(attend, (keys[:sink], values[:sink])), pieces)
        return jnp.moveaxis(outputs, 0, 1).reshape(queries.shape)

    return by_query_head(jax.lax.map(head, (by_kv_head(q, num_heads), *(jnp.moveaxis(x, 1, 0) for x in (k, v)))))


def _windows(x: jax.Array, block: int, before: int) -> jax.Array:
    """Returns for each block of ``x`` [T, H] its rows after those of the blocks before: [T / block, n · block, H]."""
    blocks = jnp.pad(x, ((before * block, 0), (0, 0))).reshape(-1, block, x.shape[-1])
    count = blocks.shape[0] - before
    return jnp.concatenate([blocks[index : index + count] for index in range(before + 1)], axis=1)
