"""The specification of `decode_attention`: gathers everything, in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.core.paging import LayerKV, PagedKV, PageTables, is_visible, pools
from pallas_kernels.core.quantization import dequantize


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
    outputs = []
    for name, pool, table, heads in pools(kv, tables):
        keys = jnp.arange(table.shape[1] * pool.page_size, dtype=jnp.int32)
        if name == "streaming":
            visible = is_visible(lengths[:, None] - 1, keys, sink, local)[:, None]
        else:
            visible = is_visible(lengths[:, None] - 1, keys, None, None)[:, None]
            if selected is not None:
                pages = keys // pool.page_size
                visible &= jnp.any(selected[..., None, :] == pages[:, None], axis=-1)
        outputs.append(_attend(grouped[:, heads], pool, table, visible))
    return jnp.concatenate(outputs, axis=1).reshape(q.shape).astype(q.dtype)


def _attend(q: jax.Array, pool: PagedKV, table: jax.Array, visible: jax.Array) -> jax.Array:
    """Returns [B, K, G, H] for q of that shape and visible [B, K or 1, S]."""
    k, v = (jnp.moveaxis(dequantize(x, jnp.float32)[table], 2, 1) for x in (pool.k, pool.v))
    k, v = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (k, v))
    k, v = (jnp.where(visible[..., None], x, 0.0) for x in (k, v))
    scores = jnp.einsum("bkgh,bksh->bkgs", q, k, precision="highest") / jnp.sqrt(jnp.float32(q.shape[-1]))
    weights = jax.nn.softmax(jnp.where(visible[:, :, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgs,bksh->bkgh", jnp.where(visible[:, :, None], weights, 0.0), v, precision="highest")
