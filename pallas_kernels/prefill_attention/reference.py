"""The specification of `prefill_attention`: gathers everything, in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.core.paging import LayerKV, PageTables, is_visible, pools
from pallas_kernels.core.quantization import dequantize
from pallas_kernels.prefill_attention.blocks import BlockList, BlockRanges, Walk


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv: LayerKV,
    tables: PageTables,
    starts: jax.Array,
    counts: jax.Array,
    *,
    sink: int,
    local: int,
    has_history: bool = True,
    walk: Walk | None = None,
) -> jax.Array:
    """Returns what `pallas_kernels.prefill_attention` defines."""
    batch, tokens, _, head_dim = q.shape
    grouped = q.reshape(batch, tokens, k.shape[2], -1, head_dim).astype(jnp.float32)
    chunk = jnp.arange(tokens, dtype=jnp.int32)
    positions = starts[:, None] + chunk
    outputs = []
    for name, pool, table, heads in pools(kv, tables):
        history = jnp.arange(table.shape[1] * pool.page_size, dtype=jnp.int32)[None]
        keys = jnp.concatenate([jnp.broadcast_to(history, (batch, history.size)), positions], axis=1)
        exists = jnp.concatenate([history < starts[:, None], chunk < counts[:, None]], axis=1)
        window = (sink, local) if name == "streaming" else (None, None)
        visible = exists[:, None] & is_visible(positions[:, :, None], keys[:, None], *window)  # [B, T, S]
        visible = visible[:, None] & _is_visited(getattr(walk or Walk(), name), tokens, history.size)  # [B, K, T, S]
        both = []
        for pages, new in ((pool.k, k), (pool.v, v)):
            old = jnp.swapaxes(dequantize(pages, jnp.float32)[table], 2, 3).reshape(
                batch, -1, pool.num_kv_heads, head_dim
            )
            joined = jnp.concatenate([old, new[:, :, heads].astype(jnp.float32)], axis=1)
            both.append(jnp.where(jnp.swapaxes(jnp.any(visible, axis=2), 1, 2)[..., None], joined, 0.0))
        scores = jnp.einsum("btkgh,bskh->bkgts", grouped[:, :, heads], both[0], precision="highest")
        scores = scores / jnp.sqrt(jnp.float32(head_dim))
        weights = jax.nn.softmax(jnp.where(visible[:, :, None], scores, -jnp.inf), axis=-1)
        weights = jnp.where(visible[:, :, None], weights, 0.0)
        outputs.append(jnp.einsum("bkgts,bskh->btkgh", weights, both[1], precision="highest"))
    return jnp.concatenate(outputs, axis=2).reshape(q.shape).astype(q.dtype)


def _is_visited(walk: BlockRanges | BlockList | None, tokens: int, history: int) -> jax.Array:
    """Returns whether each row visits each key of history and chunk, in this order; broadcastable to [B, K, T, S]."""
    if walk is None:
        return jnp.ones((1, 1, 1, 1), jnp.bool_)
    blocks = walk.is_visited(-(-history // walk.keys))
    row, key = (
        jnp.arange(count, dtype=jnp.int32) // size for count, size in ((tokens, walk.queries), (history, walk.keys))
    )
    visited = blocks[:, :, row][..., key]
    return jnp.concatenate([visited, jnp.ones((*visited.shape[:3], tokens), jnp.bool_)], axis=-1)
