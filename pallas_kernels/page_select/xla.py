"""`page_select` for any device: two small products per block of pages, then one top-k over page scores.

With s the spread, the score of one channel is ``(q + s·|q|)/2 · k_max + (q − s·|q|)/2 · k_min`` whatever the sign of q,
so the sum over channels is two matrix products, with no intermediate of [G, subs, H].
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.core.paging import NO_PAGE, PagedKV, div_up, take
from pallas_kernels.page_select.selection import Rule, Selection

_SUBS_PER_BLOCK = 1024


_OPTIONS = ("num_selected", "interval", "sink_pages", "reduction", "spread", "memory")


@partial(jax.jit, static_argnames=_OPTIONS)  # traced once for all layers alike
def page_select(
    q: jax.Array,
    pages: PagedKV,
    table: jax.Array,
    lengths: jax.Array,
    previous: Selection,
    is_refresh: jax.Array,
    budgets: jax.Array,
    *,
    num_selected: int,
    interval: int,
    sink_pages: int,
    reduction: str,
    spread: float,
    memory: float,
) -> Selection:
    """Returns what `pallas_kernels.page_select` defines."""
    rule = Rule(num_selected, interval, sink_pages, memory, pages.page_size, q.shape[-1])

    def scores(b: jax.Array) -> jax.Array:
        """Returns the scores of the pages of sequence b, none where all pages are selected."""
        nothing = jnp.full((pages.num_kv_heads, table.shape[1]), -jnp.inf, jnp.float32)
        return jax.lax.cond(
            take(lengths, b) > take(budgets, b) * pages.page_size,
            lambda: _page_scores(take(q, b), pages, take(table, b), take(lengths, b), reduction, spread),
            lambda: nothing,
        )

    def sequence(b: jax.Array) -> Selection:
        length, budget, old = jax.tree.map(lambda x: take(x, b), (lengths, budgets, previous))
        is_due = take(is_refresh, b) & (length > 0)
        return jax.lax.cond(is_due, lambda: rule.select(scores(b), length, budget, old), lambda: old)

    return jax.lax.map(sequence, jnp.arange(q.shape[0], dtype=jnp.int32))


def _page_scores(
    q: jax.Array, pages: PagedKV, table: jax.Array, length: jax.Array, reduction: str, spread: float
) -> jax.Array:
    """Returns the scores [K, max_pages] float32 of a sequence's sealed pages; of others, anything."""
    k_min, k_max = pages.k_min, pages.k_max
    assert k_min is not None and k_max is not None
    heads, subs, head_dim = k_min.shape[1:]
    max_pages = table.size
    block = min(max(_SUBS_PER_BLOCK // subs, 1), max_pages)
    table = jnp.pad(table, (0, -table.size % block), constant_values=NO_PAGE)
    queries = q.astype(jnp.float32).reshape(heads, -1, head_dim)
    on_high, on_low = ((queries + sign * spread * jnp.abs(queries)) / 2 for sign in (1, -1))

    def score_block(index: jax.Array, scores: jax.Array) -> jax.Array:
        physical = jnp.maximum(jax.lax.dynamic_slice_in_dim(table, index * block, block), 0)
        high, low = (take(x, physical, jnp.arange(heads, dtype=jnp.int32)[:, None]) for x in (k_max, k_min))
        bounds = jnp.max(_product(on_high, high) + _product(on_low, low), axis=-1)
        found = jnp.max(bounds, axis=1) if reduction == "max" else jnp.mean(bounds, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(scores, found, index * block, axis=1)

    blocks = div_up(length, pages.page_size * block)
    nothing = jnp.full((heads, table.size), -jnp.inf, jnp.float32)
    return jax.lax.fori_loop(0, blocks, score_block, nothing)[:, :max_pages]


def _product(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns the products [K, G, P, S] float32 of float32 queries [K, G, H] and keys [K, P, S, H].

    With bfloat16 keys, each query is split into two bfloat16 numbers. This is exact to 2^-17, needs no float32 copy of
    the keys, and is several times as fast on CPUs that multiply bfloat16 matrices.
    """
    if keys.dtype == jnp.bfloat16:
        # Not a conversion to bfloat16 and back, which XLA may remove.
        upper = jax.lax.reduce_precision(queries, exponent_bits=8, mantissa_bits=7)
        queries = jnp.concatenate([upper, queries - upper], axis=1).astype(jnp.bfloat16)
    else:
        keys = keys.astype(jnp.float32)
    rows = keys.reshape(keys.shape[0], -1, keys.shape[-1])
    products = jnp.einsum("kgh,knh->kgn", queries, rows, precision="highest", preferred_element_type=jnp.float32)
    if keys.dtype == jnp.bfloat16:
        products = products[:, : products.shape[1] // 2] + products[:, products.shape[1] // 2 :]
    return products.reshape(*products.shape[:2], *keys.shape[1:3])
