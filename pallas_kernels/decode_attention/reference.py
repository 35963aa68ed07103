"""The specification of `decode_attention`: gathers everything, in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.core.paging import LayerKV, PagedKV, PageTables, Tail, is_visible, pools, slots_of
from pallas_kernels.core.quantization import dequantize
from pallas_kernels.core.sealing import keys_of


def decode_attention(
    q: jax.Array,
    kv: LayerKV,
    tables: PageTables,
    lengths: jax.Array,
    selected: jax.Array | None,
    *,
    sink: int,
    local: int,
) -> jax.Array:
    """Returns what `pallas_kernels.decode_attention` defines."""
    num_heads = sum(pool.num_kv_heads for _, pool, _, _ in pools(kv, tables))
    grouped = q.reshape(q.shape[0], num_heads, -1, q.shape[-1]).astype(jnp.float32)
    open_page = jnp.maximum(lengths - 1, 0) // kv.page_size
    rows = jax.tree.map(lambda x: x[slots_of(tables, q.shape[0])], kv.tail)
    outputs = []
    for name, pool, table, heads in pools(kv, tables):
        keys = jnp.arange(table.shape[1] * pool.page_size, dtype=jnp.int32)
        pages = keys // pool.page_size
        if name == "streaming":
            visible = is_visible(lengths[:, None] - 1, keys, sink, local)[:, None]
        else:
            visible = is_visible(lengths[:, None] - 1, keys, None, None)[:, None]
            if selected is not None:
                visible &= jnp.any(selected[..., None, :] == pages[:, None], axis=-1)
        tail = Tail(*(x[:, heads] for x in rows))
        outputs.append(_attend(grouped[:, heads], pool, table, tail, pages == open_page[:, None], visible))
    return jnp.concatenate(outputs, axis=1).reshape(q.shape).astype(q.dtype)


def _attend(
    q: jax.Array, pool: PagedKV, table: jax.Array, tail: Tail, is_open: jax.Array, visible: jax.Array
) -> jax.Array:
    """Returns [B, K, G, H] for q of that shape, is_open [B, S] and visible [B, K or 1, S]."""
    of_pages = keys_of(pool, jnp.float32), dequantize(pool.v, jnp.float32)
    k, v = (
        jnp.where(is_open[:, None, :, None], jnp.tile(rows.astype(jnp.float32), (1, 1, table.shape[1], 1)), sealed)
        for rows, sealed in zip(tail, (_tokens(x[table]) for x in of_pages), strict=True)
    )
    k, v = (jnp.where(visible[..., None], x, 0.0) for x in (k, v))
    scores = jnp.einsum("bkgh,bksh->bkgs", q, k, precision="highest") / jnp.sqrt(jnp.float32(q.shape[-1]))
    weights = jax.nn.softmax(jnp.where(visible[:, :, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgs,bksh->bkgh", jnp.where(visible[:, :, None], weights, 0.0), v, precision="highest")


def _tokens(pages: jax.Array) -> jax.Array:
    """Returns the tokens [B, K, S, H] of pages [B, n, K, page_size, H]."""
    by_head = jnp.moveaxis(pages, 2, 1)
    return by_head.reshape(*by_head.shape[:2], -1, by_head.shape[-1])
