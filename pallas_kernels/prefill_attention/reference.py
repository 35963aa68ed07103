"""The specification of `prefill_attention`: gathers everything, in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.core.paging import LayerKV, PageTables, Tail, is_visible, pools, slots_of
from pallas_kernels.core.quantization import dequantize
from pallas_kernels.core.sealing import keys_of
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
    rows, chunk = (jnp.arange(count, dtype=jnp.int32) for count in (kv.page_size, tokens))
    positions = starts[:, None] + chunk
    in_page = (starts // kv.page_size * kv.page_size)[:, None] + rows  # the page in which the chunk begins
    is_in_tail = starts + counts <= in_page[:, -1] + 1
    own = jnp.where(is_in_tail, in_page[:, 0], starts)
    newest = Tail(*(jnp.swapaxes(x[slots_of(tables, batch)], 1, 2) for x in kv.tail))
    outputs = []
    for name, pool, table, heads in pools(kv, tables):
        history = jnp.arange(table.shape[1] * kv.page_size, dtype=jnp.int32)
        at = jnp.concatenate([jnp.broadcast_to(history, (batch, history.size)), in_page, positions], axis=1)
        is_before = is_in_tail[:, None] & (in_page < starts[:, None])
        exists = jnp.concatenate([history < own[:, None], is_before, chunk < counts[:, None]], axis=1)
        window = (sink, local) if name == "streaming" else (None, None)
        visible = exists[:, None] & is_visible(positions[:, :, None], at[:, None], *window)
        visited = _is_visited(getattr(walk or Walk(), name), tokens, history.size, kv.page_size + tokens)
        keys, values = (
            jnp.concatenate([_tokens(pages[table]), *(x[:, :, heads].astype(jnp.float32) for x in rest)], axis=1)
            for pages, *rest in (
                (keys_of(pool, jnp.float32), newest.k, k),
                (dequantize(pool.v, jnp.float32), newest.v, v),
            )
        )
        outputs.append(_attend(grouped[:, :, heads], keys, values, visible[:, None] & visited))
    return jnp.concatenate(outputs, axis=2).reshape(q.shape).astype(q.dtype)


def _tokens(pages: jax.Array) -> jax.Array:
    """Returns the tokens [B, S, K, H] of pages [B, n, K, page_size, H]."""
    by_token = jnp.swapaxes(pages, 2, 3)
    return by_token.reshape(by_token.shape[0], -1, *by_token.shape[3:])


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """Returns [B, T, K, G, H] for q of that shape, k and v [B, S, K, H], and visible [B, K or 1, T, S]."""
    is_seen = jnp.swapaxes(jnp.any(visible, axis=2), 1, 2)[..., None]
    k, v = (jnp.where(is_seen, x, 0.0) for x in (k, v))
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, precision="highest") / jnp.sqrt(jnp.float32(q.shape[-1]))
    weights = jax.nn.softmax(jnp.where(visible[:, :, None], scores, -jnp.inf), axis=-1)
    weights = jnp.where(visible[:, :, None], weights, 0.0)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v, precision="highest")


def _is_visited(walk: BlockRanges | BlockList | None, tokens: int, history: int, own: int) -> jax.Array:
    """Returns whether each row visits each key of the history and the ``own`` ones; broadcastable to [B, K, T, S]."""
    if walk is None:
        return jnp.ones((1, 1, 1, 1), jnp.bool_)
    blocks = walk.is_visited(-(-history // walk.keys))
    row, key = (
        jnp.arange(count, dtype=jnp.int32) // size for count, size in ((tokens, walk.queries), (history, walk.keys))
    )
    visited = blocks[:, :, row][..., key]
    return jnp.concatenate([visited, jnp.ones((*visited.shape[:3], own), jnp.bool_)], axis=-1)
