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
        walk_of_class = getattr(walk or Walk(), name)
        visited = _is_visited(walk_of_class, tokens, history.size, kv.page_size + tokens)
        keys, values = (
            jnp.concatenate([_tokens(pages[table]), *(x[:, :, heads].astype(jnp.float32) for x in rest)], axis=1)
            for pages, *rest in (
                (keys_of(pool, jnp.float32), newest.k, k),
                (dequantize(pool.v, jnp.float32), newest.v, v),
            )
        )
        visible = jnp.broadcast_to(visible[:, None] & visited, (batch, pool.num_kv_heads, tokens, at.shape[1]))
        weights = jnp.ones((batch, at.shape[1]), jnp.float32)
        if isinstance(walk_of_class, BlockList) and walk_of_class.means is not None:
            means, stands_in = _means(walk_of_class, tokens, own, table, kv.page_size)
            keys, values = (jnp.concatenate([x, mean], axis=1) for x, mean in zip((keys, values), means, strict=True))
            visible = jnp.concatenate([visible, stands_in], axis=-1)
            weights = jnp.pad(weights, ((0, 0), (0, stands_in.shape[-1])), constant_values=walk_of_class.keys)
        outputs.append(_attend(grouped[:, :, heads], keys, values, visible, weights))
    return jnp.concatenate(outputs, axis=2).reshape(q.shape).astype(q.dtype)


def _tokens(pages: jax.Array) -> jax.Array:
    """Returns the tokens [B, S, K, H] of pages [B, n, K, page_size, H]."""
    by_token = jnp.swapaxes(pages, 2, 3)
    return by_token.reshape(by_token.shape[0], -1, *by_token.shape[3:])


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns [B, T, K, G, H] for q of that shape, k and v [B, S, K, H], and visible [B, K, T, S].

    ``weights`` [B, S] are the keys that each one stands for.
    """
    is_seen = jnp.swapaxes(jnp.any(visible, axis=2), 1, 2)[..., None]
    k, v = (jnp.where(is_seen, x, 0.0) for x in (k, v))
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, precision="highest") / jnp.sqrt(jnp.float32(q.shape[-1]))
    scores += jnp.log(weights)[:, None, None, None]
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


def _means(
    walk: BlockList, tokens: int, own: jax.Array, table: jax.Array, page_size: int
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Returns the means [B, n, K, H] of a list's blocks, and where they stand in for them, [B, K, T, n] bool."""
    assert walk.means is not None
    block, pages = jnp.arange(walk.means.k.shape[2], dtype=jnp.int32), walk.keys // page_size
    held = jnp.pad(table >= 0, ((0, 0), (0, max(block.size * pages - table.shape[1], 0))))[:, : block.size * pages]
    is_held = held.reshape(-1, block.size, pages).all(axis=-1)
    stands_in = ((block + 1) * walk.keys <= own[:, None]) & is_held
    row = jnp.arange(tokens, dtype=jnp.int32) // walk.queries
    unlisted = ~walk.is_visited(block.size)[:, :, row]
    k, v = (jnp.swapaxes(x, 1, 2).astype(jnp.float32) for x in walk.means)
    return (k, v), stands_in[:, None, None] & unlisted
