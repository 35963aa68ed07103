"""Page selectors beside LServe's own, to compare with: what a perfect one would choose, what a blind one does.

They are written to be read, and cost more than they save: all keys are read at every selection.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lserve_jax.config.selectors import register_selector
from pallas_kernels import LayerKV, PageTables
from pallas_kernels.core.sealing import keys_of


def _by_head(
    score: Callable[[jax.Array, jax.Array], jax.Array], q: jax.Array, kv: LayerKV, tables: PageTables
) -> jax.Array:
    """Returns scores [B, K, P] from queries [G, H] and the keys [P, page_size, H] float32 of one head at a time."""
    assert kv.retrieval is not None
    pool, table = kv.retrieval, jnp.asarray(tables.retrieval)
    batch, heads = q.shape[0], pool.num_kv_heads
    queries = q.astype(jnp.float32).reshape(batch, heads, -1, q.shape[-1])

    def of_head(at: jax.Array) -> jax.Array:
        b, head = at // heads, at % heads
        pages = jax.tree.map(lambda x: x[jnp.maximum(table[b], 0), head], pool)
        return score(queries[b, head], keys_of(pages, jnp.float32))

    scores = jax.lax.map(of_head, jnp.arange(batch * heads, dtype=jnp.int32))
    return scores.reshape(batch, heads, -1)


@register_selector("mean_key")
def mean_key(q: jax.Array, kv: LayerKV, tables: PageTables, lengths: jax.Array) -> jax.Array:
    """Returns the largest product of a page's mean key with a query of the group."""
    del lengths
    return _by_head(lambda queries, keys: jnp.max(queries @ jnp.mean(keys, axis=1).T, axis=0), q, kv, tables)


@register_selector("oracle")
def oracle(q: jax.Array, kv: LayerKV, tables: PageTables, lengths: jax.Array) -> jax.Array:
    """Returns √H times the logarithm of the attention that a page gets, the mean over the queries of the group."""
    size, unit = kv.page_size, q.shape[-1] ** 0.5
    tokens = jnp.arange(tables.retrieval.shape[1] * size, dtype=jnp.int32)

    def of_sequence(b: jax.Array) -> jax.Array:
        sealed = lengths[b] // size * size  # the open page is not among the stored ones
        one = PageTables(*(jnp.asarray(x)[b][None] for x in (tables.retrieval, tables.streaming)))

        def mass(queries: jax.Array, keys: jax.Array) -> jax.Array:
            products = jnp.where(tokens < sealed, queries @ keys.reshape(-1, keys.shape[-1]).T, -jnp.inf) / unit
            weights = jax.nn.softmax(products, axis=-1).reshape(queries.shape[0], -1, size)
            return jnp.log(jnp.mean(jnp.sum(weights, axis=2), axis=0)) * unit

        return _by_head(mass, q[b][None], kv, one)[0]

    return jax.lax.map(of_sequence, jnp.arange(q.shape[0], dtype=jnp.int32))


@register_selector("random")
def random(q: jax.Array, kv: LayerKV, tables: PageTables, lengths: jax.Array) -> jax.Array:
    """Returns random scores, the same for the same length and head."""
    assert kv.retrieval is not None
    shape = kv.retrieval.num_kv_heads, tables.retrieval.shape[1]
    keys = jax.vmap(lambda length: jax.random.fold_in(jax.random.key(0), length))(lengths)
    return jax.vmap(lambda key: jax.random.uniform(key, shape))(keys) * q.shape[-1] ** 0.5
